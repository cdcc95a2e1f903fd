"""Budgets before training: what a geometry costs on a base, and which geometries meet a budget."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

from prolora_tools.core.budget import LinearShape, candidates, lora_parameters
from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import MismatchError, RequestError
from prolora_tools.files import dtypes, keys
from prolora_tools.files.checkpoint import read_model_config
from prolora_tools.operations.models import meta_model
from prolora_tools.operations.stats import budget_report, module_budget
from prolora_tools.reports import BudgetReport, CandidatesReport, ModuleBudget, PlanCandidate

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL_LINEAR = "all-linear"
CEIL_SLACK = 0.005
"""Share by which a candidate may exceed a LoRA's budget: ceil of uneven chunks costs 0.05 % on a 7B model."""


def plan(
    base: str | Path,
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    rank: int | None = None,
    unshared: int = 0,
    chunks: tuple[int, int] | int = 1,
    budget: int | None = None,
    like_lora_rank: int | None = None,
    dtype: str = "float32",
    limit: int = 20,
) -> BudgetReport | CandidatesReport:
    """Count a geometry's parameters on a base's linear layers, or list the geometries that meet a budget.

    The layers are those PEFT would find, read off the model on the meta device: config.json is enough.

    Args:
        base: a folder with the model's config.json.
        targets: module names, or `all-linear`: every linear layer but the output head (PEFT's rule).
        rank: r, for one geometry; all of it unshared is plain LoRA.
        unshared: u.
        chunks: m and n, or one number for both.
        budget: parameters allowed, instead of `rank`.
        like_lora_rank: the budget of a LoRA of this rank, instead of `rank`.
        dtype: torch's name of the dtype that bytes are counted in.
        limit: most candidates to list.

    Raises:
        RequestError: not exactly one of `rank`, `budget` and `like_lora_rank`, or a number out of its range.
        MismatchError: no layer of the base is a target.
        InputError: config.json is missing, or no model can be built from it.
        UnsupportedError: the model needs custom code.
    """
    if sum(option is not None for option in (rank, budget, like_lora_rank)) != 1:
        raise RequestError(
            "plan-one-of",
            "a plan needs exactly one of --rank, --budget and --like-lora-rank",
            hint="for example: --rank 8 --unshared 1 --chunks 7, or --budget 5M",
        )
    for name, value in (("budget", budget), ("LoRA rank", like_lora_rank), ("limit", limit)):
        if value is not None and not 1 <= value < 2**63:
            raise RequestError(
                "plan-number",
                f"the {name} is {reprlib.repr(value)}, expected at least 1, and less than 2^63",
                hint="give a positive one",
            )
    bits = dtypes.ITEM_BITS[dtypes.parse(dtype)]
    chunks = (chunks, chunks) if isinstance(chunks, int) else chunks
    geometry = Geometry(rank, unshared, *chunks) if rank is not None else None
    folder = Path(base)
    shapes, base_parameters = _linear_layers(folder, targets)
    if geometry is not None:
        return budget_report(
            str(base),
            "LORA" if geometry.is_lora else "PROLORA",
            _budgets(shapes, geometry, bits),
            base_parameters=base_parameters,
        )
    per_rank = lora_parameters(shapes, 1)
    allowed = budget if budget is not None else per_rank * (like_lora_rank or 0)
    found = candidates(shapes, allowed, slack=0.0 if budget is not None else CEIL_SLACK)[:limit]
    return CandidatesReport(
        subject=str(base),
        budget=allowed,
        lora_rank=allowed / per_rank,
        targets=len(shapes),
        candidates=tuple(
            PlanCandidate(
                rank=c.geometry.rank,
                unshared=c.geometry.unshared,
                chunks_a=c.geometry.chunks_a,
                chunks_b=c.geometry.chunks_b,
                parameters=c.parameters,
                bytes=c.parameters * bits // 8,
                budget_share=c.parameters / allowed,
                modules=tuple(_budgets(shapes, c.geometry, bits)),
            )
            for c in found
        ),
    )


def _budgets(shapes: Sequence[LinearShape], geometry: Geometry, bits: int) -> list[ModuleBudget]:
    return [
        module_budget(
            s.name,
            s.in_features,
            s.out_features,
            geometry,
            n_bytes=geometry.parameters(s.in_features, s.out_features) * bits // 8,
        )
        for s in shapes
    ]


def _linear_layers(folder: Path, targets: str | Sequence[str]) -> tuple[list[LinearShape], int]:
    """The base's target layers in the model's order, and the model's number of parameters."""
    model = meta_model(folder, read_model_config(folder))

    import torch  # noqa: PLC0415 - seconds of import
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    head = model.get_output_embeddings()
    everything = targets == ALL_LINEAR
    names = [targets] if isinstance(targets, str) else list(targets)
    shapes = []
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            dims = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            dims = (module.weight.shape[0], module.weight.shape[1])
        else:
            continue
        if module is not head if everything else keys.matches_target(names, path):
            shapes.append(LinearShape(path, *dims))
    if not shapes:
        raise MismatchError(
            "plan-no-targets",
            f"no linear layer of {folder} matches {', '.join(names) or 'an empty list of targets'}",
            hint="give module names such as --targets q_proj,v_proj, or all-linear",
        )
    return shapes, sum(p.numel() for p in model.parameters())
