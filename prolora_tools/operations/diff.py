"""How far two adapters' dW are apart, from r x r Gram matrices."""

from __future__ import annotations

import math
from pathlib import Path

from prolora_tools.core.fitting import difference_norm, product_norm
from prolora_tools.errors import MismatchError, UnsupportedError
from prolora_tools.files.adapter import Adapter, AdapterModule
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import DifferenceReport, ModuleDifference


def diff(
    a: str | Path, b: str | Path, *, max_error: float | None = None, progress: Progress = SILENT
) -> DifferenceReport:
    """The relative error of B's dW against A's, per module and in total, for any two adapters of one base.

    Args:
        a: the reference adapter.
        b: the other adapter.
        max_error: tolerance on the total; it decides the report's `ok`.
        progress: told of each finished module.

    Raises:
        MismatchError: a module has other dims in the two.
        UnsupportedError: a DoRA adapter, whose dW depends on the base.
        InputError: an adapter is missing or broken.
    """
    first, second = (Adapter.open(Path(x)).require_modules() for x in (a, b))
    for adapter in (first, second):
        if adapter.dora:
            raise UnsupportedError(
                "diff-dora",
                f"{adapter.folder} is a DoRA adapter, whose dW depends on the base",
                hint="merge both into the base, and compare the merged models",
            )
    paths = sorted({*first.modules, *second.modules})
    progress.start("diff", len(paths), "modules")
    modules = []
    error = norm = 0.0
    for path in paths:
        delta, norm_a, norm_b = _compare(first, second, path)
        error += delta**2
        norm += norm_a**2
        modules.append(ModuleDifference(path, delta / norm_a if norm_a else None, norm_a, norm_b))
        progress.advance(1)
    total = math.sqrt(error / norm) if norm else (None if error else 0.0)
    return DifferenceReport(
        a=str(a),
        b=str(b),
        relative_error=total,
        max_error=max_error,
        only_in_a=tuple(p for p in paths if p not in second.modules),
        only_in_b=tuple(p for p in paths if p not in first.modules),
        other_differences=_others(first, second),
        modules=tuple(modules),
    )


def _compare(first: Adapter, second: Adapter, path: str) -> tuple[float, float, float]:
    """|dW_A - dW_B|, |dW_A| and |dW_B| of one module, scaling included; a missing module's dW is 0."""
    pair: list[AdapterModule | None] = [first.modules.get(path), second.modules.get(path)]
    scaled = []
    for module in pair:
        if module is None:
            continue
        a, b = module.factors()
        scaled.append((a.astype("f8"), b.T.astype("f8") * module.scaling))
    dims = {(m.kind, m.in_features, m.out_features) for m in pair if m is not None}
    if len(dims) > 1:
        raise MismatchError(
            "diff-dims",
            f"{path} is {_dims(pair[0])} in {first.folder} and {_dims(pair[1])} in {second.folder}",
            hint="the adapters are for different base models",
        )
    norms = [product_norm(*factors) for factors in scaled]
    if len(scaled) == 1:
        return (norms[0], norms[0], 0.0) if pair[0] else (norms[0], 0.0, norms[0])
    return difference_norm(*scaled[0], *scaled[1]), norms[0], norms[1]


def _dims(module: AdapterModule | None) -> str:
    assert module is not None
    return f"{module.kind} {module.in_features} -> {module.out_features}"


def _others(first: Adapter, second: Adapter) -> tuple[str, ...]:
    """Names of tensors beside the factors that are not the same in both, bit for bit."""
    tables = []
    for adapter in (first, second):
        table = dict(adapter.whole)
        table |= {f"{path} trainable tokens": tensor for path, tensor in adapter.tokens.items()}
        table |= {f"{p} bias": m.stored["bias"] for p, m in adapter.modules.items() if "bias" in m.stored}
        tables.append(table)
    return tuple(
        name
        for name in sorted({*tables[0], *tables[1]})
        if name not in tables[0]
        or name not in tables[1]
        or (tables[0][name].dtype, tables[0][name].shape) != (tables[1][name].dtype, tables[1][name].shape)
        or tables[0][name].read_bytes() != tables[1][name].read_bytes()
    )
