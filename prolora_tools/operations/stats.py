"""Parameters and bytes of an adapter, from its headers; of a LoRA one module is read, for a note on its structure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from prolora_tools.core.budget import LinearShape, lora_parameters, vera_parameters
from prolora_tools.errors import InputError
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.quantised import open_base
from prolora_tools.operations.shapes import structure
from prolora_tools.reports import BudgetReport, Comparison, Group, ModuleBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from prolora_tools.core.geometry import Geometry

VERA_RANK = 256


def stats(adapter: str | Path, *, base: str | Path | None = None) -> BudgetReport:
    """Count an adapter's parameters and set them against other methods on the same modules.

    Args:
        adapter: a LoRA or PRoLoRA folder.
        base: the base model's folder; its headers give the share of its parameters.

    Raises:
        InputError: the adapter or the base is missing or broken.
        UnsupportedError: a kind of adapter that is refused, or a base that is quantised in a way that is not read.
    """
    opened = Adapter.open(Path(adapter))
    modules = [
        module_budget(m.path, m.in_features, m.out_features, m.geometry, n_bytes=m.n_bytes)
        for m in opened.modules.values()
    ]
    base_parameters = open_base(Path(base)).parameters if base is not None else None
    others = opened.other_tensors
    return budget_report(
        str(adapter),
        "PROLORA" if opened.config.prolora else "LORA",
        modules,
        other_parameters=sum(t.items for t in others),
        other_bytes=sum(t.n_bytes for t in others),
        base_parameters=base_parameters,
        notes=(*opened.notes, *_structure(opened), *_wrapped(opened)),
    )


def _structure(adapter: Adapter) -> list[str]:
    """Whether a LoRA is an expanded PRoLoRA, by the values of its smallest module."""
    try:
        note = structure(adapter)
    except InputError:  # values that cannot be read are no matter of counts; the commands that need them tell
        return []
    return [note] if note else []


def _wrapped(adapter: Adapter) -> list[str]:
    """Where the factors of target_parameters are counted: their shapes are known from the base only."""
    count = sum(t.items for factors in adapter.wrapped.values() for pair in factors for t in pair.values())
    return [f"{count:,} parameters are factors of target_parameters, counted beside the modules"] if count else []


def module_budget(name: str, in_features: int, out_features: int, geometry: Geometry, *, n_bytes: int) -> ModuleBudget:
    """The budget of one module."""
    shared = geometry.shared > 0
    return ModuleBudget(
        name=name,
        in_features=in_features,
        out_features=out_features,
        rank=geometry.rank,
        unshared=geometry.unshared,
        chunks_a=geometry.chunks_a,
        chunks_b=geometry.chunks_b,
        stride_a=geometry.a.stride if shared else 0,
        stride_b=geometry.b.stride if shared else 0,
        parameters=geometry.parameters(in_features, out_features),
        bytes=n_bytes,
        distinct_blocks=geometry.distinct_blocks(in_features, out_features),
        blocks=geometry.a.copies(in_features) * geometry.b.copies(out_features) if shared else 0,
    )


def budget_report(
    subject: str,
    kind: str,
    modules: Sequence[ModuleBudget],
    *,
    other_parameters: int = 0,
    other_bytes: int = 0,
    base_parameters: int | None = None,
    notes: Iterable[str] = (),
) -> BudgetReport:
    """Sum modules up by type, by layer and in total, and compare with other methods."""
    shapes = [LinearShape(m.name, m.in_features, m.out_features) for m in modules]
    factors = sum(m.parameters for m in modules)
    parameters = factors + other_parameters
    return BudgetReport(
        subject=subject,
        kind=kind,
        parameters=parameters,
        bytes=sum(m.bytes for m in modules) + other_bytes,
        other_parameters=other_parameters,
        other_bytes=other_bytes,
        comparison=Comparison(
            lora_same_rank=sum(m.rank * (m.in_features + m.out_features) for m in modules),
            equal_budget_lora_rank=factors / lora_parameters(shapes, 1) if shapes else 0.0,
            vera_rank=VERA_RANK,
            vera=vera_parameters(shapes, VERA_RANK),
        ),
        base_parameters=base_parameters,
        base_share=parameters / base_parameters if base_parameters else None,
        by_type=_groups(modules, lambda m: m.name.rpartition(".")[2]),
        by_layer=_groups(modules, lambda m: _layer(m.name)),
        modules=tuple(modules),
        notes=tuple(notes),
    )


def _layer(path: str) -> str:
    """The path up to its first number, which names the layer: `model.layers.3`. Without one, the whole path."""
    match = re.match(r"(.*?\.)?\d+(?=\.|$)", path)
    return match[0] if match else path


def _groups(modules: Sequence[ModuleBudget], key: Callable[[ModuleBudget], str]) -> tuple[Group, ...]:
    grouped: dict[str, list[ModuleBudget]] = {}
    for module in modules:
        grouped.setdefault(key(module), []).append(module)
    natural = sorted(grouped, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")])
    return tuple(
        Group(name, len(grouped[name]), sum(m.parameters for m in grouped[name]), sum(m.bytes for m in grouped[name]))
        for name in natural
    )
