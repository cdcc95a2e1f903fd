"""The best PRoLoRA factors of a LoRA's dW in the Frobenius norm, by alternating least squares.

With one side's factor fixed, the other is a linear least-squares problem whose normal equations are r_s x r_s: a
stored column shows in every copy with its rows permuted, the unshared columns are eliminated by a Schur
complement, and all stored columns share one matrix (two, where the last copy is cut short). The solutions lie in
the row space of the factor's chunks, so each side is first reduced, exactly, to coordinates in an orthonormal
basis of that space: (copies * r) of them instead of a chunk's width. Rounds cost the same for any hidden dim after
that, and modules of one shape run as one batch.

Where the copies' shifts i * stride_a - j * stride_b meet every multiple of their common divisor equally often and
nothing is unshared, the optimum is in closed form: a discrete Fourier transform over those shifts turns the shared
part into independent matrices of rank g, each solved by its truncated SVD. `spectral` is that; elsewhere it is one
of the starts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.core.sharing import copy_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from prolora_tools.core.geometry import Geometry, Sharing

    Array = npt.NDArray[np.floating[Any]]

RIDGE = 1e-9
"""Added to the normal matrices, relative to their mean eigenvalue. Steps are increments from the last iterate, for
which a ridge cannot raise the error; it only keeps singular systems solvable."""
ROUNDS = 400
TRIAL_ROUNDS = 12
PATIENCE = 10
TOLERANCE = 1e-5
"""A module is done when PATIENCE rounds have lowered its squared error by less than this share of it."""
LARGEST = 8.0
"""|A^| |B^| / |B A| that a round may reach; where shifts leave group elements out, the infimum can lie at infinity."""
_LARGEST_SPECTRAL = 1 << 22
"""Entries of the dense reduced dW up to which the spectral start is made."""


@dataclass(frozen=True)
class Layout:
    """One side of a batch: how `copies` copies of a chunk of `width` columns lie in a factor.

    Factors are (modules, ranks, copies, width); where the last copy is cut, its columns from `full` on are zero.

    Attributes:
        rows: (copies, r_s), the chunk's row behind every row of every copy.
        width: columns of the chunk.
        full: columns that every copy has; the others lack in the last one.
    """

    rows: npt.NDArray[np.int64]
    width: int
    full: int

    @classmethod
    def of(cls, sharing: Sharing, dim: int) -> Layout:
        """The layout of a factor of hidden dim `dim`."""
        width, copies = sharing.width(dim), sharing.copies(dim)
        return cls(copy_rows(sharing, copies), width, dim - (copies - 1) * width)

    @property
    def copies(self) -> int:
        """Copies, the cut one included."""
        return len(self.rows)

    def split(self, factor: Array) -> Array:
        """(modules, ranks, dim) -> (modules, ranks, copies, width), the cut columns filled with zeros."""
        missing = self.width - self.full
        padded = np.pad(factor, ((0, 0), (0, 0), (0, missing))) if missing else factor
        return padded.reshape(*factor.shape[:2], self.copies, self.width)

    def join(self, factor: Array) -> Array:
        """The inverse of `split`."""
        flat = factor.reshape(*factor.shape[:2], self.copies * self.width)
        return flat[:, :, : flat.shape[2] - (self.width - self.full)]

    def cut(self, factor: Array) -> Array:
        """Zero what the last copy lacks, in place."""
        factor[:, :, -1, self.full :] = 0.0
        return factor

    def expand(self, chunk: Array) -> Array:
        """(modules, r_s, width) -> (modules, r_s, copies, width)."""
        return self.cut(chunk[:, self.rows.T])

    def gather(self, factor: Array) -> Array:
        """The transpose of `expand`: the sum over the copies, each rolled back."""
        back = np.argsort(self.rows, axis=1)
        total: Array = factor[:, back[0], 0].copy()
        for i in range(1, self.copies):
            total += factor[:, back[i], i]
        return total

    def gram(self, s: Array, copies: int) -> Array:
        """The normal matrix of a stored column that `copies` copies show: sum of P_i^T S P_i, (modules, r_s, r_s)."""
        back = np.argsort(self.rows, axis=1)
        total = np.zeros_like(s)
        for i in range(copies):
            total += s[:, back[i][:, None], back[i][None, :]]
        return total


@dataclass(frozen=True)
class Side:
    """The unknowns of one side of a batch: chunk (modules, r_s, width) and unshared (modules, u, copies, width)."""

    chunk: Array
    unshared: Array

    def factor(self, layout: Layout) -> Array:
        """(modules, r_s + u, copies * width), the cut columns zero."""
        full = np.concatenate([layout.expand(self.chunk), self.unshared], axis=1)
        return full.reshape(*full.shape[:2], full.shape[2] * full.shape[3])

    def at(self, index: Any) -> Side:
        """Some modules."""
        return Side(self.chunk[index], self.unshared[index])

    def put(self, index: Any, other: Side) -> None:
        """Write some modules."""
        self.chunk[index], self.unshared[index] = other.chunk, other.unshared

    def ahead(self, before: Side, step: Array) -> Side:
        """Extrapolate from `before` through here by `step`, (modules,)."""
        return Side(
            self.chunk + step[:, None, None] * (self.chunk - before.chunk),
            self.unshared + step[:, None, None, None] * (self.unshared - before.unshared),
        )


def ridged(matrix: Array, ridge: float = RIDGE) -> Array:
    """`matrix` (modules, k, k), with its diagonal raised by `ridge` times its mean, and above zero in any case."""
    k = matrix.shape[-1]
    level = np.trace(matrix, axis1=1, axis2=2) / max(k, 1) * ridge + np.finfo(np.float64).tiny * 1e8
    out: Array = matrix + level[:, None, None] * np.eye(k)
    return out


def half_step(gram: Array, cross: Array, target: Array, side: Side, layout: Layout) -> Side:
    """The exact minimiser over one side, the other side given by its Gram matrices.

    Args:
        gram: K = X^ X^T of the other side's factor, (modules, R, R).
        cross: L = X^ X0^T, against the other side's original, (modules, R, r).
        target: this side's original, (modules, r, copies * width).
        side: this side's last iterate.
        layout: this side's layout.
    """
    shared = side.chunk.shape[1]
    residual = cross @ target - gram @ side.factor(layout)
    residual = residual.reshape(*residual.shape[:2], layout.copies, layout.width)
    own, both = ridged(gram[:, shared:, shared:]), gram[:, shared:, :shared]
    through = np.linalg.solve(own, both)  # (modules, u, r_s)
    schur = gram[:, :shared, :shared] - both.transpose(0, 2, 1) @ through
    right = residual[:, :shared] - np.einsum("muk,mucw->mkcw", through, residual[:, shared:], optimize=True)
    total = layout.gather(right)
    change = np.linalg.solve(ridged(layout.gram(schur, layout.copies)), total[:, :, : layout.full])
    if layout.full < layout.width:
        tail = np.linalg.solve(ridged(layout.gram(schur, layout.copies - 1)), total[:, :, layout.full :])
        change = np.concatenate([change, tail], axis=2)
    moved = layout.expand(change)
    columns = layout.copies * layout.width
    rest = residual[:, shared:].reshape(*through.shape[:2], columns) - both @ moved.reshape(*moved.shape[:2], columns)
    return Side(side.chunk + change, side.unshared + np.linalg.solve(own, rest).reshape(side.unshared.shape))


def stride_candidates(geometry: Geometry, most: int) -> list[tuple[int, int]]:
    """Pairs of strides worth trying: many distinct blocks of dW, met equally often; the geometry's own pair first.

    Multiplying both strides by a unit of Z_r_s renames the ranks, so one pair of each such class is looked at. Of equal
    ones those come first that leave one side its own stride, whose copies are the farthest apart.
    """
    shared, own = geometry.shared, (geometry.a.stride, geometry.b.stride)
    if geometry.is_lora or most <= 1:
        return [own]
    m, n = (min(c, shared) for c in (geometry.chunks_a, geometry.chunks_b))
    units = [k for k in range(1, shared + 1) if math.gcd(k, shared) == 1]
    ranked: dict[tuple[int, int], tuple[int, int, bool, int]] = {}
    for pair in itertools.product(range(shared), repeat=2):
        alike = {(k * pair[0] % shared, k * pair[1] % shared) for k in units}
        if min(alike) != pair:
            continue
        group = math.gcd(*pair, shared)
        met = Counter((i * pair[0] - j * pair[1]) % shared for i in range(m) for j in range(n))
        least = min(met.values()) if len(met) == shared // group else 0
        moved = all(a != own[0] % shared and b != own[1] % shared for a, b in alike)
        ranked[pair] = (-len(met), max(met.values()) - least, moved, -group)
    best = sorted(ranked, key=lambda pair: (ranked[pair], pair))
    return [own, *[pair for pair in best if pair != own][: most - 1]]


def balanced(a: Side, b: Side) -> tuple[Side, Side]:
    """Give both sides' shared parts, and each unshared rank, equal norms. B^ A^ is the same; its scale cannot drift."""

    def ratio(x: Array, y: Array, axes: tuple[int, ...]) -> Array:
        square = [np.sum(z**2, axis=axes, keepdims=True) for z in (x, y)]
        some = (square[0] > 0) & (square[1] > 0)
        out: Array = (
            np.where(some, np.divide(square[1], square[0], where=some, out=np.ones_like(square[0])), 1.0) ** 0.25
        )
        return out

    shared, own = ratio(a.chunk, b.chunk, (1, 2)), ratio(a.unshared, b.unshared, (2, 3))
    return Side(a.chunk * shared, a.unshared * own), Side(b.chunk / shared, b.unshared / own)


class Batch:
    """Modules of one shape and geometry, each side reduced to coordinates in the span of its chunks.

    Args:
        a: A, (modules, r, in), float64.
        bt: B transposed, (modules, r, out), float64.
        geometry: the shape to fit; its rank need not be r.
    """

    def __init__(self, a: Array, bt: Array, geometry: Geometry) -> None:
        self.geometry = geometry
        self.full = (Layout.of(geometry.a, a.shape[2]), Layout.of(geometry.b, bt.shape[2]))
        reduced = [_reduce(x, layout) for x, layout in zip((a, bt), self.full, strict=True)]
        (self.a, self.layout_a, self.basis_a), (self.b, self.layout_b, self.basis_b) = reduced
        # Squared norms of B A.
        self.norms: Array = np.einsum(
            "mij,mij->m", self.a @ self.a.transpose(0, 2, 1), self.b @ self.b.transpose(0, 2, 1)
        )

    def restrided(self, geometry: Geometry) -> Batch:
        """The same modules under a geometry that differs in its strides, or ranks, only."""
        other = copy(self)
        other.geometry = geometry
        for name, sharing in (("a", geometry.a), ("b", geometry.b)):
            layout: Layout = getattr(self, f"layout_{name}")
            setattr(other, f"layout_{name}", replace(layout, rows=copy_rows(sharing, layout.copies)))
        return other

    def start(self, chunk_a: Array, unshared_a: Array, chunk_b: Array, unshared_b: Array) -> tuple[Side, Side]:
        """Full-size factors -> coordinates; what lies outside the span cannot lower the error, and is dropped."""
        return (
            _to_coordinates(chunk_a, unshared_a, self.full[0], self.basis_a),
            _to_coordinates(chunk_b, unshared_b, self.full[1], self.basis_b),
        )

    def finish(self, a: Side, b: Side) -> tuple[Array, Array, Array, Array]:
        """Coordinates -> full-size arrays: A's chunk and unshared part, and B's, rank-first."""
        chunk_a, unshared_a = _from_coordinates(a, self.full[0], self.basis_a)
        chunk_b, unshared_b = _from_coordinates(b, self.full[1], self.basis_b)
        return chunk_a, unshared_a, chunk_b, unshared_b

    def spectral(self) -> tuple[Side, Side] | None:
        """The closed form over the group of shifts, after the top u singular directions are set aside as unshared.

        The global optimum where u = 0 and the shifts meet every group element equally often. None where the dense
        reduced dW would be large.
        """
        geometry, la, lb = self.geometry, self.layout_a, self.layout_b
        modules, shared = len(self.a), geometry.shared
        if la.copies * la.width * lb.copies * lb.width > _LARGEST_SPECTRAL:
            return None
        own_a, own_b, rest_a, rest_b = _top_directions(self.a, self.b, geometry.unshared)
        group = math.gcd(geometry.a.stride, geometry.b.stride, shared) if shared else 1
        order = shared // group
        chunk_a = np.zeros((modules, shared, la.width))
        chunk_b = np.zeros((modules, shared, lb.width))
        if shared:
            parts_a = rest_a.reshape(modules, -1, la.copies, la.width)
            parts_b = rest_b.reshape(modules, -1, lb.copies, lb.width)
            blocks = np.zeros((modules, order, lb.width, la.width))
            counts = np.zeros((order, 1, 1))
            for i in range(la.copies):
                for j in range(lb.copies):
                    shift = ((i * geometry.a.stride - j * geometry.b.stride) % shared) // group
                    blocks[:, shift] += parts_b[:, :, j].transpose(0, 2, 1) @ parts_a[:, :, i]
                    counts[shift] += 1
            spectrum = np.fft.fft(blocks / np.maximum(counts, 1), axis=1) / order
            alpha = np.zeros((modules, order, group, la.width), dtype=np.complex128)
            beta = np.zeros((modules, order, group, lb.width), dtype=np.complex128)
            k = min(group, la.width, lb.width)
            for f in range(order // 2 + 1):
                real = 2 * f % order == 0
                left, values, right = np.linalg.svd(
                    spectrum[:, f].real if real else spectrum[:, f], full_matrices=False
                )
                root = np.sqrt(values[:, :k, None] / order)
                alpha[:, f, :k] = root * right[:, :k]
                beta[:, -f % order, :k] = root * left[:, :, :k].transpose(0, 2, 1)
                if not real:
                    alpha[:, -f % order], beta[:, f] = alpha[:, f].conj(), beta[:, -f % order].conj()
            # x[t] = sum_f alpha_f w^(f t), which is order * ifft.
            chunk_a = (np.fft.ifft(alpha, axis=1).real * order).reshape(modules, shared, la.width)
            chunk_b = (np.fft.ifft(beta, axis=1).real * order).reshape(modules, shared, lb.width)
        shape = (modules, geometry.unshared)
        return (
            Side(chunk_a, own_a.reshape(*shape, la.copies, la.width)),
            Side(chunk_b, own_b.reshape(*shape, lb.copies, lb.width)),
        )

    def errors(self, index: Any, a: Side, b: Side) -> Array:
        """Squared errors of some modules, up to rounding of about 1e-16 of their squared norms."""
        hat_a, hat_b = a.factor(self.layout_a), b.factor(self.layout_b)
        cross = np.sum((hat_a @ _t(self.a[index])) * (hat_b @ _t(self.b[index])), axis=(1, 2))
        square = np.sum((hat_a @ _t(hat_a)) * (hat_b @ _t(hat_b)), axis=(1, 2))
        out: Array = self.norms[index] - 2 * cross + square
        return out

    def rounds(self, index: npt.NDArray[np.int64], a: Side, b: Side, most: int) -> tuple[Side, Side, Array]:
        """Up to `most` rounds for the modules `index`, whose iterates are `a` and `b`; the error never rises.

        B's last step is extrapolated before A is solved for (after Ang and Gillis, arXiv 1805.06604); a round that
        raises the error is undone and the extrapolation taken back.

        Returns:
            The iterates and their squared errors.
        """
        best_a, best_b = Side(a.chunk.copy(), a.unshared.copy()), Side(b.chunk.copy(), b.unshared.copy())
        best = self.errors(index, a, b)
        before = Side(b.chunk.copy(), b.unshared.copy())
        step, cap = np.full(len(index), 0.5), np.ones(len(index))
        limit = np.sum(a.factor(self.layout_a) ** 2, axis=(1, 2)) * np.sum(b.factor(self.layout_b) ** 2, axis=(1, 2))
        history = [best.copy()]
        active = np.flatnonzero(best > 1e-15 * self.norms[index])
        for number in range(most):
            if not len(active):
                break
            where = index[active]
            ta, tb = self.a[where], self.b[where]
            last = best_b.at(active)
            guess = last.ahead(before.at(active), step[active] if number else np.zeros(len(active)))
            hat = guess.factor(self.layout_b)
            new_a = half_step(hat @ _t(hat), hat @ _t(tb), ta, best_a.at(active), self.layout_a)
            hat = new_a.factor(self.layout_a)
            gram, cross = hat @ _t(hat), hat @ _t(ta)
            new_b = half_step(gram, cross, tb, guess, self.layout_b)
            hat = new_b.factor(self.layout_b)
            error = (
                self.norms[where]
                - 2 * np.sum(cross * (hat @ _t(tb)), axis=(1, 2))
                + np.sum(gram * (hat @ _t(hat)), axis=(1, 2))
            )
            new_a, new_b = balanced(new_a, new_b)
            # Factors that cancel each other would be lost to the rounding of what is stored.
            size = np.sum(new_a.factor(self.layout_a) ** 2, axis=(1, 2)) * np.sum(
                new_b.factor(self.layout_b) ** 2, axis=(1, 2)
            )
            good = (error <= best[active]) & (size <= np.maximum(limit[active], LARGEST**2 * self.norms[where]))
            kept = active[good]
            before.put(kept, last.at(good))
            best_a.put(kept, new_a.at(good))
            best_b.put(kept, new_b.at(good))
            best[kept] = error[good]
            cap[kept] = np.minimum(cap[kept] * 1.02, 3.0)
            step[kept] = np.minimum(step[kept] * 1.1, cap[kept])
            bad = active[~good]
            before.put(bad, best_b.at(bad))  # the next round is a plain one
            cap[bad] = step[bad]
            step[bad] = step[bad] / 1.5
            history.append(best.copy())
            if number >= PATIENCE:
                gained = history[-1 - PATIENCE][active] - best[active]
                active = active[(gained > TOLERANCE * best[active]) & (best[active] > 1e-15 * self.norms[where])]
        return best_a, best_b, best

    def fit(self, starts: Sequence[tuple[Side, Side]], rounds: int = ROUNDS) -> tuple[Side, Side, Array]:
        """A few rounds from every start, then the best of each module to its end."""
        everything = np.arange(len(self.a))
        best: tuple[Side, Side, Array] | None = None
        for a, b in starts:
            tried = self.rounds(everything, a, b, TRIAL_ROUNDS if len(starts) > 1 else 0)
            if best is None:
                best = tried
                continue
            better = np.flatnonzero(tried[2] < best[2])
            best[0].put(better, tried[0].at(better))
            best[1].put(better, tried[1].at(better))
            best[2][better] = tried[2][better]
        assert best is not None
        return self.rounds(everything, best[0], best[1], rounds)


def _t(x: Array) -> Array:
    return x.transpose(0, 2, 1)


def _reduce(x: Array, layout: Layout) -> tuple[Array, Layout, tuple[Array | None, Array | None]]:
    """Coordinates of a factor in orthonormal bases of its chunks' row spaces, for whole and cut columns apart.

    Returns:
        The reduced factor (modules, r, copies * k), its layout, and the bases (modules, width, k), None where a
        basis would be no smaller than the space.
    """
    parts = layout.split(x)
    groups: list[Array] = []
    bases: list[Array | None] = []
    for columns, copies in ((slice(0, layout.full), layout.copies), (slice(layout.full, None), layout.copies - 1)):
        stack = parts[:, :, :copies, columns]
        modules, rank, _, wide = stack.shape
        if wide > copies * rank:
            basis, triangle = np.linalg.qr(stack.reshape(modules, rank * copies, wide).transpose(0, 2, 1))
            bases.append(basis)
            stack = _t(triangle).reshape(modules, rank, copies, -1)
        else:
            bases.append(None)
        groups.append(np.pad(stack, ((0, 0), (0, 0), (0, layout.copies - copies), (0, 0))))
    reduced = np.concatenate(groups, axis=3)
    small = Layout(layout.rows, reduced.shape[3], groups[0].shape[3])
    return reduced.reshape(*reduced.shape[:2], -1), small, (bases[0], bases[1])


def _to_coordinates(chunk: Array, unshared: Array, layout: Layout, bases: tuple[Array | None, Array | None]) -> Side:
    def change(x: Array) -> Array:  # (..., modules, rows, width)
        parts = [x[:, :, : layout.full], x[:, :, layout.full :]]
        return np.concatenate([p if q is None else p @ q for p, q in zip(parts, bases, strict=True)], axis=2)

    own = layout.split(unshared)
    wide = change(own.reshape(own.shape[0], own.shape[1] * own.shape[2], own.shape[3]))
    return Side(change(chunk), wide.reshape(*own.shape[:3], wide.shape[2]))


def _from_coordinates(side: Side, layout: Layout, bases: tuple[Array | None, Array | None]) -> tuple[Array, Array]:
    first = layout.full if bases[0] is None else bases[0].shape[2]

    def change(x: Array) -> Array:
        parts = [x[:, :, :first], x[:, :, first:]]
        return np.concatenate([p if q is None else p @ _t(q) for p, q in zip(parts, bases, strict=True)], axis=2)

    own = side.unshared
    wide = change(own.reshape(own.shape[0], own.shape[1] * own.shape[2], own.shape[3]))
    return change(side.chunk), layout.join(wide.reshape(*own.shape[:3], wide.shape[2]))


def _top_directions(a: Array, b: Array, count: int) -> tuple[Array, Array, Array, Array]:
    """Split B A at its singular value number `count`: factors of the top, and of the rest, rank-first."""
    q_a, r_a = np.linalg.qr(_t(a))
    q_b, r_b = np.linalg.qr(_t(b))
    left, values, right = np.linalg.svd(r_b @ _t(r_a), full_matrices=False)
    root = np.sqrt(values)[:, :, None]
    all_a, all_b = root * (right @ _t(q_a)), root * (_t(left) @ _t(q_b))
    own = min(count, all_a.shape[1])
    pad = ((0, 0), (0, count - own), (0, 0))
    return np.pad(all_a[:, :own], pad), np.pad(all_b[:, :own], pad), all_a[:, own:], all_b[:, own:]
