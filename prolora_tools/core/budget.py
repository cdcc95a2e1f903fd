"""Parameter counts of LoRA, PRoLoRA, VeRA and Tied-LoRA, and the geometries that meet a budget. Integers only."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prolora_tools.core.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class LinearShape:
    """A target module: its path and hidden dims."""

    name: str
    in_features: int
    out_features: int


def lora_parameters(shapes: Sequence[LinearShape], rank: int) -> int:
    """LoRA: r (in + out) a module."""
    return rank * sum(s.in_features + s.out_features for s in shapes)


def prolora_parameters(shapes: Sequence[LinearShape], geometry: Geometry) -> int:
    """PRoLoRA: u (in + out) + r_s (ceil(in / m) + ceil(out / n)) a module."""
    return sum(geometry.parameters(s.in_features, s.out_features) for s in shapes)


def vera_parameters(shapes: Sequence[LinearShape], rank: int = 256) -> int:
    """VeRA (arXiv 2310.11454): the vectors d (rank) and b (out) a module; the frozen matrices are not counted."""
    return sum(rank + s.out_features for s in shapes)


def tied_lora_parameters(hidden: int, rank: int, layers: int) -> int:
    """Tied-LoRA (arXiv 2311.09578) on the QKV projection: 4 d r + (r + 3 d) L."""
    return 4 * hidden * rank + (rank + 3 * hidden) * layers


@dataclass(frozen=True)
class Candidate:
    """A geometry that meets a budget, and its parameters over all target modules."""

    geometry: Geometry
    parameters: int


def candidates(
    shapes: Sequence[LinearShape],
    budget: int,
    *,
    max_rank: int = 64,
    max_chunks: int = 16,
    slack: float = 0.0,
    fill: float = 0.9,
) -> list[Candidate]:
    """Geometries with equal chunks on both sides that use a budget well, the closest to it first.

    For every rank and unshared rank there is at most one: the smallest number of chunks that fits. Geometries
    of equal size are sorted by rank, higher first: at the same cost, rank is what sharing buys.

    Args:
        shapes: the target modules.
        budget: parameters allowed in total.
        max_rank: highest rank tried.
        max_chunks: highest number of chunks tried.
        slack: share by which a candidate may exceed the budget, for the ceil of uneven chunks.
        fill: share of the budget that a candidate has to use.
    """
    limit = int(budget * (1 + slack))
    dims = Counter((s.in_features, s.out_features) for s in shapes)
    found: list[Candidate] = []
    for rank in range(1, max_rank + 1):
        for unshared in range(rank + 1):
            for chunks in range(2, max_chunks + 1) if unshared < rank else (1,):
                geometry = Geometry(rank, unshared, chunks, chunks)
                parameters = sum(n * geometry.parameters(*pair) for pair, n in dims.items())
                if parameters <= limit:
                    if parameters >= fill * budget:
                        found.append(Candidate(geometry, parameters))
                    break
    return sorted(found, key=lambda c: (abs(budget - c.parameters), -c.geometry.rank, c.geometry.unshared))
