"""LoRA factors -> PRoLoRA factors, with the error of dW and that of the truncated SVD of the same size.

All matrices are rank-first: `a` is A, (r, in), and `bt` is B transposed, (r, out), so dW = bt.T @ a times the
scaling, which these maps never touch. Nothing here builds a dense dW: errors come from r x r Gram matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prolora_tools.core.sharing import expand, project

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from prolora_tools.core.geometry import Geometry

    Matrix = npt.NDArray[np.float64]
    AnyMatrix = npt.NDArray[np.floating[Any]]

Method = Literal["average", "align"]
METHODS: tuple[Method, ...] = ("average", "align")


@dataclass(frozen=True)
class SharedFactors:
    """The stored arrays of one PRoLoRA module, rank-first.

    Attributes:
        a_chunk: (r_s, ceil(in / m)).
        b_chunk: (r_s, ceil(out / n)), the transpose of what is stored on disk.
        a_unshared: (u, in).
        b_unshared: (u, out), the transpose of what is stored on disk.
    """

    a_chunk: AnyMatrix
    b_chunk: AnyMatrix
    a_unshared: AnyMatrix
    b_unshared: AnyMatrix

    def map(self, change: Callable[[AnyMatrix], AnyMatrix]) -> SharedFactors:
        """The same module with `change` applied to every array, such as a rounding to the stored dtype."""
        return SharedFactors(
            change(self.a_chunk), change(self.b_chunk), change(self.a_unshared), change(self.b_unshared)
        )

    def expanded(self, geometry: Geometry) -> tuple[AnyMatrix, AnyMatrix]:
        """Full factors in the official order, shared ranks first: A (r, in) and B transposed (r, out)."""
        in_features, out_features = self.a_unshared.shape[1], self.b_unshared.shape[1]
        a = np.concatenate([expand(self.a_chunk, geometry.a, in_features), self.a_unshared])
        bt = np.concatenate([expand(self.b_chunk, geometry.b, out_features), self.b_unshared])
        return a, bt


@dataclass(frozen=True)
class Quality:
    """How well one module was compressed; all norms are Frobenius norms without the scaling.

    Attributes:
        method: the method that made it.
        error: of B A - B^ A^.
        norm: of B A.
        svd_rank: the largest rank whose plain LoRA has no more parameters.
        svd_error: of B A minus its truncated SVD of that rank.
    """

    method: Method
    error: float
    norm: float
    svd_rank: int
    svd_error: float


def product_norm(a: Matrix, bt: Matrix) -> float:
    """Frobenius norm of bt.T @ a through the two Gram matrices: sqrt(tr(B^T B A A^T))."""
    return float(np.sqrt(max(float(np.sum((bt @ bt.T) * (a @ a.T))), 0.0)))


def difference_norm(a: AnyMatrix, bt: AnyMatrix, a_hat: AnyMatrix, bt_hat: AnyMatrix) -> float:
    """Frobenius norm of bt.T @ a - bt_hat.T @ a_hat, of possibly different ranks, in float64.

    Written as (B - B^) A + B^ (A - A^), so that equal factors give exactly 0 and near ones no cancellation.
    """
    rank = max(a.shape[0], a_hat.shape[0])
    a, bt, a_hat, bt_hat = (_padded(x, rank) for x in (a, bt, a_hat, bt_hat))
    return product_norm(np.concatenate([a, a - a_hat]), np.concatenate([bt - bt_hat, bt_hat]))


def _padded(rows: AnyMatrix, rank: int) -> Matrix:
    """`rows` in float64, with rows of zeros up to `rank`."""
    return np.concatenate([rows.astype(np.float64), np.zeros((rank - rows.shape[0], rows.shape[1]))])


def svd_basis(a: AnyMatrix, bt: AnyMatrix) -> tuple[Matrix, Matrix, Matrix]:
    """The SVD of B A, without forming it.

    Each singular pair's sign makes the largest entry of its right vector positive, so that the result does not
    depend on the LAPACK at hand.

    Args:
        a: A, (r, in).
        bt: B transposed, (r, out).

    Returns:
        Left vectors as rows (k, out), singular values (k,), right vectors as rows (k, in), k <= r, float64.
    """
    q_b, r_b = np.linalg.qr(bt.T.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    left, values, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    ut, vt = left.T @ q_b.T, right @ q_a.T
    sign = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)])
    sign[sign == 0] = 1.0
    return ut * sign[:, None], values, vt * sign[:, None]


def _split(a: AnyMatrix, bt: AnyMatrix, unshared: Sequence[int], geometry: Geometry) -> SharedFactors:
    """Keep the ranks `unshared` whole and average the chunks of the others, in their stored order."""
    kept = sorted(unshared)
    shared = [k for k in range(a.shape[0]) if k not in set(kept)]
    return SharedFactors(
        project(a[shared], geometry.a),
        project(bt[shared], geometry.b),
        a[kept].astype(np.float64),
        bt[kept].astype(np.float64),
    )


def average(a: AnyMatrix, bt: AnyMatrix, geometry: Geometry) -> SharedFactors:
    """Chunk averaging in the stored basis; the unshared ranks are those that sharing would cost most.

    The cost of rank k is its residual energy under sharing, |b_k|^2 |a_k - a^_k|^2 + |b_k - b^_k|^2 |a_k|^2.
    The official layout, unshared ranks last, is tried too and wins ties, so a factor pair that already has
    this structure comes back bit for bit.

    Args:
        a: A, (r, in), with r the geometry's rank.
        bt: B transposed, (r, out).
        geometry: the shape to compress into.
    """
    last = _split(a, bt, range(geometry.shared, geometry.rank), geometry)
    if geometry.unshared in {0, geometry.rank}:
        return last
    energies = np.zeros(geometry.rank)
    for side, other, sharing in ((a, bt, geometry.a), (bt, a, geometry.b)):
        everything = type(sharing)(geometry.rank, sharing.chunks, sharing.stride)
        full = side.astype(np.float64)
        residual = full - expand(project(full, everything), everything, full.shape[1])
        energies += np.sum(np.square(other, dtype=np.float64), axis=1) * np.sum(residual**2, axis=1)
    costly = np.argsort(-energies, kind="stable")[: geometry.unshared]
    chosen = _split(a, bt, [int(k) for k in costly], geometry)
    errors = [difference_norm(a, bt, *candidate.expanded(geometry)) for candidate in (last, chosen)]
    return last if errors[0] <= errors[1] else chosen


def align(a: AnyMatrix, bt: AnyMatrix, geometry: Geometry) -> SharedFactors:
    """Chunk averaging in the SVD basis of B A, the top u directions unshared, singular values split evenly.

    Args:
        a: A, (r, in), with r the geometry's rank.
        bt: B transposed, (r, out).
        geometry: the shape to compress into.
    """
    ut, values, vt = svd_basis(a, bt)
    root = np.sqrt(values)[:, None]
    return _split(
        _padded(root * vt, geometry.rank), _padded(root * ut, geometry.rank), range(geometry.unshared), geometry
    )


def fit(
    a: AnyMatrix,
    bt: AnyMatrix,
    geometry: Geometry,
    *,
    method: Method | None = None,
    store: Callable[[AnyMatrix], AnyMatrix] = lambda x: x,
) -> tuple[SharedFactors, Quality]:
    """Compress one module and tell the error of what will be stored.

    Args:
        a: A, (r, in), with r the geometry's rank.
        bt: B transposed, (r, out).
        geometry: the shape to compress into.
        method: `average` or `align`; None takes the one with the smaller error, `average` on a tie.
        store: the rounding to the stored dtype, whose error is counted in.
    """
    makers = {"average": average, "align": align}
    tried: list[tuple[float, Method, SharedFactors]] = []
    for name in METHODS if method is None else (method,):
        factors = makers[name](a, bt, geometry).map(store)
        tried.append((difference_norm(a, bt, *factors.expanded(geometry)), name, factors))
        if tried[-1][0] == 0.0:
            break
    error, name, factors = min(tried, key=lambda t: t[0])
    values = svd_basis(a, bt)[1]
    parameters = geometry.parameters(a.shape[1], bt.shape[1])
    svd_rank = min(parameters // (a.shape[1] + bt.shape[1]), len(values))
    svd_error = float(np.linalg.norm(values[svd_rank:]))
    return factors, Quality(name, error, float(np.linalg.norm(values)), svd_rank, svd_error)
