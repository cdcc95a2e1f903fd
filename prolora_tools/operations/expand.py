"""PRoLoRA -> standard LoRA, exactly; or one rank and one alpha for serving engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.errors import UnsupportedError
from prolora_tools.files import dtypes, keys
from prolora_tools.files.adapter import Adapter, FactorSpec, write_adapter
from prolora_tools.files.writer import check_target, staged
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import ExpansionReport, add_nothing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prolora_tools.files.dtypes import Floats
    from prolora_tools.reports import Finish

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM takes for --max-lora-rank."""


def expand(
    adapter: str | Path,
    out: str | Path,
    *,
    uniform: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    finish: Finish[ExpansionReport] = add_nothing,
    progress: Progress = SILENT,
) -> ExpansionReport:
    """Write an adapter as a standard PEFT LoRA folder.

    The expansion copies stored numbers, so without `uniform` and `dtype` it is exact. A LoRA adapter is passed
    through. With `uniform` every module has one rank and one alpha: factors are padded with zero ranks, and
    where the modules' scalings differ, or rsLoRA makes them no plain alpha / r, they are multiplied into B.

    Args:
        adapter: a PRoLoRA or LoRA folder.
        out: the folder to write.
        uniform: write one r and one alpha, for engines that read no patterns.
        dtype: torch's name of the dtype to store factors in; None keeps each module's.
        overwrite: replace `out` if it is a model folder.
        dry_run: read headers only and write nothing.
        finish: called with the complete folder and the report before the folder becomes `out`.
        progress: told of each finished module.

    Raises:
        RequestError: the dtype is unknown.
        UnsupportedError: with `uniform`, an adapter that holds more than pairs of factors.
        InputError: the adapter is missing or broken.
        OutputError: `out` is refused or cannot be written.
    """
    source = Adapter.open(Path(adapter)).require_modules()
    job = _Job(source, uniform=uniform, dtype=None if dtype is None else dtypes.parse(dtype))
    target = Path(out)
    if dry_run:
        check_target(target, [source.folder], overwrite=overwrite)
        return job.report(None)
    progress.start("expand", len(source.modules), "modules")
    with staged(target, [source.folder], overwrite=overwrite) as stage:
        copied = {keys.renamed(t.name, prolora=False): t for t in source.other_tensors}
        write_adapter(stage, job.config(), job.specs(), job.factors, copied, progress)
        report = job.report(str(out))
        finish(stage, report)
    return report


class _Job:
    """One expansion, one module in memory at a time."""

    def __init__(self, source: Adapter, *, uniform: bool, dtype: str | None) -> None:
        self.source, self.uniform = source, uniform
        modules = list(source.modules.values())
        self.dtypes = {m.path: dtype or m.dtype for m in modules}
        self.rank = max(m.geometry.rank for m in modules)
        self.alpha, self.bake = source.config.alpha, False
        if uniform:
            _require_pairs(source)
            scalings = {m.scaling for m in modules}
            same_rank = all(m.geometry.rank == self.rank for m in modules)
            alpha = modules[0].scaling * self.rank
            # One alpha says it all only if alpha / r gives back the very number that was used.
            plain = len(scalings) == 1 and alpha.is_integer() and alpha / self.rank == modules[0].scaling
            self.bake = not (same_rank and plain)
            self.alpha = self.rank if self.bake else int(alpha)

    def rank_of(self, path: str) -> int:
        return self.rank if self.uniform else self.source.modules[path].geometry.rank

    def specs(self) -> Iterator[FactorSpec]:
        """Every factor to write."""
        for path, module in self.source.modules.items():
            rank, ones = self.rank_of(path), (1,) * (len(module.a_dims) - 1)
            for role, shape in (("A", (rank, *module.a_dims)), ("B", (module.out_features, rank, *ones))):
                name = keys.lora_key(path, f"embedding_{role}" if module.kind == "embedding" else role)
                yield FactorSpec(name, path, role, self.dtypes[path], shape)

    def factors(self, path: str) -> dict[str, Floats]:
        module = self.source.modules[path]
        a, b = module.factors()
        if self.uniform:
            more = self.rank - a.shape[0]
            a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
        if self.bake:
            b = b.astype(np.float64) * module.scaling  # rounded once, when it is stored
        return {"A": a, "B": b}

    def config(self) -> dict[str, Any]:
        """adapter_config.json of the LoRA adapter."""
        config = self.source.config
        raw = (
            {**config.common(), "peft_type": "LORA", "init_lora_weights": True, "use_dora": False}
            if config.prolora
            else dict(config.raw)
        )
        if self.uniform:
            raw |= {
                "r": self.rank,
                "lora_alpha": self.alpha,
                "rank_pattern": {},
                "alpha_pattern": {},
                "use_rslora": False,
            }
        return raw

    def report(self, output: str | None) -> ExpansionReport:
        modules, others = self.source.modules, self.source.other_tensors
        parameters = {p: self.rank_of(p) * (m.in_features + m.out_features) for p, m in modules.items()}
        beside, beside_bytes = sum(t.items for t in others), sum(t.n_bytes for t in others)
        rank_for_vllm = next((r for r in VLLM_RANKS if r >= self.rank), None)
        return ExpansionReport(
            source=str(self.source.folder),
            output=output,
            uniform=self.uniform,
            modules=len(modules),
            rank=self.rank,
            lowest_rank=min(self.rank_of(path) for path in modules),
            alpha=self.alpha,
            scaling_in_b=self.bake,
            vllm_max_lora_rank=rank_for_vllm,
            parameters=sum(parameters.values()) + beside,
            bytes=sum(n * dtypes.ITEM_BITS[self.dtypes[p]] // 8 for p, n in parameters.items()) + beside_bytes,
            source_parameters=sum(m.parameters for m in modules.values()) + beside,
            source_bytes=sum(m.n_bytes for m in modules.values()) + beside_bytes,
            notes=self.source.notes,
        )


def _require_pairs(source: Adapter) -> None:
    if others := [t.name for t in source.other_tensors]:
        raise UnsupportedError(
            "expand-uniform-extras",
            f"{source.folder} holds {others[0]!r}{f' and {len(others) - 1} more' if len(others) > 1 else ''}: "
            "serving engines take pairs of A and B only",
            hint=f"merge it: prolora-tools merge {source.folder} --base BASE -o OUT",
        )
