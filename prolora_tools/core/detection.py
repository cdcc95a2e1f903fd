"""Is a plain LoRA an expanded PRoLoRA? Its structure is still in the numbers: found here, and undone without loss.

In an expanded factor, copy 1 of rank k is copy 0 of rank k + stride. In the stored basis that is a comparison of
bits. A LoRA whose ranks were permuted or re-scaled since (A -> G A, B -> B G^-1 with G a scaled permutation, as
merging tools do) keeps the relation up to factors: copy 1 of every shared rank is a multiple of copy 0 of another.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.core.fitting import average, difference_norm, product_norm
from prolora_tools.core.geometry import Geometry, Sharing, ceil_div, default_stride
from prolora_tools.core.sharing import expand

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    AnyMatrix = npt.NDArray[np.floating[Any]]

LEAST = 8
"""Numbers that have to agree before a structure is believed, and columns that have to be multiples of others."""


@dataclass(frozen=True)
class Detection:
    """The PRoLoRA that a pair of factors is an expansion of.

    Attributes:
        geometry: its shape, strides given only where they are not the official ones.
        order: the pair's row behind every rank of the PRoLoRA, shared ranks first.
        scale: what A's row is multiplied with, and B's divided by.
    """

    geometry: Geometry
    order: tuple[int, ...]
    scale: tuple[float, ...]

    @property
    def stored(self) -> bool:
        """Whether the ranks stand as they were expanded, so that nothing is rounded."""
        return self.order == tuple(range(len(self.order))) and set(self.scale) == {1.0}

    def restored(self, a: AnyMatrix, bt: AnyMatrix) -> tuple[AnyMatrix, AnyMatrix]:
        """The pair in the basis in which it is an expansion; exact where every scale is 1."""
        order, scale = list(self.order), np.asarray(self.scale)[:, None]
        if set(self.scale) == {1.0}:
            return a[order], bt[order]
        return a[order] * scale, bt[order] / scale


def detect(a: AnyMatrix, bt: AnyMatrix, eps: float) -> Detection | None:
    """Recognise an expanded PRoLoRA.

    Args:
        a: A, (r, in).
        bt: B transposed, (r, out).
        eps: rounding unit of the stored dtype; multiples are compared to a few of it.

    Returns:
        The shape with the fewest parameters that gives the factors back, None where nothing is shared.
    """
    found = [d for d in (_stored(a, bt), _mixed(a, bt, 8 * eps)) if d is not None]
    return min(found, key=lambda d: d.geometry.parameters(a.shape[1], bt.shape[1]), default=None)


def _widths(dim: int) -> Iterator[tuple[int, int]]:
    """Widths that chunks of `dim` can have, smallest first, and the fewest chunks that give each."""
    fewest: dict[int, int] = {}
    chunks = 2
    while chunks <= dim:
        width = ceil_div(dim, chunks)
        fewest.setdefault(width, chunks)
        # The next number of chunks that gives a smaller width.
        chunks = ceil_div(dim, width - 1) if width > 1 else dim + 1
    yield from sorted(fewest.items())


def _named(dim: int, width: int, chunks: int, shared: int, stride: int) -> Sharing:
    """The map with this width and stride; of the numbers of chunks that give it, one whose official stride it is."""
    while chunks <= dim and ceil_div(dim, chunks) == width:
        if default_stride(shared, chunks) % shared == stride % shared:
            return Sharing(shared, chunks, default_stride(shared, chunks))
        chunks += 1
    return Sharing(shared, next(c for w, c in _widths(dim) if w == width), stride)


def _stored(a: AnyMatrix, bt: AnyMatrix) -> Detection | None:
    """In the stored basis, shared ranks first: bits are compared."""
    rank, trained = a.shape[0], bool(bt.any())
    sides = [_exact(x) for x in (a, bt)]
    best: tuple[int, Detection] | None = None
    for shared in range(rank, 0, -1):
        whole = Sharing(shared, 1, default_stride(shared, 1))
        maps = [[*found.get(shared, []), whole] for found in sides]
        for to_a, to_b in itertools.product(*maps):
            if to_a.chunks == to_b.chunks == 1:
                continue
            if not trained:  # B = 0: A alone tells, and B is taken to be cut alike
                to_b = Sharing(shared, to_a.chunks, default_stride(shared, to_a.chunks))  # noqa: PLW2901 - see above
            geometry = _geometry(rank, to_a, to_b)
            parameters = geometry.parameters(a.shape[1], bt.shape[1])
            if best is None or parameters < best[0]:
                best = parameters, Detection(geometry, tuple(range(rank)), (1.0,) * rank)
    return best[1] if best else None


def _geometry(rank: int, to_a: Sharing, to_b: Sharing) -> Geometry:
    strides = [None if s.stride == default_stride(s.ranks, s.chunks) else s.stride for s in (to_a, to_b)]
    return Geometry(rank, rank - to_a.ranks, to_a.chunks, to_b.chunks, *strides)


def _exact(x: AnyMatrix) -> dict[int, list[Sharing]]:
    """For every number of shared ranks, the maps of which the first rows of x are an expansion, narrowest only."""
    rank, dim = x.shape
    found: dict[int, list[Sharing]] = {}
    filled = np.logical_and.accumulate(x.any(axis=1))  # a rank of zeros proves nothing
    for width, chunks in _widths(dim):
        overlap = min(width, dim - width)
        few = min(overlap, 4)
        same = (x[:, None, width : width + few] == x[None, :, :few]).all(axis=2)  # copy 1 of k against copy 0 of j
        for shared in range(1, rank + 1):
            if (
                shared in found
                or shared * (dim - width) < LEAST
                or not filled[shared - 1]
                or not same[:shared, :shared].any(axis=1).all()
            ):
                continue
            rows = np.arange(shared)
            strides = [s for s in range(shared) if same[rows, (rows + s) % shared].all()]
            official = default_stride(shared, chunks) % shared
            for stride in sorted(strides, key=lambda s: (s != official, s)):
                sharing = _named(dim, width, chunks, shared, stride)
                if np.array_equal(expand(x[:shared, :width], sharing, dim), x[:shared]):
                    found[shared] = [sharing]
                    break
    return found


@dataclass(frozen=True)
class _Relation:
    """On one side: copy 1 of row k is factor[k] times copy 0 of row onto[k], for the rows of `rows`."""

    width: int
    chunks: int
    rows: frozenset[int]
    onto: dict[int, int]
    factor: dict[int, float]


def _mixed(a: AnyMatrix, bt: AnyMatrix, tolerance: float) -> Detection | None:
    """In a permuted and re-scaled basis."""
    a, bt = a.astype(np.float64), bt.astype(np.float64)
    rank = a.shape[0]
    sides = [[*_multiples(x, tolerance), None] for x in (a, bt)]
    tried: list[tuple[int, int, Detection]] = []
    for number, (on_a, on_b) in enumerate(itertools.product(*sides)):
        if on_a is None and on_b is None:
            continue
        rows = frozenset(range(rank)).intersection(*(r.rows for r in (on_a, on_b) if r is not None))
        rows = _closed(rows, [r.onto for r in (on_a, on_b) if r is not None])
        found = _labelled(rank, rows, on_a, on_b, (a.shape[1], bt.shape[1])) if rows else None
        if found is not None:
            tried.append((found.geometry.parameters(a.shape[1], bt.shape[1]), number, found))
    norm = product_norm(a, bt)
    for _, _, found in sorted(tried, key=lambda t: t[:2]):
        restored = found.restored(a, bt)
        stored = average(*restored, found.geometry)
        if difference_norm(*restored, *stored.expanded(found.geometry)) <= tolerance * norm:
            return found
    return None


def _multiples(x: AnyMatrix, tolerance: float) -> list[_Relation]:
    """Relations between copies 0 and 1 that hold for some rows, and whose rows' other copies obey them too."""
    dim = x.shape[1]
    relations = []
    for width, chunks in _widths(dim):
        overlap = min(width, dim - width)
        if overlap < LEAST:
            continue
        first, second = x[:, :overlap], x[:, width : width + overlap]
        lengths = np.linalg.norm(first, axis=1), np.linalg.norm(second, axis=1)
        some = np.minimum(*lengths) > 0
        unit_first, unit_second = (
            x / np.where(some, size, 1.0)[:, None] for x, size in zip((first, second), lengths, strict=True)
        )
        cosine = unit_second @ unit_first.T
        onto = {int(k): int(j) for k, j in enumerate(np.abs(cosine).argmax(axis=1))}
        sign = {k: math.copysign(1.0, cosine[k, j]) for k, j in onto.items()}
        near = [
            k
            for k, j in onto.items()
            if some[k] and some[j] and np.linalg.norm(unit_second[k] - sign[k] * unit_first[j]) <= tolerance
        ]
        rows = _closed(frozenset(near), [onto])
        factor = {k: sign[k] * float(lengths[1][k] / lengths[0][onto[k]]) for k in rows}
        if rows:
            relations.append(_Relation(width, chunks, rows, onto, factor))
    return relations


def _closed(rows: frozenset[int], maps: list[dict[int, int]]) -> frozenset[int]:
    """The largest subset on which every map is a permutation."""
    while True:
        kept = {k for k in rows if all(m[k] in rows for m in maps)}
        for m in maps:
            kept &= {m[k] for k in kept}
        if kept == rows:
            return rows
        rows = frozenset(kept)


def _labelled(
    rank: int, rows: frozenset[int], on_a: _Relation | None, on_b: _Relation | None, dims: tuple[int, int]
) -> Detection | None:
    """Give the shared rows places 0..r_s-1 so that both permutations become shifts, and scales that undo the factors.

    A's row is lambda times the original's, B's the original's over lambda: copy 1 of row k has the factor
    lambda_k / lambda_onto(k) on A, and its inverse on B.
    """
    shared = len(rows)
    steps = [(r.onto, r.factor, number) for number, r in enumerate((on_a, on_b)) if r is not None]
    orbits: list[list[int]] = []
    left = set(rows)
    while left:
        orbit, front = [], [min(left)]
        left.discard(front[0])
        while front:
            orbit.append(front.pop())
            for onto, _, _ in steps:
                if (j := onto[orbit[-1]]) in left:
                    left.discard(j)
                    front.append(j)
        orbits.append(orbit)
    order = len(orbits[0])
    if any(len(o) != order for o in orbits):
        return None
    group = len(orbits)
    asked = [None if r is None else default_stride(shared, r.chunks) // group % order for r in (on_a, on_b)]
    for shifts in sorted(
        itertools.product(*(range(order) if r is not None else (0,) for r in (on_a, on_b))),
        key=lambda pair: sum(x is not None and x != y for x, y in zip(asked, pair, strict=True)),
    ):
        placed = _place(orbits, steps, shifts, order)
        if placed is None:
            continue
        places, scales = placed
        at: list[int] = [0] * shared
        for k, place in places.items():
            at[place] = k
        rest = [k for k in range(rank) if k not in rows]
        sides = [
            Sharing(shared, 1, default_stride(shared, 1))
            if r is None
            else _named(dim, r.width, r.chunks, shared, shift * group)
            for r, shift, dim in zip((on_a, on_b), shifts, dims, strict=True)
        ]
        scale = [1 / scales[k] for k in at] + [1.0] * len(rest)
        near = [1.0 if abs(s - 1) < 1e-4 else s for s in scale]  # a permutation only: nothing is to be rounded
        return Detection(_geometry(rank, *sides), (*at, *rest), tuple(near if set(near) == {1.0} else scale))
    return None


def _place(
    orbits: list[list[int]],
    steps: list[tuple[dict[int, int], dict[int, float], int]],
    shifts: tuple[int, ...],
    order: int,
) -> tuple[dict[int, int], dict[int, float]] | None:
    """Places and scales under these shifts, None where they contradict each other.

    Rank place t * g + b belongs to orbit b, for g orbits; a stride of s * g moves t by s.
    """
    group = len(orbits)
    places: dict[int, int] = {}
    scales: dict[int, float] = {}
    for b, orbit in enumerate(orbits):
        start = min(orbit)
        turns, scales[start] = {start: 0}, 1.0
        front = [start]
        while front:
            k = front.pop()
            for onto, factor, side in steps:
                j, turn = onto[k], (turns[k] + shifts[side]) % order
                scale = scales[k] / factor[k] if side == 0 else scales[k] * factor[k]
                if j not in turns:
                    turns[j], scales[j] = turn, scale
                    front.append(j)
                elif turns[j] != turn or abs(scale - scales[j]) > 0.05 * abs(scales[j]):
                    return None
        if len(set(turns.values())) != order:
            return None
        places |= {k: turn * group + b for k, turn in turns.items()}
    return places, scales
