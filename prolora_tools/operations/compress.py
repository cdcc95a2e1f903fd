"""Trained LoRA -> PRoLoRA, module by module, with the error told."""

from __future__ import annotations

import math
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prolora_tools.core.fitting import METHODS, Method, Quality, Sample, choose_strides, fit_many
from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import RequestError, UnsupportedError
from prolora_tools.files import config as adapter_config
from prolora_tools.files import dtypes, keys
from prolora_tools.files.adapter import Adapter, FactorSpec, write_adapter
from prolora_tools.files.writer import check_target, staged
from prolora_tools.operations.merge import cores, one_blas_thread
from prolora_tools.operations.stats import module_budget
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import CompressionReport, ModuleCompression

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prolora_tools.core.fitting import AnyMatrix, SharedFactors

Strides = tuple[int, int] | Literal["official", "free"]

_WINDOW = 1 << 24
"""Numbers in the factors of the modules that are fitted ahead of the writing."""
_BATCH = 1 << 21
"""Numbers in the factors of one batch of modules of one shape; batches run side by side."""
_SAMPLES = 8
"""Modules of a shared rank by which its strides are chosen."""


def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    unshared: int,
    chunks: tuple[int, int] | int,
    method: Method | None = None,
    strides: Strides | None = None,
    max_error: float | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> CompressionReport:
    """Compress a trained LoRA adapter into a PRoLoRA adapter folder.

    Every module keeps its own rank and scaling. Where a module's rank is below `unshared`, all its ranks stay
    unshared. What is not a factor is passed through bit for bit. The errors count the rounding to `dtype` in.

    Args:
        adapter: a LoRA folder.
        out: the folder to write.
        unshared: u, ranks kept whole.
        chunks: m and n, or one number for both.
        method: `average`, `align` or `fit`; None takes, module by module, the one with the smallest error.
        strides: rank steps of A and of B; `official` is the rule of the paper's code; `free` chooses, for every
            shared rank in the adapter, the pair under which a fit is best. None is `official` for `average` and
            `align`, else `free`.
        max_error: tolerance on the total relative error; it decides the report's `ok`, not what is written.
        dtype: torch's name of the dtype to store; None keeps each module's.
        overwrite: replace `out` if it is a model folder.
        dry_run: read headers only and write nothing; the errors are None.
        progress: told of each finished module.

    Raises:
        RequestError: a number is out of its range.
        UnsupportedError: a DoRA or PRoLoRA adapter, or a refused variant.
        InputError: the adapter is missing or broken.
        OutputError: `out` is refused or cannot be written.
    """
    chunks = (chunks, chunks) if isinstance(chunks, int) else chunks
    if method is not None and method not in METHODS:
        raise RequestError(
            "method-unknown",
            f"method is {method!r}, expected one of {', '.join(METHODS)}",
            hint="leave it out, and each module takes the one with the smallest error",
        )
    stored_dtype = None if dtype is None else dtypes.parse(dtype)
    source = Adapter.open(Path(adapter))
    _refuse(source)
    if strides is None:
        strides = "free" if method in {None, "fit"} else "official"
    job = _Job(source, unshared, chunks, method, strides, stored_dtype)
    target = Path(out)
    if dry_run:
        check_target(target, [source.folder], overwrite=overwrite)
        return job.report(None, max_error)
    progress.start("compress", len(source.modules), "modules")
    with staged(target, [source.folder], overwrite=overwrite) as stage, one_blas_thread():
        job.settle_strides()
        copied = {keys.renamed(t.name, prolora=True): t for t in source.other_tensors}
        write_adapter(stage, job.config(), job.specs(), job.fit, copied, progress)
    return job.report(str(out), max_error)


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

    def __init__(
        self,
        source: Adapter,
        unshared: int,
        chunks: tuple[int, int],
        method: Method | None,
        strides: Strides,
        dtype: str | None,
    ) -> None:
        self.source, self.unshared, self.chunks, self.method = source, unshared, chunks, method
        self.free = strides == "free"
        self.strides: tuple[int | None, int | None] = (None, None) if isinstance(strides, str) else strides
        self.dtypes = {path: dtype or module.dtype for path, module in source.modules.items()}
        top = max(m.geometry.rank for m in source.modules.values())
        Geometry(top, unshared, *chunks, *self.strides)  # raises where the request itself is out of range
        self.geometries = {
            path: Geometry(m.geometry.rank, min(unshared, m.geometry.rank), *chunks, *self.strides)
            for path, m in source.modules.items()
        }
        self.qualities: dict[str, Quality] = {}
        self.ready: dict[str, SharedFactors] = {}

    def settle_strides(self) -> None:
        """Choose the strides of every shared rank, by modules spread over the adapter."""
        if not self.free:
            return
        by_rank: dict[int, list[str]] = defaultdict(list)
        for path, geometry in self.geometries.items():
            if not geometry.is_lora:
                by_rank[geometry.shared].append(path)
        with ThreadPoolExecutor(cores()) as pool:
            chosen = list(pool.map(self._choose, by_rank.values()))
        for paths, pair in zip(by_rank.values(), chosen, strict=True):
            for path in paths:
                geometry = self.geometries[path]
                if pair != (geometry.a.stride, geometry.b.stride):
                    self.geometries[path] = replace(geometry, stride_a=pair[0], stride_b=pair[1])
        if len(set(chosen)) == 1 and by_rank:
            first = self.geometries[next(iter(by_rank.values()))[0]]
            self.strides = (first.stride_a, first.stride_b)

    def _choose(self, paths: list[str]) -> tuple[int, int]:
        samples = []
        for number in range(min(_SAMPLES, len(paths))):
            path = paths[number * len(paths) // min(_SAMPLES, len(paths))]
            module = self.source.modules[path]
            a, b = module.factors()
            samples.append(Sample(a, b.T, self.geometries[path], module.scaling**2))
        return choose_strides(samples)

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
            alike = batches[module.in_features, module.out_features, module.geometry.rank, geometry, self.dtypes[name]]
            if alike[-1] and (len(alike[-1]) + 1) * size > _BATCH:
                alike.append([])
            alike[-1].append(name)
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(self._fit_batch, [names for alike in batches.values() for names in alike]):
                pass

    def _fit_batch(self, names: list[str]) -> None:
        dtype = self.dtypes[names[0]]

        def rounded(x: AnyMatrix) -> AnyMatrix:
            return dtypes.decode(dtypes.encode(x, dtype).tobytes(), dtype).reshape(x.shape)

        pairs = [(a, b.T) for a, b in (self.source.modules[name].factors() for name in names)]
        fitted = fit_many(pairs, self.geometries[names[0]], method=self.method, store=rounded)
        for name, (factors, quality) in zip(names, fitted, strict=True):
            self.ready[name], self.qualities[name] = factors, quality

    def config(self) -> dict[str, Any]:
        """adapter_config.json of the PRoLoRA adapter."""
        return {
            **self.source.config.common(),
            "peft_type": "PROLORA",
            "format_version": adapter_config.FORMAT_VERSION,
            "unshared_r": self.unshared,
            "chunks_A": self.chunks[0],
            "chunks_B": self.chunks[1],
            "stride_A": self.strides[0],
            "stride_B": self.strides[1],
            "rotate": True,
            "unshared_pattern": {
                f"^{path}": g.unshared for path, g in self.geometries.items() if g.unshared != self.unshared
            },
            **self.stride_patterns(),
        }

    def stride_patterns(self) -> dict[str, dict[str, int]]:
        """Strides of the modules that do not have the adapter's own, where there are any."""
        patterns: dict[str, dict[str, int]] = {}
        for number, name in enumerate(("stride_A", "stride_B")):
            own = {}
            for path, g in self.geometries.items():
                asked = replace(g, stride_a=self.strides[0], stride_b=self.strides[1])
                has, default = (((x.a.stride, x.b.stride)[number]) for x in (g, asked))
                if g.shared and has != default:
                    own[f"^{path}"] = has
            if own:
                patterns[f"{name}_pattern"] = own
        return patterns

    def report(self, output: str | None, max_error: float | None) -> CompressionReport:
        """The report; without the errors when nothing was fitted."""
        modules, source = [], self.source
        error = svd_error = norm = 0.0
        svd_parameters = 0
        for path, m in source.modules.items():
            geometry, dims = self.geometries[path], m.in_features + m.out_features
            parameters = geometry.parameters(m.in_features, m.out_features)
            quality = self.qualities.get(path)
            svd_rank = min(parameters // dims, m.geometry.rank)
            svd_parameters += svd_rank * dims
            n_bytes = parameters * dtypes.ITEM_BITS[self.dtypes[path]] // 8
            budget = module_budget(path, m.in_features, m.out_features, geometry, n_bytes=n_bytes)
            if quality is not None:
                error += (m.scaling * quality.error) ** 2
                svd_error += (m.scaling * quality.svd_error) ** 2
                norm += (m.scaling * quality.norm) ** 2
            modules.append(
                ModuleCompression(
                    **asdict(budget),
                    method=quality.method if quality else None,
                    relative_error=relative(quality.error, quality.norm) if quality else None,
                    svd_rank=svd_rank,
                    svd_relative_error=relative(quality.svd_error, quality.norm) if quality else None,
                )
            )
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
            modules=tuple(modules),
            notes=source.notes,
        )


def relative(error: float, norm: float) -> float:
    """Error / norm; a dW of zero has no error to speak of when it stays zero, and all of it when it does not."""
    return error / norm if norm else float(error > 0)
