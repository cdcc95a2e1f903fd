"""Which geometry each module gets under a budget: error curves, and the steps along them that pay most."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prolora_tools.core.als import stride_candidates
from prolora_tools.core.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_EQUAL = ((2, 2), (3, 3), (4, 4), (7, 7), (12, 12))
_UNEQUAL = ((2, 1), (4, 2), (7, 4))
"""Chunks of one side and of the other: a norm rarely asks the same of both."""
_UNSHARED = (0, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
_SMALLER = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)


@dataclass(frozen=True)
class Point:
    """One way to store a module.

    Attributes:
        geometry: its shape.
        parameters: what it costs.
        error: squared error it leaves, in whatever unit all modules share.
    """

    geometry: Geometry
    parameters: int
    error: float


def candidates(rank: int, in_features: int, out_features: int) -> list[Geometry]:
    """Shapes to try for a module of this rank, none larger than it is, one for each size.

    Some ranks unshared and the others in chunks, as many of A as of B or not; twice the rank with nothing unshared in
    twice the chunks; and plain LoRAs of smaller rank (all unshared), which are best where dW has few directions.
    """
    shapes = [Geometry.lora(max(round(share * rank), 1)) for share in _SMALLER]
    for m, n in _EQUAL:
        shapes += [Geometry(rank, int(share * rank), m, n) for share in _UNSHARED]
        shapes.append(Geometry(2 * rank, 0, 2 * m, 2 * n))
    for pair in _UNEQUAL:
        for m, n in (pair, pair[::-1]):
            shapes += [Geometry(rank, int(share * rank), m, n) for share in _UNSHARED[:-1]]
    largest = rank * (in_features + out_features)
    by_size: dict[int, Geometry] = {}
    for shape in shapes:
        size = shape.parameters(in_features, out_features)
        if size <= largest and (shape.is_lora or (shape.chunks_a <= in_features and shape.chunks_b <= out_features)):
            by_size.setdefault(size, _spread(shape))
    return [by_size[size] for size in sorted(by_size)]


def _spread(shape: Geometry) -> Geometry:
    """The shape with strides that give it more distinct blocks, where some do."""
    if shape.is_lora:
        return shape
    own, *others = stride_candidates(shape, 2)
    counts = [replace(shape, stride_a=a, stride_b=b).distinct_blocks(10**6, 10**6) for a, b in (own, *others)]
    if len(counts) > 1 and counts[1] > counts[0]:
        return replace(shape, stride_a=others[0][0], stride_b=others[0][1])
    return shape


def hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of error over parameters, from the smallest to the one of least error."""
    chain: list[Point] = []
    for point in sorted(points, key=lambda p: (p.parameters, p.error)):
        if chain and point.error >= chain[-1].error:
            continue
        while len(chain) > 1 and _gain(chain[-2], chain[-1]) <= _gain(chain[-2], point):
            chain.pop()
        chain.append(point)
    return chain


def _gain(small: Point, large: Point) -> float:
    return (small.error - large.error) / (large.parameters - small.parameters)


def allocate_ranks(values: Sequence[Iterable[float]], dims: Sequence[int], budget: int) -> list[int]:
    """The ranks of the truncated SVDs that leave the least total error within `budget`: the rival of `allocate`.

    Args:
        values: the singular values of every module, largest first, in a norm that all modules share.
        dims: what a rank of each costs, in + out.
        budget: parameters in total.
    """
    ranks, left = [0] * len(values), budget
    gains = [(-(v**2) / dims[i], i) for i, own in enumerate(values) for v in own]
    for _, i in sorted(gains):
        if dims[i] <= left:
            ranks[i] += 1
            left -= dims[i]
    return ranks


def allocate(
    curves: Sequence[Sequence[Point]], *, budget: int | None = None, error: float | None = None
) -> list[Point] | None:
    """One point of every curve: the least total error within `budget`, or the smallest total within `error`.

    Greedy along the convex hulls, the step that lowers the error most a parameter first: optimal for every total that
    it passes through, and within one step of optimal between them.

    Returns:
        The points, or None where the smallest ones exceed the budget; the best ones where `error` cannot be met.
    """
    chains = [hull(curve) for curve in curves]
    at = [0] * len(chains)
    size, total = sum(c[0].parameters for c in chains), sum(c[0].error for c in chains)
    if budget is not None and size > budget:
        return None
    steps = [(-_gain(c[0], c[1]), i) for i, c in enumerate(chains) if len(c) > 1]
    heapq.heapify(steps)
    while steps and (error is None or total > error):
        _, i = heapq.heappop(steps)
        here, there = chains[i][at[i]], chains[i][at[i] + 1]
        if budget is not None and size + there.parameters - here.parameters > budget:
            continue  # smaller steps of other modules may still fit
        at[i] += 1
        size += there.parameters - here.parameters
        total = sum(c[k].error for c, k in zip(chains, at, strict=True))
        if at[i] + 1 < len(chains[i]):
            heapq.heappush(steps, (-_gain(there, chains[i][at[i] + 1]), i))
    return [chain[k] for chain, k in zip(chains, at, strict=True)]
