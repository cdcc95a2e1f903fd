"""Trained LoRA -> PRoLoRA, module by module, with the error told."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prolora_tools.core.fitting import METHODS, Method, Quality, fit
from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import RequestError, UnsupportedError
from prolora_tools.files import config as adapter_config
from prolora_tools.files import dtypes, keys
from prolora_tools.files.adapter import Adapter, FactorSpec, write_adapter
from prolora_tools.files.writer import check_target, staged
from prolora_tools.operations.stats import module_budget
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import CompressionReport, ModuleCompression

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prolora_tools.core.fitting import AnyMatrix


def compress(
    adapter: str | Path,
    out: str | Path,
    *,
    unshared: int,
    chunks: tuple[int, int] | int,
    method: Method | None = None,
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
        method: `average` or `align`; None takes, module by module, the one with the smaller error.
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
            hint="leave it out, and each module takes the one with the smaller error",
        )
    stored_dtype = None if dtype is None else dtypes.parse(dtype)
    source = Adapter.open(Path(adapter))
    _refuse(source)
    job = _Job(source, unshared, chunks, method, stored_dtype)
    target = Path(out)
    if dry_run:
        check_target(target, [source.folder], overwrite=overwrite)
        return job.report(None, max_error)
    progress.start("compress", len(source.modules), "modules")
    with staged(target, [source.folder], overwrite=overwrite) as stage:
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
    """One compression. Modules are fitted as their tensors are asked for, one in memory at a time."""

    def __init__(
        self, source: Adapter, unshared: int, chunks: tuple[int, int], method: Method | None, dtype: str | None
    ) -> None:
        self.source, self.unshared, self.chunks, self.method = source, unshared, chunks, method
        self.dtypes = {path: dtype or module.dtype for path, module in source.modules.items()}
        top = max(m.geometry.rank for m in source.modules.values())
        Geometry(top, unshared, *chunks)  # raises where the request itself is out of range
        self.geometries = {
            path: Geometry(m.geometry.rank, min(unshared, m.geometry.rank), *chunks)
            for path, m in source.modules.items()
        }
        self.qualities: dict[str, Quality] = {}

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
        """Fit one module and keep its errors. Returns its factors by role, rounded, as they lie on disk."""
        a, b = self.source.modules[path].factors()

        def rounded(x: AnyMatrix) -> AnyMatrix:
            return dtypes.decode(dtypes.encode(x, self.dtypes[path]).tobytes(), self.dtypes[path]).reshape(x.shape)

        stored, self.qualities[path] = fit(a, b.T, self.geometries[path], method=self.method, store=rounded)
        return {
            "A": stored.a_chunk,
            "B": stored.b_chunk.T,
            "A_unshared": stored.a_unshared,
            "B_unshared": stored.b_unshared.T,
        }

    def config(self) -> dict[str, Any]:
        """adapter_config.json of the PRoLoRA adapter."""
        return {
            **self.source.config.common(),
            "peft_type": "PROLORA",
            "format_version": adapter_config.FORMAT_VERSION,
            "unshared_r": self.unshared,
            "chunks_A": self.chunks[0],
            "chunks_B": self.chunks[1],
            "stride_A": None,
            "stride_B": None,
            "rotate": True,
            "unshared_pattern": {
                f"^{path}": g.unshared for path, g in self.geometries.items() if g.unshared != self.unshared
            },
        }

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
