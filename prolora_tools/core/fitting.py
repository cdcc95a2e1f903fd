"""LoRA factors -> PRoLoRA factors, with the error of dW and that of the truncated SVD of the same size.

All matrices are rank-first: `a` is A, (r, in), and `bt` is B transposed, (r, out), so dW = bt.T @ a times the
scaling, which these maps never touch. Nothing here builds a dense dW: errors come from r x r Gram matrices.

With moments the norm is |G^1/2 (B A - B^ A^) C^1/2|: C the second moments of the layer's inputs, G those of the
gradients of its outputs. A None among them is the identity.

Least squares shortens: of the adapter's effect along its own direction it keeps 1 - x, x the squared relative error.
The loss feels that in first order, as training went that way, and the norm hardly at all. So what is fitted, or
cut off, with moments is made longer by 1 + x: 1 - x^2 is kept, at a squared relative error of x + x^2 - x^3. On request
every singular direction of dW gets its own length back, as the weak ones lose most: at a larger error in the norm, and,
where training went on in those directions, a smaller loss.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prolora_tools.core import als, weighted
from prolora_tools.core.als import Batch, Layout, stride_candidates
from prolora_tools.core.sharing import expand, project
from prolora_tools.core.weighted import WeightedFit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from prolora_tools.core.geometry import Geometry, Sharing
    from prolora_tools.core.moments import Moments

    Matrix = npt.NDArray[np.floating[Any]]
    Pair = tuple[Moments | None, Moments | None]
    AnyMatrix = npt.NDArray[np.floating[Any]]

Method = Literal["average", "align", "fit"]
METHODS: tuple[Method, ...] = ("average", "align", "fit")
Lengthen = Literal["whole", "directions"]
LENGTHEN: tuple[Lengthen, ...] = ("whole", "directions")
NO_MOMENTS: Pair = (None, None)
_DIRECTION_STEPS, _DIRECTION_ROUNDS = 3, 15
"""How often the directions' lengths are set, and rounds of fitting after each."""
CLEARLY = 0.98
"""Other strides than asked for are taken where they leave less than this share of the squared error."""


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
        calibrated_error: of B A - B^ A^ in the norm of the moments; equal to `error` without moments.
        values: the singular values of B A, largest first.
        calibrated_values: those in the norm of the moments.
        calibrated: whether there are moments.
    """

    method: Method
    error: float
    calibrated_error: float
    values: tuple[float, ...]
    calibrated_values: tuple[float, ...]
    calibrated: bool

    @property
    def norm(self) -> float:
        """Of B A."""
        return float(np.linalg.norm(self.values))

    @property
    def calibrated_norm(self) -> float:
        """Of B A in the norm of the moments."""
        return float(np.linalg.norm(self.calibrated_values))

    def svd_error(self, rank: int) -> float:
        """Of B A minus its truncated SVD of `rank`."""
        return float(np.linalg.norm(self.values[rank:]))

    def svd_calibrated_error(self, rank: int) -> float:
        """Of the LoRA of `rank` that `fit` makes in the norm of the moments."""
        error, norm = float(np.linalg.norm(self.calibrated_values[rank:])), self.calibrated_norm
        if not self.calibrated or not norm:
            return error
        x = (error / norm) ** 2
        return norm * float(np.sqrt(x + x**2 - x**3))


def product_norm(a: Matrix, bt: Matrix) -> float:
    """Frobenius norm of bt.T @ a through the two Gram matrices: sqrt(tr(B^T B A A^T))."""
    return float(np.sqrt(max(float(np.sum((bt @ bt.T) * (a @ a.T))), 0.0)))


def difference_norm(
    a: AnyMatrix, bt: AnyMatrix, a_hat: AnyMatrix, bt_hat: AnyMatrix, moments: Pair = NO_MOMENTS
) -> float:
    """Norm of bt.T @ a - bt_hat.T @ a_hat, of possibly different ranks, in float64: Frobenius, or of the moments.

    Written as (B - B^) A + B^ (A - A^), so that equal factors give exactly 0 and near ones no cancellation.
    """
    rank = max(a.shape[0], a_hat.shape[0])
    a, bt, a_hat, bt_hat = (_padded(x, rank) for x in (a, bt, a_hat, bt_hat))
    rows_a, rows_b = np.concatenate([a, a - a_hat]), np.concatenate([bt - bt_hat, bt_hat])
    grams = _gram(rows_a, moments[0]), _gram(rows_b, moments[1])
    square, scale = float(np.sum(grams[0] * grams[1])), float(np.trace(grams[0]) * np.trace(grams[1]))
    if square < 1e-10 * scale:  # the sum has cancelled; triangular factors do not square before they cancel
        (q_a, r_a), (q_b, r_b) = np.linalg.qr(rows_a.T), np.linalg.qr(rows_b.T)
        core = r_b @ r_a.T
        if moments == NO_MOMENTS:
            return float(np.linalg.norm(core))
        square = float(np.sum((_gram(q_b.T, moments[1]) @ core) * (core @ _gram(q_a.T, moments[0]))))
    return float(np.sqrt(max(square, 0.0)))


def _heavy(rows: AnyMatrix, moments: Moments | None) -> AnyMatrix:
    """Rows times the moments; None is the identity."""
    return rows if moments is None else moments.apply(rows)


def _gram(rows: Matrix, moments: Moments | None) -> Matrix:
    out: Matrix = rows @ _heavy(rows, moments).T
    return out


def _padded(rows: AnyMatrix, rank: int) -> Matrix:
    """`rows` in float64, with rows of zeros up to `rank`."""
    if rows.shape[0] == rank:
        return rows.astype(np.float64, copy=False)
    return np.concatenate([rows.astype(np.float64), np.zeros((rank - rows.shape[0], rows.shape[1]))])


def _core(a: AnyMatrix, bt: AnyMatrix) -> Matrix:
    """A small matrix with the singular values of B A, from the triangles of both factors, in float64."""
    triangles: list[Any] = [np.linalg.qr(x.T.astype(np.float64), mode="r") for x in (bt, a)]  # typed as QRResult
    out: Matrix = triangles[0] @ triangles[1].T
    return out


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


def _at_rank(a: AnyMatrix, bt: AnyMatrix, rank: int) -> tuple[AnyMatrix, AnyMatrix]:
    """The pair as `rank` rows: as it is, with zeros behind, or its truncated SVD with the values split evenly."""
    if a.shape[0] == rank:
        return a, bt
    if a.shape[0] < rank:
        return _padded(a, rank), _padded(bt, rank)
    ut, values, vt = svd_basis(a, bt)
    root = np.sqrt(values)[:rank, None]
    return _padded(root * vt[:rank], rank), _padded(root * ut[:rank], rank)


def average(a: AnyMatrix, bt: AnyMatrix, geometry: Geometry) -> SharedFactors:
    """Chunk averaging in the stored basis; the unshared ranks are those that sharing would cost most.

    The cost of rank k is its residual energy under sharing, |b_k|^2 |a_k - a^_k|^2 + |b_k - b^_k|^2 |a_k|^2.
    The official layout, unshared ranks last, is tried too and wins ties, so a factor pair that already has
    this structure comes back bit for bit.

    Args:
        a: A, (r, in).
        bt: B transposed, (r, out).
        geometry: the shape to compress into; where its rank is not r, zeros are added or the SVD is cut off.
    """
    a, bt = _at_rank(a, bt, geometry.rank)
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

    An SVD leaves the sign of every singular pair open; they are chosen so that averaging keeps more.

    Args:
        a: A, (r, in).
        bt: B transposed, (r, out).
        geometry: the shape to compress into; its rank need not be r.
    """
    ut, values, vt = svd_basis(a, bt)
    root = np.sqrt(values)[: geometry.rank, None]
    rows_a, rows_b = (_padded(root * x[: geometry.rank], geometry.rank) for x in (vt, ut))
    u = geometry.unshared
    signs = np.concatenate([np.ones(u), _signs([(rows_a[u:], geometry.a), (rows_b[u:], geometry.b)])])[:, None]
    rows_a, rows_b = rows_a * signs, rows_b * signs
    return _split(rows_a, rows_b, range(u), geometry)


def _signs(sides: Sequence[tuple[Matrix, Sharing]]) -> Matrix:
    """Signs of the ranks, (r_s,): averaging would keep no more of both sides' energy with another sign of any one."""
    shared = len(sides[0][0])
    meet = np.zeros((shared, shared))  # what ranks k and l bring where they are averaged with one another
    for rows, sharing in sides:
        layout = Layout.of(sharing, rows.shape[1])
        parts = layout.split(rows[None])[0]
        held = np.bincount(np.arange(rows.shape[1]) % layout.width)
        back = np.argsort(layout.rows, axis=1)  # the rank behind every row of the chunk
        for i, j in itertools.combinations(range(layout.copies), 2):
            np.add.at(meet, (back[i], back[j]), np.sum(parts[back[i], i] * parts[back[j], j] / held, axis=1))
    meet += meet.T
    np.fill_diagonal(meet, 0.0)
    signs, least = np.ones(shared), -1e-9 * np.abs(meet).sum(axis=1)
    moved = True
    while moved:  # every flip raises the energy, so this ends
        moved = False
        for k in range(shared):
            if signs[k] * (meet[k] @ signs) < least[k]:
                signs[k], moved = -signs[k], True
    return signs


def truncated(a: AnyMatrix, bt: AnyMatrix, rank: int, moments: Pair = NO_MOMENTS) -> tuple[Matrix, Matrix, Matrix]:
    """The best LoRA of rank `rank` in the norm of the moments, and all singular values of B A in that norm.

    With roots of the Gram matrices A C A^T = L_A L_A^T and B^T G B = L_B L_B^T, the values are those of L_B^T L_A.

    Returns:
        A, (rank, in), and B transposed, (rank, out), scaled to equal row norms in the norm, and the values (r,).
    """
    a, bt = a.astype(np.float64), bt.astype(np.float64)
    (root_a, back_a), (root_b, back_b) = (_root(_gram(x, m)) for x, m in zip((a, bt), moments, strict=True))
    left, values, right = np.linalg.svd(root_b.T @ root_a)
    even = np.sqrt(values)[:rank, None]
    return even * (right[:rank] @ back_a @ a), even * (left.T[:rank] @ back_b @ bt), values


def _root(gram: Matrix) -> tuple[Matrix, Matrix]:
    """L with L L^T = gram, and its pseudo-inverse."""
    values, vectors = np.linalg.eigh(gram)
    root = np.sqrt(np.maximum(values, 0.0))
    inverse = np.divide(1.0, root, where=root > 1e-12 * root.max(initial=0.0), out=np.zeros_like(root))
    return vectors * root, (vectors * inverse).T


def fit(
    a: AnyMatrix,
    bt: AnyMatrix,
    geometry: Geometry,
    *,
    method: Method | None = None,
    store: Callable[[AnyMatrix], AnyMatrix] = lambda x: x,
    moments: Pair = NO_MOMENTS,
    lengthen: Lengthen = "whole",
) -> tuple[SharedFactors, Quality]:
    """Compress one module and tell the error of what will be stored.

    Args:
        a: A, (r, in).
        bt: B transposed, (r, out).
        geometry: the shape to compress into; its rank need not be r.
        method: `average`, `align`, or `fit`: alternating least squares from both and from the spectral start, never
            worse than either. None takes the one with the smallest error, the simpler on a tie.
        store: the rounding to the stored dtype, whose error is counted in.
        moments: of inputs and output gradients: the norm to be small in.
        lengthen: what of a calibrated fit gets its length back: dW as a whole, or every singular direction of it.
    """
    return fit_many([(a, bt)], geometry, method=method, store=store, moments=[moments], lengthen=lengthen)[0]


def fit_many(
    pairs: Sequence[tuple[AnyMatrix, AnyMatrix]],
    geometry: Geometry,
    *,
    method: Method | None = None,
    store: Callable[[AnyMatrix], AnyMatrix] = lambda x: x,
    moments: Sequence[Pair] | None = None,
    lengthen: Lengthen = "whole",
    quick: bool = False,
) -> list[tuple[SharedFactors, Quality]]:
    """`fit` for modules of one shape; without moments they run as one batch, with the same result.

    Args:
        pairs: A (r, in) and B transposed (r, out) of each.
        geometry: the shape to compress into.
        method: as for `fit`.
        store: as for `fit`.
        moments: of each module.
        lengthen: as for `fit`.
        quick: a few rounds only, to compare shapes.
    """
    norms = [NO_MOMENTS] * len(pairs) if moments is None else list(moments)
    simple = [_simple(a, bt, geometry, method, store, m) for (a, bt), m in zip(pairs, norms, strict=True)]
    tried = [found for found, _ in simple]
    if method in {None, "fit"} and not geometry.is_lora:
        unsolved = [i for i, found in enumerate(tried) if min(t[0] for t in found) > 0.0]
        starts = [simple[i][1] for i in unsolved]
        made = [pairs[i] for i in unsolved], geometry, starts, [norms[i] for i in unsolved]
        for i, factors in zip(unsolved, _als(*made, lengthen=lengthen, quick=quick), strict=True):
            rounded = _lengthened(factors, pairs[i], geometry, norms[i]).map(store)
            tried[i].append((_error(pairs[i], rounded, geometry, norms[i]), len(METHODS), "fit", rounded))
    elif method in {None, "fit"} and geometry.unshared == geometry.rank:
        for i, norm in enumerate(norms):
            if min(t[0] for t in tried[i]) > 0.0:
                rounded = _lengthened(_whole(*pairs[i], geometry, norm), pairs[i], geometry, norm).map(store)
                tried[i].append((_error(pairs[i], rounded, geometry, norm), len(METHODS), "fit", rounded))
    results = []
    for (a, bt), found, norm in zip(pairs, tried, norms, strict=True):
        error, _, name, factors = min(found, key=lambda t: t[:2])
        values = tuple(np.linalg.svd(_core(a, bt), compute_uv=False).tolist())
        plain = norm == NO_MOMENTS
        quality = Quality(
            method=method or name,
            error=error if plain else _error((a, bt), factors, geometry, NO_MOMENTS),
            calibrated_error=error,
            values=values,
            calibrated_values=values if plain else tuple(truncated(a, bt, 0, norm)[2].tolist()),
            calibrated=not plain,
        )
        results.append((factors, quality))
    return results


def _whole(a: AnyMatrix, bt: AnyMatrix, geometry: Geometry, moments: Pair) -> SharedFactors:
    """With nothing shared the optimum is the truncated SVD in the norm."""
    a_hat, bt_hat, _ = truncated(a, bt, geometry.rank, moments)
    return _split(_padded(a_hat, geometry.rank), _padded(bt_hat, geometry.rank), range(geometry.rank), geometry)


def length(a: AnyMatrix, bt: AnyMatrix, a_hat: AnyMatrix, bt_hat: AnyMatrix, moments: Pair) -> float:
    """1 + x, where x is the share of dW's own component that B^ A^ lacks in the norm; 1 without moments.

    For the least-squares solution x is its squared relative error. The Frobenius norm says too little about what
    matters: in it a longer dW^ is better on some adapters and worse on others.
    """
    if moments == NO_MOMENTS:
        return 1.0
    heavy_a, heavy_b = _heavy(a, moments[0]), _heavy(bt, moments[1])
    square = float(np.sum((heavy_a @ a.T) * (heavy_b @ bt.T)))
    own = float(np.sum((heavy_a @ a_hat.T) * (heavy_b @ bt_hat.T)))
    return 1.0 + min(max(1.0 - own / square, 0.0), 1.0) if square > 0 else 1.0


def _lengthened(
    factors: SharedFactors, pair: tuple[AnyMatrix, AnyMatrix], geometry: Geometry, moments: Pair
) -> SharedFactors:
    factor = length(*pair, *factors.expanded(geometry), moments)
    return replace(factors, b_chunk=factors.b_chunk * factor, b_unshared=factors.b_unshared * factor)


Tried = tuple[float, int, Method, SharedFactors]


def _simple(
    a: AnyMatrix,
    bt: AnyMatrix,
    geometry: Geometry,
    method: Method | None,
    store: Callable[[AnyMatrix], AnyMatrix],
    moments: Pair,
) -> tuple[list[Tried], list[SharedFactors]]:
    """Averages as asked for, both where they are starts of `fit`, rounded and not; an exact one ends the search."""
    tried: list[Tried] = []
    made: list[SharedFactors] = []
    makers: dict[Method, Callable[..., SharedFactors]] = {"average": average, "align": align}
    for number, (name, make) in enumerate(makers.items()):
        if method in {None, "fit", name}:
            made.append(make(a, bt, geometry))
            factors = made[-1].map(store)
            tried.append((_error((a, bt), factors, geometry, moments), number, name, factors))
            if tried[-1][0] == 0.0:
                break
    return tried, made


def _error(pair: tuple[AnyMatrix, AnyMatrix], factors: SharedFactors, geometry: Geometry, moments: Pair) -> float:
    """The error of rounded factors; infinite where the stored dtype does not hold them, so that others win."""
    error = difference_norm(*pair, *factors.expanded(geometry), moments)
    return error if np.isfinite(error) else np.inf


def _als(
    pairs: Sequence[tuple[AnyMatrix, AnyMatrix]],
    geometry: Geometry,
    starts: Sequence[Sequence[SharedFactors]],
    moments: Sequence[Pair],
    *,
    lengthen: Lengthen,
    quick: bool,
) -> list[SharedFactors]:
    """Alternating least squares: unweighted as a batch, and from there, module by module, in the norm of moments."""
    if not pairs:
        return []
    batch = Batch(
        np.stack([a for a, _ in pairs]).astype(np.float64), np.stack([b for _, b in pairs]).astype(np.float64), geometry
    )
    begun = []
    for number in range(len(starts[0])):
        arrays = [s[number] for s in starts]
        begun.append(batch.start(*(np.stack(x).astype(np.float64) for x in zip(*map(_arrays, arrays), strict=True))))
    if (closed := batch.spectral()) is not None:
        begun.append(closed)
    made = batch.fit(begun, 0 if quick else als.ROUNDS)
    fitted = [_factors(arrays) for arrays in zip(*batch.finish(made[0], made[1]), strict=True)]
    for i, norm in enumerate(moments):
        if norm != NO_MOMENTS:
            begin = [fitted[i]] if quick else [fitted[i], *starts[i]]
            rounds = weighted.TRIAL_ROUNDS if quick else weighted.ROUNDS
            fitted[i] = _weighted(pairs[i], geometry, begin, norm, rounds, lengthen)
    return fitted


def _weighted(
    pair: tuple[AnyMatrix, AnyMatrix],
    geometry: Geometry,
    starts: Sequence[SharedFactors],
    moments: Pair,
    rounds: int,
    lengthen: Lengthen = "whole",
) -> SharedFactors:
    problem = WeightedFit(pair[0].astype(np.float64), pair[1].astype(np.float64), geometry, moments)
    factors = _solved(problem, starts, rounds)
    return _by_directions(problem, factors, pair, geometry, moments) if lengthen == "directions" else factors


def _solved(problem: WeightedFit, starts: Sequence[SharedFactors], rounds: int) -> SharedFactors:
    begun = [problem.start(*(x.astype(np.float64) for x in _arrays(s))) for s in starts]
    a, b, _ = problem.fit(begun, rounds)
    return _factors(problem.finish(a, b))


def _by_directions(
    problem: WeightedFit, factors: SharedFactors, pair: tuple[AnyMatrix, AnyMatrix], geometry: Geometry, moments: Pair
) -> SharedFactors:
    """Fitted to a dW whose singular directions, in the norm, are longer by what the fit lacks of each, up to twice."""
    parts_a, parts_b, values = truncated(*pair, pair[0].shape[0], moments)
    heavy_a, heavy_b = _heavy(parts_a, moments[0]), _heavy(parts_b, moments[1])
    there = values > 1e-9 * values.max(initial=0.0)
    more = np.zeros(len(values))
    for _ in range(_DIRECTION_STEPS):
        a_hat, bt_hat = factors.expanded(geometry)
        own = np.sum((heavy_a @ a_hat.T) * (heavy_b @ bt_hat.T), axis=1)
        kept = np.divide(own, values**2, where=there, out=np.ones_like(own))  # what is not there lacks nothing
        more = np.clip(more + 1.0 - kept, 0.0, 1.0)
        root = np.sqrt(1.0 + more)[:, None]
        problem.aim(root * parts_a, root * parts_b)
        factors = _solved(problem, [factors], _DIRECTION_ROUNDS)
    return factors


@dataclass(frozen=True)
class Sample:
    """A module by which strides are chosen.

    Attributes:
        a: A, (r, in).
        bt: B transposed, (r, out).
        geometry: its shape, with the strides to compare with.
        weight: the square of its scaling.
        moments: its norm.
    """

    a: AnyMatrix
    bt: AnyMatrix
    geometry: Geometry
    weight: float
    moments: Pair = NO_MOMENTS


def choose_strides(samples: Sequence[Sample], most: int = 8) -> tuple[int, int]:
    """The strides that leave the smallest total error, of `most` candidates and after a few rounds each.

    Args:
        samples: modules of one shared rank and one number of chunks.
        most: candidates, the samples' own strides among them, which are kept unless another is clearly better.
    """
    candidates = stride_candidates(samples[0].geometry, most)
    totals = dict.fromkeys(candidates, 0.0)
    for sample in samples:
        a, bt = sample.a.astype(np.float64), sample.bt.astype(np.float64)
        batch = Batch(a[None], bt[None], sample.geometry)
        for pair in candidates:
            geometry = replace(sample.geometry, stride_a=pair[0], stride_b=pair[1])
            factors = _trial(batch.restrided(geometry), a, bt, geometry, sample.moments)
            error = difference_norm(a, bt, *factors.expanded(geometry), sample.moments)
            totals[pair] += sample.weight * error**2
    best = min(candidates, key=lambda pair: totals[pair])
    return best if totals[best] < CLEARLY * totals[candidates[0]] else candidates[0]


def _trial(batch: Batch, a: Matrix, bt: Matrix, geometry: Geometry, moments: Pair) -> SharedFactors:
    """A short fit of one module."""
    simple = [make(a, bt, geometry) for make in (average, align)]
    begun = [batch.start(*(x.astype(np.float64)[None] for x in _arrays(s))) for s in simple]
    if (closed := batch.spectral()) is not None:
        begun.append(closed)
    made = batch.fit(begun, 0)
    factors = _factors(tuple(x[0] for x in batch.finish(made[0], made[1])))
    return factors if moments == NO_MOMENTS else _weighted((a, bt), geometry, [factors], moments, weighted.TRIAL_ROUNDS)


def _arrays(factors: SharedFactors) -> tuple[AnyMatrix, ...]:
    """In the order of the solvers: A's chunk and unshared part, then B's."""
    return factors.a_chunk, factors.a_unshared, factors.b_chunk, factors.b_unshared


def _factors(arrays: tuple[AnyMatrix, ...]) -> SharedFactors:
    return SharedFactors(arrays[0], arrays[2], arrays[1], arrays[3])
