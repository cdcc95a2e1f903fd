"""Trained LoRA -> PRoLoRA, module by module, with the error told."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prolora_tools.core.allocation import allocate_ranks
from prolora_tools.core.fitting import LENGTHEN, METHODS, NO_MOMENTS, Lengthen, Method, Quality, fit_many
from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import RequestError, UnsupportedError
from prolora_tools.files import config as adapter_config
from prolora_tools.files import dtypes, keys
from prolora_tools.files.adapter import Adapter, FactorSpec, write_adapter
from prolora_tools.files.writer import check_target, staged
from prolora_tools.operations.calibrate import Statistics
from prolora_tools.operations.shapes import Shapes, chosen, detected, factors, given, settle_strides, statistics_at_once
from prolora_tools.operations.stats import module_budget
from prolora_tools.operations.threads import cores, one_blas_thread
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import CompressionReport, ModuleCompression, add_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prolora_tools.core.fitting import AnyMatrix, Pair, SharedFactors
    from prolora_tools.reports import Finish

Strides = tuple[int, int] | Literal["official", "free"]

_WINDOW = 1 << 24
"""Numbers in the factors of the modules that are fitted ahead of the writing."""
_BATCH = 1 << 21
"""Numbers in the factors of one batch of modules of one shape; batches run side by side."""

_BY_DIRECTIONS = (
    "the directions of dW got their lengths back, at a larger error: it does not tell what is kept beside an SVD, "
    "so evaluate both this and --lengthen whole"
)


def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    unshared: int | None = None,
    chunks: tuple[int, int] | int | None = None,
    budget: int | None = None,
    ratio: float | None = None,
    method: Method | None = None,
    strides: Strides | None = None,
    statistics: Statistics | Callable[[], Statistics] | str | Path | None = None,
    lengthen: Lengthen = "whole",
    max_error: float | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    finish: Finish[CompressionReport] = add_nothing,
    progress: Progress = SILENT,
) -> CompressionReport:
    """Compress a trained LoRA adapter into a PRoLoRA adapter folder.

    The shape is given (`unshared` and `chunks`), chosen module by module under a `budget`, a `ratio` or, with
    neither, a `max_error`; with none of them the adapter has to be an expanded PRoLoRA, and is taken back to it.

    Every module keeps its own scaling, and, under a given shape, its rank; where that is below `unshared`, all its
    ranks stay unshared. What is not a factor is passed through bit for bit. The errors count the rounding to `dtype`
    in.

    Args:
        adapter: a LoRA folder.
        out: the folder to write.
        unshared: u, ranks kept whole.
        chunks: m and n, or one number for both.
        method: `average`, `align` or `fit`; None takes, module by module, the one with the smallest error.
        strides: rank steps of A and of B; `official` is the rule of the paper's code; `free` chooses, for every
            shared rank in the adapter, the pair under which a fit is best. None is `official` for `average` and
            `align`, else `free`.
        statistics: from `calibrate`, or the file they were saved in: errors are then measured, and `fit` works, in
            the norm of what the model's layers see. A function is called for them once the rest of the request is
            found to be in order.
        lengthen: what of a fit with statistics gets back the length that least squares takes: dW as a `whole`, or
            every singular direction of it by itself (`directions`), which costs error in the norm and may keep more.
        budget: parameters allowed in total, those beside the factors included.
        ratio: the adapter's parameters over those allowed, such as 2 for half.
        max_error: tolerance on the total relative error, in the norm of the statistics where there are any. It
            decides the report's `ok`; it also decides the shapes where nothing else does.
        dtype: torch's name of the dtype to store; None keeps each module's.
        overwrite: replace `out` if it is a model folder.
        dry_run: read headers only and write nothing; the errors are None, and free strides the official ones.
        finish: called with the complete folder and the report before the folder becomes `out`.
        progress: told of each finished module.

    Raises:
        RequestError: a number is out of its range.
        UnsupportedError: a DoRA or PRoLoRA adapter, or a refused variant.
        InputError: the adapter is missing or broken.
        OutputError: `out` is refused or cannot be written.
    """
    _check_names(method, lengthen)
    mode = _mode(unshared, chunks, budget, ratio, max_error, dry_run=dry_run)
    if lengthen == "directions":
        _check_directions(
            fits=method in {None, "fit"} and (dry_run or statistics is not None),
            by_error=mode == "choose" and budget is None and ratio is None,
        )
    stored_dtype = None if dtype is None else dtypes.parse(dtype)
    source = Adapter.open(Path(adapter)).require_modules()
    _refuse(source)
    if isinstance(statistics, str | Path):
        statistics = Statistics.open(Path(statistics))
    if strides is None:
        strides = "free" if method in {None, "fit"} else "official"
    job = _Job(source, method, lengthen, stored_dtype)
    if mode == "given":
        assert unshared is not None
        assert chunks is not None
        pair = (chunks, chunks) if isinstance(chunks, int) else chunks
        job.shapes = given(source, unshared, pair, (None, None) if isinstance(strides, str) else strides)
    target = Path(out)
    check_target(target, [source.folder], overwrite=overwrite)
    if dry_run:
        report = job.report(None, max_error)
        told = ("a dry run reads no values, so the strides are the official ones: compress may choose others",)
        return replace(report, notes=(*report.notes, *told)) if strides == "free" else report
    job.statistics = statistics() if callable(statistics) else statistics
    progress.start("compress", len(source.modules), "modules")
    with staged(target, [source.folder], overwrite=overwrite) as stage, one_blas_thread():
        if mode == "detect":
            job.shapes = detected(source)
        elif mode == "choose":
            job.chosen = True
            job.shapes = chosen(source, job.moments, budget=_limit(source, budget, ratio), error=max_error)
        if strides == "free" and mode != "detect":
            settle_strides(source, job.shapes, job.moments)
            if mode == "choose":
                job.shapes.set_default()
        copied = {keys.renamed(t.name, prolora=True): t for t in source.other_tensors}
        write_adapter(stage, job.config(), job.specs(), job.fit, copied, progress)
        report = job.report(str(out), max_error, _limit(source, budget, ratio))
        finish(stage, report)
    return report


def _mode(
    unshared: int | None,
    chunks: tuple[int, int] | int | None,
    budget: int | None,
    ratio: float | None,
    max_error: float | None,
    *,
    dry_run: bool,
) -> Literal["given", "choose", "detect"]:
    """How the shapes come about.

    Raises:
        RequestError: the options contradict each other, or a number is out of its range.
    """
    shape, size = (unshared, chunks), (budget, ratio)
    if (
        (None in shape and shape != (None, None))
        or None not in size
        or (shape != (None, None) and size != (None, None))
    ):
        raise RequestError(
            "compress-request",
            "the shape is said by unshared and chunks together, or chosen by one of budget and ratio",
            hint="give --unshared U --chunks M, or --budget N, or --ratio X",
        )
    if (budget is not None and budget < 1) or (ratio is not None and not ratio >= 1):
        asked = f"budget is {budget}" if ratio is None else f"ratio is {ratio}"
        raise RequestError(
            "compress-size", f"the {asked}, expected at least 1", hint="--ratio 2 leaves half of the parameters"
        )
    if shape != (None, None):
        return "given"
    if dry_run:
        raise RequestError(
            "compress-dry-run",
            "a dry run reads no values, and without a shape they have to be read",
            hint="give --unshared and --chunks, or leave --dry-run out",
        )
    return "detect" if size == (None, None) and max_error is None else "choose"


def _check_names(method: str | None, lengthen: str) -> None:
    if method is not None and method not in METHODS:
        raise RequestError(
            "method-unknown",
            f"method is {method!r}, expected one of {', '.join(METHODS)}",
            hint="leave it out, and each module takes the one with the smallest error",
        )
    if lengthen not in LENGTHEN:
        raise RequestError(
            "lengthen-unknown", f"lengthen is {lengthen!r}, expected one of {', '.join(LENGTHEN)}", hint="leave it out"
        )


def _check_directions(*, fits: bool, by_error: bool) -> None:
    if not fits:
        raise RequestError(
            "compress-lengthen",
            "only a fit with statistics is made longer by directions",
            hint="give --calibrate TEXT --base BASE or --statistics FILE, and no --method but fit",
        )
    if by_error:
        raise RequestError(
            "compress-lengthen-error",
            "shapes cannot be chosen by an error that lengths by directions then raise",
            hint="say the size, --budget N or --ratio X, or leave out --lengthen directions",
        )


def _limit(source: Adapter, budget: int | None, ratio: float | None) -> int | None:
    """Parameters allowed for the factors: the budget counts what is beside them too."""
    others = sum(t.items for t in source.other_tensors)
    if budget is not None:
        return budget - others
    if ratio is not None:
        return int((sum(m.parameters for m in source.modules.values()) + others) / ratio) - others
    return None


def _refuse(source: Adapter) -> None:
    if source.dora:
        raise UnsupportedError(
            "compress-dora",
            f"{source.folder} is a DoRA adapter: its magnitudes go with the base's weights, and PRoLoRA has none",
            hint=f"merge it: prolora-tools merge {source.folder} --base BASE -o OUT",
        )
    if source.config.prolora:
        raise UnsupportedError(
            "compress-prolora",
            f"{source.folder} is a PRoLoRA adapter already",
            hint=f"expand it first: prolora-tools expand {source.folder} -o LORA",
        )


class _Job:
    """One compression. Modules are fitted a window ahead of the writing, those of one shape as a batch."""

    def __init__(self, source: Adapter, method: Method | None, lengthen: Lengthen, dtype: str | None) -> None:
        self.source, self.method, self.lengthen = source, method, lengthen
        self.statistics: Statistics | None = None
        self.dtypes = {path: dtype or module.dtype for path, module in source.modules.items()}
        self.shapes = Shapes({}, Geometry.lora(1))
        self.chosen = False
        self.qualities: dict[str, Quality] = {}
        self.ready: dict[str, SharedFactors] = {}

    @property
    def geometries(self) -> dict[str, Geometry]:
        """Every module's shape."""
        return self.shapes.modules

    def specs(self) -> Iterator[FactorSpec]:
        """Every factor to write. The unshared ones keep kernel dims, and so tell the true dims (docs/format.md)."""
        for path, module in self.source.modules.items():
            geometry = self.geometries[path]
            shapes: dict[str, tuple[int, ...]] = {
                "A": (geometry.shared, geometry.a.width(module.in_features)),
                "B": (geometry.b.width(module.out_features), geometry.shared),
                "A_unshared": (geometry.unshared, *module.a_dims),
                "B_unshared": (module.out_features, geometry.unshared, *(1,) * (len(module.a_dims) - 1)),
            }
            for role, shape in shapes.items():
                name = keys.prolora_key(path, f"embedding_{role}" if module.kind == "embedding" else role)
                yield FactorSpec(name, path, role, self.dtypes[path], shape)

    def fit(self, path: str) -> dict[str, AnyMatrix]:
        """One module's factors by role, rounded, as they lie on disk."""
        if path not in self.ready:
            self._fit_window(path)
        stored = self.ready.pop(path)
        return {
            "A": stored.a_chunk,
            "B": stored.b_chunk.T,
            "A_unshared": stored.a_unshared,
            "B_unshared": stored.b_unshared.T,
        }

    def _fit_window(self, path: str) -> None:
        """Fit `path` and the modules after it that are not fitted yet, as many as a window holds."""
        paths = list(self.source.modules)
        batches: dict[tuple[object, ...], list[list[str]]] = defaultdict(lambda: [[]])
        total = 0
        for name in [path, *(p for p in paths[paths.index(path) :] if p != path and p not in self.qualities)]:
            module, geometry = self.source.modules[name], self.geometries[name]
            size = module.geometry.rank * (module.in_features + module.out_features)
            if total and total + size > _WINDOW:
                break
            total += size
            most = _BATCH // size
            if self.statistics is not None:
                most = min(most, statistics_at_once(module))
            alike = batches[module.in_features, module.out_features, module.geometry.rank, geometry, self.dtypes[name]]
            if alike[-1] and len(alike[-1]) >= most:
                alike.append([])
            alike[-1].append(name)
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(self._fit_batch, [names for alike in batches.values() for names in alike]):
                pass

    def _fit_batch(self, names: list[str]) -> None:
        dtype = self.dtypes[names[0]]

        def rounded(x: AnyMatrix) -> AnyMatrix:
            return dtypes.decode(dtypes.encode(x, dtype).tobytes(), dtype).reshape(x.shape)

        pairs = [self._pair(name) for name in names]
        moments = [self.moments(name) for name in names]
        with np.errstate(over="ignore", invalid="ignore"):  # what the dtype cannot hold is refused when it is written
            fitted = fit_many(
                pairs,
                self.geometries[names[0]],
                method=self.method,
                store=rounded,
                moments=moments,
                lengthen=self.lengthen,
            )
        for name, (stored, quality) in zip(names, fitted, strict=True):
            self.ready[name], self.qualities[name] = stored, quality

    def _pair(self, path: str) -> tuple[AnyMatrix, AnyMatrix]:
        """A module's factors, rank-first, in the basis in which they are an expansion where they are one."""
        pair = factors(self.source.modules[path])
        found = self.shapes.detected.get(path)
        return pair if found is None else found.restored(*pair)

    def moments(self, path: str) -> Pair:
        """The norm of a module: of inputs and of output gradients."""
        if self.statistics is None:
            return NO_MOMENTS
        module = self.source.modules[path]
        return (
            self.statistics.moments(path, "input", module.in_features),
            self.statistics.moments(path, "output", module.out_features),
        )

    def config(self) -> dict[str, Any]:
        """adapter_config.json of the PRoLoRA adapter."""
        return {
            **self.source.config.common(),
            "peft_type": "PROLORA",
            "format_version": adapter_config.FORMAT_VERSION,
            **self.shapes.config(self.source),
        }

    def _svd_ranks(self) -> dict[str, int]:
        """The rival's: under a chosen shape as many as the same kind of choice gives; else the largest no bigger."""
        modules, dims, sizes = list(self.source.modules.items()), [], []
        for path, m in modules:
            dims.append(m.in_features + m.out_features)
            sizes.append(self.geometries[path].parameters(m.in_features, m.out_features))
        if self.chosen and self.qualities:
            values = [[m.scaling * v for v in self.qualities[path].calibrated_values] for path, m in modules]
            ranks = allocate_ranks(values, dims, sum(sizes))
        else:
            ranks = [min(s // d, m.geometry.rank) for s, d, (_, m) in zip(sizes, dims, modules, strict=True)]
        return {path: rank for (path, _), rank in zip(modules, ranks, strict=True)}

    def report(self, output: str | None, max_error: float | None, budget: int | None = None) -> CompressionReport:
        """The report; without the errors when nothing was fitted."""
        modules, source = [], self.source
        calibrated = self.statistics is not None and bool(self.qualities)
        error = svd_error = norm = 0.0
        weighed = [0.0, 0.0, 0.0]  # squares of the error, the SVD's and the whole, in the calibrated norm
        svd_parameters = 0
        svd_ranks = self._svd_ranks()
        for path, m in source.modules.items():
            geometry, dims = self.geometries[path], m.in_features + m.out_features
            parameters = geometry.parameters(m.in_features, m.out_features)
            quality = self.qualities.get(path)
            svd_rank = svd_ranks[path]
            svd_parameters += svd_rank * dims
            n_bytes = parameters * dtypes.ITEM_BITS[self.dtypes[path]] // 8
            counted = module_budget(path, m.in_features, m.out_features, geometry, n_bytes=n_bytes)
            if quality is not None:
                error += (m.scaling * quality.error) ** 2
                svd_error += (m.scaling * quality.svd_error(svd_rank)) ** 2
                norm += (m.scaling * quality.norm) ** 2
                told = (quality.calibrated_error, quality.svd_calibrated_error(svd_rank), quality.calibrated_norm)
                weighed = [w + (m.scaling * x) ** 2 for w, x in zip(weighed, told, strict=True)]
            modules.append(
                ModuleCompression(
                    **asdict(counted),
                    method=quality.method if quality else None,
                    relative_error=relative(quality.error, quality.norm) if quality else None,
                    svd_rank=svd_rank,
                    svd_relative_error=relative(quality.svd_error(svd_rank), quality.norm) if quality else None,
                    calibrated_error=relative(quality.calibrated_error, quality.calibrated_norm)
                    if quality and calibrated
                    else None,
                    svd_calibrated_error=relative(quality.svd_calibrated_error(svd_rank), quality.calibrated_norm)
                    if quality and calibrated
                    else None,
                )
            )
        comparison = (_BY_DIRECTIONS,) if calibrated and self.lengthen == "directions" else ()
        others, other_bytes = (sum(getattr(t, k) for t in source.other_tensors) for k in ("items", "n_bytes"))
        return CompressionReport(
            source=str(source.folder),
            output=output,
            method=self.method or "best",
            parameters=sum(m.parameters for m in modules) + others,
            bytes=sum(m.bytes for m in modules) + other_bytes,
            source_parameters=sum(m.parameters for m in source.modules.values()) + others,
            source_bytes=sum(m.n_bytes for m in source.modules.values()) + other_bytes,
            relative_error=relative(math.sqrt(error), math.sqrt(norm)) if self.qualities else None,
            svd_relative_error=relative(math.sqrt(svd_error), math.sqrt(norm)) if self.qualities else None,
            svd_parameters=svd_parameters + others,
            max_error=max_error,
            budget=None if budget is None else budget + others,
            calibrated_error=relative(math.sqrt(weighed[0]), math.sqrt(weighed[2])) if calibrated else None,
            svd_calibrated_error=relative(math.sqrt(weighed[1]), math.sqrt(weighed[2])) if calibrated else None,
            lengthen=self.lengthen if calibrated else None,
            modules=tuple(modules),
            notes=(*source.notes, *comparison),
        )


def relative(error: float, norm: float) -> float:
    """Error / norm; a dW of zero has no error to speak of when it stays zero, and all of it when it does not."""
    return error / norm if norm else float(error > 0)
