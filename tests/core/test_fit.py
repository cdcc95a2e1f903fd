"""`fit`: alternating least squares against dense least squares, closed forms, and the simpler methods."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prolora_tools.core.als import Batch, Layout, Side, half_step, stride_candidates
from prolora_tools.core.fitting import (
    Sample,
    SharedFactors,
    align,
    average,
    choose_strides,
    difference_norm,
    fit,
    fit_many,
)
from prolora_tools.core.geometry import Geometry

Array = np.ndarray[Any, np.dtype[np.float64]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, int, int, int, int]:
    """A geometry with any strides, the rank of the LoRA, hidden dims and a seed."""
    rank = draw(st.integers(1, 6))
    strides = [draw(st.none() | st.integers(0, 6)) for _ in range(2)]
    geometry = Geometry(rank, draw(st.integers(0, rank)), draw(st.integers(1, 5)), draw(st.integers(1, 5)), *strides)
    dims = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    return geometry, draw(st.integers(1, 6)), *dims, draw(st.integers(0, 2**32 - 1))


def pair(rank: int, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rank, in_features)), rng.standard_normal((rank, out_features))


def design(layout: Layout, geometry: Geometry, other: Array, dim: int) -> Array:
    """The dense matrix from one side's unknowns (chunk, then unshared) to vec(X^ as (dim, out of the other side))."""
    shared, width = geometry.shared, layout.width
    columns = []
    for k, c in itertools.product(range(shared), range(width)):
        chunk = np.zeros((1, shared, width))
        chunk[0, k, c] = 1
        columns.append((layout.join(layout.expand(chunk))[0].T @ other[:shared]).ravel())
    for k, c in itertools.product(range(geometry.unshared), range(dim)):
        full = np.zeros((dim, other.shape[1]))
        full[c] = other[shared + k]
        columns.append(full.ravel())
    return np.array(columns).T


@given(cases())
def test_a_half_step_is_the_least_squares_solution(case: tuple[Geometry, int, int, int, int]) -> None:
    geometry, rank, in_features, out_features, seed = case
    a, bt = pair(rank, in_features, out_features, seed)
    other = np.random.default_rng(seed + 1).standard_normal((geometry.rank, out_features))
    layout = Layout.of(geometry.a, in_features)
    zero = Side(
        np.zeros((1, geometry.shared, layout.width)), np.zeros((1, geometry.unshared, layout.copies, layout.width))
    )
    target = layout.split(a[None]).reshape(1, rank, -1)
    side = zero
    for _ in range(5):  # more than once: the ridge leaves a little in directions that hardly matter
        side = half_step((other @ other.T)[None], (other @ bt.T)[None], target, side, layout)
    found = layout.join(side.factor(layout).reshape(1, geometry.rank, layout.copies, layout.width))[0]
    matrix = design(layout, geometry, other, in_features)
    best = np.linalg.lstsq(matrix, (a.T @ bt).ravel(), rcond=None)[0]
    residual = np.linalg.norm(matrix @ best - (a.T @ bt).ravel())
    np.testing.assert_allclose(np.linalg.norm(found.T @ other - a.T @ bt), residual, rtol=1e-4, atol=1e-4)


@given(cases())
def test_never_worse_than_the_averages(case: tuple[Geometry, int, int, int, int]) -> None:
    geometry, rank, *dims, seed = case
    a, bt = pair(rank, dims[0], dims[1], seed)
    made, quality = fit(a, bt, geometry, method="fit")
    errors = [difference_norm(a, bt, *make(a, bt, geometry).expanded(geometry)) for make in (average, align)]
    assert quality.error <= min(errors)
    dense = np.linalg.norm(bt.T @ a - np.matmul(made.expanded(geometry)[1].T, made.expanded(geometry)[0]))
    np.testing.assert_allclose(quality.error, dense, rtol=1e-6, atol=1e-5)


@given(cases())
def test_rounds_never_raise_the_error(case: tuple[Geometry, int, int, int, int]) -> None:
    geometry, rank, *dims, seed = case
    a, bt = pair(rank, dims[0], dims[1], seed)
    batch = Batch(a[None], bt[None], geometry)
    closed = batch.spectral()
    assert closed is not None
    errors = [batch.rounds(np.arange(1), *closed, most)[2][0] for most in (0, 1, 2, 5, 20)]
    assert all(after <= before + 1e-12 * batch.norms[0] for before, after in itertools.pairwise(errors))


@given(cases())
def test_reduction_to_the_span_of_the_chunks_is_exact(case: tuple[Geometry, int, int, int, int]) -> None:
    """The error in coordinates is that of the full-size factors, and a start inside the span is kept."""
    geometry, rank, *dims, seed = case
    a, bt = pair(rank, dims[0], dims[1], seed)
    batch = Batch(a[None], bt[None], geometry)
    made = average(a, bt, geometry)
    sides = batch.start(*(x[None] for x in (made.a_chunk, made.a_unshared, made.b_chunk, made.b_unshared)))
    expected = difference_norm(a, bt, *made.expanded(geometry)) ** 2
    np.testing.assert_allclose(batch.errors(np.arange(1), *sides)[0], expected, rtol=1e-7, atol=1e-9 * batch.norms[0])
    back = batch.finish(*sides)
    again = SharedFactors(back[0][0], back[2][0], back[1][0], back[3][0])
    np.testing.assert_allclose(again.expanded(geometry)[0], made.expanded(geometry)[0], atol=1e-9)
    np.testing.assert_allclose(again.expanded(geometry)[1], made.expanded(geometry)[1], atol=1e-9)


@pytest.mark.parametrize(
    ("shared", "chunks", "strides"),
    [
        (8, (2, 2), (4, 2)),
        (4, (2, 2), (1, 2)),
        (6, (3, 2), (2, 1)),
        (6, (3, 3), (2, 2)),
        (9, (3, 3), (3, 1)),
        (5, (5, 5), (1, 3)),
    ],
)
def test_the_closed_form_is_the_optimum(shared: int, chunks: tuple[int, int], strides: tuple[int, int]) -> None:
    """Where shifts are met equally often: its error is that of the truncated SVDs, and many rounds find no better."""
    geometry = Geometry(shared, 0, *chunks, *strides)
    in_features, out_features = 12 * chunks[0], 7 * chunks[1]
    a, bt = pair(shared, in_features, out_features, 3)
    batch = Batch(a[None], bt[None], geometry)
    closed = batch.spectral()
    assert closed is not None
    error = batch.errors(np.arange(1), *closed)[0]
    # Oracle: blocks of dense dW averaged over equal shifts, transformed, and cut at rank g for every frequency.
    group = int(np.gcd.reduce([*strides, shared]))
    order = shared // group
    dense = bt.T @ a
    blocks: dict[int, list[Array]] = {e: [] for e in range(order)}
    for i, j in itertools.product(range(chunks[0]), range(chunks[1])):
        shift = (i * strides[0] - j * strides[1]) % shared // group
        blocks[shift].append(dense[j * 7 : (j + 1) * 7, i * 12 : (i + 1) * 12])
    count = len(blocks[0])
    assert all(len(b) == count for b in blocks.values())
    spread = sum(np.linalg.norm(x - np.mean(b, axis=0)) ** 2 for b in blocks.values() for x in b)
    spectrum = np.fft.fft(np.array([np.mean(b, axis=0) for b in blocks.values()]), axis=0, norm="ortho")
    tails = sum(np.sum(np.linalg.svd(x, compute_uv=False)[group:] ** 2) for x in spectrum)
    np.testing.assert_allclose(error, spread + count * tails, rtol=1e-9)
    assert batch.rounds(np.arange(1), *closed, 50)[2][0] >= error * (1 - 1e-9)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        start = batch.start(
            rng.standard_normal((1, shared, 12)),
            np.zeros((1, 0, in_features)),
            rng.standard_normal((1, shared, 7)),
            np.zeros((1, 0, out_features)),
        )
        assert batch.rounds(np.arange(1), *start, 300)[2][0] >= error * (1 - 1e-9)


def test_dw_made_from_chunks_is_found_again_in_any_basis() -> None:
    """u = 0, all blocks distinct: the closed form needs no structure in A and B themselves."""
    rng = np.random.default_rng(0)
    geometry = Geometry(8, 0, 2, 2, 4, 2)
    stored = SharedFactors(*(rng.standard_normal(s) for s in ((8, 20), (8, 15), (0, 40), (0, 30))))
    a, bt = stored.expanded(geometry)
    mixing = rng.standard_normal((8, 8))
    made = fit(mixing @ a, np.linalg.solve(mixing.T, bt), geometry)[1]
    assert made.method == "fit"
    assert made.error < 1e-6 * made.norm


def test_modules_fitted_together_are_fitted_as_alone() -> None:
    geometry = Geometry(4, 1, 3, 2)
    pairs = [pair(4, 31, 20, seed) for seed in range(5)]
    together = fit_many(pairs, geometry, method="fit")
    for (a, bt), (made, quality) in zip(pairs, together, strict=True):
        alone, other = fit(a, bt, geometry, method="fit")
        assert quality == other
        np.testing.assert_array_equal(made.a_chunk, alone.a_chunk)
        np.testing.assert_array_equal(made.b_unshared, alone.b_unshared)


def test_a_rank_above_the_adapters_own_is_used() -> None:
    a, bt = pair(2, 60, 60, 0)
    errors = [fit(a, bt, Geometry(rank, 0, 3, 3), method="fit")[1].error for rank in (2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_a_rank_below_the_adapters_own_is_no_better_than_the_svd() -> None:
    a, bt = pair(6, 40, 30, 0)
    quality = fit(a, bt, Geometry(3, 3, 1, 1))[1]
    np.testing.assert_allclose(quality.error, quality.svd_error(3), rtol=1e-9)


def test_zero_stays_zero() -> None:
    made, quality = fit(np.ones((3, 10)), np.zeros((3, 8)), Geometry(3, 1, 2, 2), method="fit")
    assert quality.error == quality.norm == 0.0
    assert not made.b_chunk.any()
    assert not made.b_unshared.any()


def test_factors_do_not_cancel_each_other() -> None:
    """With shifts 0, 1, 4, 5 of 8 the infimum lies at infinity; what is stored must not."""
    a, bt = pair(8, 40, 40, 1)
    made = fit(a, bt, Geometry(8, 0, 2, 2, 4, 1), method="fit")[0]
    a_hat, bt_hat = made.expanded(Geometry(8, 0, 2, 2, 4, 1))
    assert np.linalg.norm(a_hat) * np.linalg.norm(bt_hat) < 9 * np.linalg.norm(bt.T @ a)


@given(st.integers(1, 10), st.integers(1, 6), st.integers(1, 6))
def test_stride_candidates_meet_as_many_blocks_as_can_be(shared: int, m: int, n: int) -> None:
    geometry = Geometry(shared, 0, m, n)
    assume(not geometry.is_lora)
    found = stride_candidates(geometry, 4)
    assert found[0] == (geometry.a.stride, geometry.b.stride)
    assert len(found) == len(set(found)) <= 4

    def distinct(pair: tuple[int, ...]) -> int:
        return Geometry(shared, 0, m, n, pair[0], pair[1]).distinct_blocks(m * 3, n * 3)

    most = max(distinct(p) for p in itertools.product(range(shared), repeat=2))
    assert max(distinct(p) for p in found) == most


@pytest.mark.parametrize("shared", [6, 8, 16])
def test_stride_candidates_that_leave_one_side_its_own_come_first(shared: int) -> None:
    """Of pairs that meet as many blocks: half of the rank sets two copies farthest apart."""
    geometry = Geometry(shared, 0, 2, 2)
    found = stride_candidates(geometry, shared**2)[1:]
    full = [pair for pair in found if Geometry(shared, 0, 2, 2, *pair).distinct_blocks(2, 2) == 4]
    keeps = [shared // 2 in pair for pair in full]
    assert any(keeps)
    assert not all(keeps)
    assert keeps == sorted(keeps, reverse=True)


def test_strides_are_chosen_where_equal_ones_have_a_floor() -> None:
    """With m = n = 2 and equal strides dW is [[X, Y], [Y, X]]."""
    geometry = Geometry(8, 0, 2, 2)
    samples = [Sample(*pair(2, 40, 40, seed), geometry, 1.0) for seed in range(3)]
    chosen = choose_strides(samples)
    assert chosen in {(2, 4), (4, 2)}
    for sample in samples:
        free = fit(sample.a, sample.bt, Geometry(8, 0, 2, 2, *chosen))[1].error
        assert free < 0.9 * fit(sample.a, sample.bt, geometry)[1].error


def test_strides_that_fit_already_are_kept() -> None:
    rng = np.random.default_rng(0)
    geometry = Geometry(8, 0, 2, 2)
    stored = SharedFactors(*(rng.standard_normal(s) for s in ((8, 20), (8, 15), (0, 40), (0, 30))))
    assert choose_strides([Sample(*stored.expanded(geometry), geometry, 1.0)]) == (4, 4)


@pytest.mark.parametrize("method", ["fit", None])
def test_a_method_whose_numbers_overflow_the_dtype_never_wins(method: Any) -> None:
    """One number of B is beyond float16; the fit gives both factors equal norms, so that its numbers hold."""
    rng = np.random.default_rng(0)
    a, bt = 1e-3 * rng.standard_normal((4, 20)), rng.standard_normal((4, 16))
    bt[0, 0] = 7e4

    def half(x: Any) -> Any:
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float64)

    geometry = Geometry(4, 1, 2, 2)
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(half(fit(a, bt, geometry, method="average")[0].b_unshared)).all()
        made, quality = fit(a, bt, geometry, method=method, store=half)
    for x in (made.a_chunk, made.b_chunk, made.a_unshared, made.b_unshared):
        assert np.isfinite(x).all()
    assert quality.calibrated_error < quality.norm
