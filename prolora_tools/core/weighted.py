"""The best PRoLoRA factors in the norm |G^1/2 (B A - B^ A^) C^1/2|, by alternating least squares.

C couples the columns of a chunk, so a half step is no longer a small system. Unshared ranks are still eliminated
exactly (their normal equations do not depend on C), and the chunk is solved for by conjugate gradients. Their
preconditioner is the exact inverse where the other side's Gram matrix commutes with the rotation: a Fourier
transform along the rank turns copies into phases, and each frequency f has its own matrix
C_f = sum of phase_j conj(phase_i) C_ji over the copies, inverted once for the whole fit. The number of iterations
then does not grow with the condition number of C.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.core.als import Layout, Side, balanced, ridged

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from prolora_tools.core.geometry import Geometry, Sharing
    from prolora_tools.core.moments import Moments

    Array = npt.NDArray[np.floating[Any]]

ROUNDS = 60
TRIAL_ROUNDS = 6
INNER = 6
"""Conjugate-gradient iterations a half step; each half step starts from the last iterate."""
PATIENCE = 5
TOLERANCE = 3e-4
_LARGEST_INVERSES = 1 << 25
"""Complex numbers in the preconditioner's inverses; above, one real matrix serves all frequencies."""


class _Norm:
    """One side's moments under one sharing map: products with C, and the preconditioner's inverses."""

    def __init__(self, moments: Moments | None, sharing: Sharing, dim: int) -> None:
        self.moments, self.dim, self.ranks = moments, dim, sharing.ranks
        self.layout = Layout.of(sharing, dim)
        self.group = math.gcd(sharing.stride, sharing.ranks) if sharing.ranks else 1
        self.order = sharing.ranks // self.group
        self.phase = sharing.stride // self.group if sharing.ranks else 0
        self.inverses: list[_Inverse] | None = None
        if moments is not None and sharing.ranks:
            self.inverses = self._invert()

    def apply(self, x: Array) -> Array:
        """X C for (1, k, copies * width), in the padded layout."""
        if self.moments is None:
            return x
        flat, missing = x.reshape(x.shape[1], x.shape[2]), x.shape[2] - self.dim
        out: Array = self.moments.apply(flat[:, : self.dim])
        return (np.pad(out, ((0, 0), (0, missing))) if missing else out)[None, :, :]

    def _invert(self) -> list[_Inverse]:
        moments, layout = self.moments, self.layout
        assert moments is not None
        width, copies, root = layout.width, layout.copies, moments.root
        spans = [slice(i * width, min((i + 1) * width, self.dim)) for i in range(copies)]
        rows = width if root is None else min(len(root), width)
        count = self.order // 2 + 1
        # One copy is turned by nothing: one inverse, and an exact one.
        self.coupled = copies > 1 and count * width * rows <= _LARGEST_INVERSES
        phases = [self._phases(f) for f in range(count if self.coupled else 1)]
        if root is not None and 2 * rows * (1 if self.coupled else copies) <= width:  # never a dense C
            parts = [np.pad(root[:, s], ((0, 0), (0, width - s.stop + s.start))) for s in spans]
            diagonal = np.sum([np.pad(moments.diagonal[s], (0, width - s.stop + s.start)) for s in spans], axis=0)
            if not self.coupled:
                return [_low_rank(np.concatenate(parts), diagonal)]
            return [
                _low_rank(sum(p * x for p, x in zip(phase.conj(), parts, strict=True)), diagonal) for phase in phases
            ]
        sums: list[npt.NDArray[Any]] = [np.zeros((width, width), dtype=phase.dtype) for phase in phases]
        for j in range(copies):
            for i in range(copies) if self.coupled else (j,):
                block = moments.block(spans[j], spans[i])
                for phase, total in zip(phases, sums, strict=True):
                    total[: block.shape[0], : block.shape[1]] += phase[j] * phase[i].conj() * block
        return [_inverse(total) for total in sums]

    def _phases(self, f: int) -> npt.NDArray[Any]:
        """What frequency f turns every copy by: complex numbers, or 1 and -1 where they are real."""
        angles = 2 * np.pi * (f * self.phase * np.arange(self.layout.copies) % self.order) / self.order
        return np.round(np.cos(angles)) if 2 * f % self.order == 0 else np.exp(1j * angles)

    def inverted(self, schur: Array) -> list[npt.NDArray[Any]]:
        """The inverses, a frequency, of the part of S, (1, r_s, r_s), that commutes with the rotation."""
        if not self.coupled:
            return [np.linalg.inv(ridged(self.layout.gram(schur, self.layout.copies)))[0] * self.layout.copies]
        order, group = self.order, self.group
        # (order, group, order, group) -> diagonal blocks of its two-sided transform: S_f
        table = schur[0].reshape(order, group, order, group)
        lags = np.zeros((order, group, group))
        steps = np.arange(order)
        for lag in range(order):
            lags[lag] = table[(steps + lag) % order, :, steps, :].sum(axis=0)
        blocks = np.fft.rfft(lags, axis=0)
        level = np.trace(blocks, axis1=1, axis2=2).real / group * 1e-9 + np.finfo(np.float64).tiny * 1e8
        out: list[npt.NDArray[Any]] = list(np.linalg.inv(blocks + level[:, None, None] * np.eye(group)))
        return out

    def precondition(self, ranks: list[npt.NDArray[Any]], right: Array) -> Array:
        """An approximate solution X, (1, r_s, width), of sum over i, j of P_i^T S P_j X C_ji = right.

        Args:
            ranks: `inverted` of S.
            right: (1, r_s, width).
        """
        assert self.inverses is not None
        if not self.coupled:
            simple: Array = self.inverses[0].after(ranks[0] @ right[0])[None]
            return simple
        width = self.layout.width
        spectrum = np.fft.rfft(right[0].reshape(self.order, self.group, width), axis=0)
        out = np.zeros_like(spectrum)
        for f, inverse in enumerate(self.inverses):
            # At the real frequencies nothing is complex, and the product takes a quarter of the work.
            x = ranks[f].real @ spectrum[f].real if inverse.real else ranks[f] @ spectrum[f]
            out[f] = inverse.after(x)
        back: Array = np.fft.irfft(out, n=self.order, axis=0) * self.order
        return back.reshape(1, self.ranks, width)


@dataclass(frozen=True)
class _Inverse:
    """A matrix inverse: diag(diagonal) - half^H half, or dense.

    Attributes:
        dense: (width, width), or None.
        half: (rows, width), or None.
        diagonal: (width,) beside `half`.
    """

    dense: npt.NDArray[Any] | None
    half: npt.NDArray[Any] | None
    diagonal: Array

    @property
    def real(self) -> bool:
        """Whether its numbers are."""
        found = self.half if self.dense is None else self.dense
        return found is None or not np.iscomplexobj(found)

    def after(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows (k, width), times the inverse."""
        out: npt.NDArray[Any]
        if self.dense is not None:
            out = x @ self.dense
        else:
            assert self.half is not None
            out = x * self.diagonal - (x @ self.half.conj().T) @ self.half
        return out


def _level(trace: float, width: int) -> float:
    """What is added to the diagonal of a matrix so that it has an inverse."""
    return trace / width * 1e-7 + np.finfo(np.float64).tiny * 1e8


def _inverse(matrix: npt.NDArray[Any]) -> _Inverse:
    width = len(matrix)
    inverse = np.linalg.inv(matrix + _level(float(np.trace(matrix).real), width) * np.eye(width))
    return _Inverse((inverse + inverse.conj().T) / 2, None, np.zeros(width))


def _low_rank(root: npt.NDArray[Any], diagonal: Array) -> _Inverse:
    """Of root^H root + diag(diagonal), through a matrix of root's rows (Woodbury)."""
    level = _level(float(np.sum(np.abs(root) ** 2) + diagonal.sum()), root.shape[1])
    inverse = 1.0 / (diagonal + level)
    inner = np.linalg.cholesky(np.eye(len(root)) + (root * inverse) @ root.conj().T)
    return _Inverse(None, np.linalg.solve(inner, root * inverse), inverse)


def _dot(x: Array, y: Array) -> float:
    return float(np.sum(x * y))


class WeightedFit:
    """One module in a calibrated norm.

    Args:
        a: A, (r, in), float64.
        bt: B transposed, (r, out), float64.
        geometry: the shape to fit; its rank need not be r.
        moments: of the inputs and of the output gradients; None is the identity.
    """

    def __init__(self, a: Array, bt: Array, geometry: Geometry, moments: tuple[Moments | None, Moments | None]) -> None:
        self.a = _Norm(moments[0], geometry.a, a.shape[1])
        self.b = _Norm(moments[1], geometry.b, bt.shape[1])
        self.aim(a, bt)

    def aim(self, a: Array, bt: Array) -> None:
        """Fit other factors from here on, in the same norm, whose inverses are kept."""
        self.target_a, self.target_b = (
            n.layout.split(x[None]).reshape(1, x.shape[0], -1) for n, x in ((self.a, a), (self.b, bt))
        )
        self.heavy_a, self.heavy_b = self.a.apply(self.target_a), self.b.apply(self.target_b)
        self.norm = _dot(self.target_a @ _t(self.heavy_a), self.target_b @ _t(self.heavy_b))

    def start(self, chunk_a: Array, unshared_a: Array, chunk_b: Array, unshared_b: Array) -> tuple[Side, Side]:
        """Stored arrays of this module, rank-first, as iterates."""
        return (
            Side(chunk_a[None], self.a.layout.split(unshared_a[None])),
            Side(chunk_b[None], self.b.layout.split(unshared_b[None])),
        )

    def finish(self, a: Side, b: Side) -> tuple[Array, Array, Array, Array]:
        """Iterates as stored arrays: A's chunk and unshared part, and B's, rank-first."""
        return (a.chunk[0], self.a.layout.join(a.unshared)[0], b.chunk[0], self.b.layout.join(b.unshared)[0])

    def error(self, a: Side, b: Side) -> float:
        """The squared error in the norm."""
        hat_a, hat_b = a.factor(self.a.layout), b.factor(self.b.layout)
        cross = _dot(hat_a @ _t(self.heavy_a), hat_b @ _t(self.heavy_b))
        return self.norm - 2 * cross + _dot(hat_a @ _t(self.a.apply(hat_a)), hat_b @ _t(self.b.apply(hat_b)))

    def half_step(self, gram: Array, cross: Array, side: Side, norm: _Norm, target: Array) -> Side:
        """Lower the error over one side, the other given by K = X^ G X^^T and L = X^ G X0^T; exact without moments."""
        layout, shared = norm.layout, side.chunk.shape[1]
        own, both = ridged(gram[:, shared:, shared:]), gram[:, shared:, :shared]
        through = np.linalg.solve(own, both)
        schur = gram[:, :shared, :shared] - _t(both) @ through
        residual = cross @ target - gram @ side.factor(layout)
        change = np.zeros_like(side.chunk)
        if shared:
            right = residual[:, :shared] - _t(through) @ residual[:, shared:]
            change = self._solve(schur, layout.gather(self._shape(norm.apply(right), layout)), norm)
        moved = layout.expand(change)
        rest = residual[:, shared:] - both @ moved.reshape(1, shared, layout.copies * layout.width)
        return Side(side.chunk + change, side.unshared + np.linalg.solve(own, rest).reshape(side.unshared.shape))

    @staticmethod
    def _shape(x: Array, layout: Layout) -> Array:
        return layout.cut(x.reshape(1, x.shape[1], layout.copies, layout.width))

    def _solve(self, schur: Array, right: Array, norm: _Norm) -> Array:
        """The chunk's change, by preconditioned conjugate gradients from zero; never raises the error."""
        layout = norm.layout
        if norm.moments is None:
            change = np.linalg.solve(ridged(layout.gram(schur, layout.copies)), right[:, :, : layout.full])
            if layout.full < layout.width:
                tail = np.linalg.solve(ridged(layout.gram(schur, layout.copies - 1)), right[:, :, layout.full :])
                change = np.concatenate([change, tail], axis=2)
            return change
        x = np.zeros_like(right)
        ranks = norm.inverted(schur)
        z = norm.precondition(ranks, right)
        p, rho = z, _dot(right, z)
        first = rho
        for _ in range(INNER):
            if rho <= 1e-10 * first or rho <= 0:
                break
            spread = layout.expand(p).reshape(1, p.shape[1], layout.copies * layout.width)
            product = layout.gather(self._shape(schur @ norm.apply(spread), layout))
            curvature = _dot(p, product)
            if curvature <= 0:
                break
            step = rho / curvature
            x += step * p
            right = right - step * product
            z = norm.precondition(ranks, right)
            rho, last = _dot(right, z), rho
            p = z + rho / last * p
        return x

    def rounds(self, a: Side, b: Side, most: int) -> tuple[Side, Side, float]:
        """Up to `most` rounds, as `als.Batch.rounds`; the error never rises."""
        best = self.error(a, b)
        history, before, step, cap = [best], b, 0.0, 1.0
        for _ in range(most):
            if best <= 1e-15 * self.norm:
                break
            guess = b.ahead(before, np.asarray([step]))
            hat = guess.factor(self.b.layout)
            new_a = self.half_step(hat @ _t(self.b.apply(hat)), hat @ _t(self.heavy_b), a, self.a, self.target_a)
            hat_a = new_a.factor(self.a.layout)
            gram, cross = hat_a @ _t(self.a.apply(hat_a)), hat_a @ _t(self.heavy_a)
            new_b = self.half_step(gram, cross, guess, self.b, self.target_b)
            hat_b = new_b.factor(self.b.layout)
            error = self.norm - 2 * _dot(cross, hat_b @ _t(self.heavy_b)) + _dot(gram, hat_b @ _t(self.b.apply(hat_b)))
            if error <= best:
                before, best = b, error
                a, b = balanced(new_a, new_b)
                step = max(min(step * 1.2, cap), 0.5)
                cap = min(cap * 1.05, 3.0)
            else:
                before, cap, step = b, max(step, 0.5), step / 2
            history.append(best)
            if len(history) > PATIENCE and history[-1 - PATIENCE] - best <= TOLERANCE * best:
                break
        return a, b, best

    def fit(self, starts: Sequence[tuple[Side, Side]], rounds: int = ROUNDS) -> tuple[Side, Side, float]:
        """A few rounds from every start, then the best to its end."""
        tried = [self.rounds(a, b, min(TRIAL_ROUNDS, rounds) if len(starts) > 1 else 0) for a, b in starts]
        a, b, _ = min(tried, key=lambda t: t[2])
        return self.rounds(a, b, rounds)


def _t(x: Array) -> Array:
    return x.transpose(0, 2, 1)
