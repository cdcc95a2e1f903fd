"""The calibrated norm: against dense square roots, dense least squares and the plain fit."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.core import weighted
from prolora_tools.core.fitting import LENGTHEN, NO_MOMENTS, difference_norm, fit, length, truncated
from prolora_tools.core.geometry import Geometry
from prolora_tools.core.moments import Moments
from prolora_tools.core.weighted import WeightedFit

Array = np.ndarray[Any, np.dtype[np.float64]]


def moments(dim: int, seed: int) -> Moments:
    """Of inputs that live in few dims, as a trained model's do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * dim, dim)) * np.exp(-np.arange(dim) / 4)
    x = x @ np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    return Moments.of_matrix(x.T @ x / len(x))


def root(norm: Moments | None, dim: int) -> Array:
    if norm is None:
        return np.eye(dim)
    values, vectors = np.linalg.eigh(norm.apply(np.eye(dim)))
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, Array, Array, tuple[Moments | None, Moments | None]]:
    rank = draw(st.integers(1, 5))
    strides = [draw(st.none() | st.integers(0, 5)) for _ in range(2)]
    geometry = Geometry(rank, draw(st.integers(0, rank)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), *strides)
    dims = draw(st.integers(2, 20)), draw(st.integers(2, 20))
    seed = draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    sides = [moments(d, seed + i) if draw(st.booleans()) else None for i, d in enumerate(dims)]
    inner = draw(st.integers(1, 5))
    return geometry, rng.standard_normal((inner, dims[0])), rng.standard_normal((inner, dims[1])), (sides[0], sides[1])


def longer(error: float, norm: float) -> float:
    """What an error becomes where the solution is made longer by 1 + x: dense, along one axis and across it."""
    x = min((error / norm) ** 2, 1.0) if norm else 0.0
    across = np.sqrt(x - x**2)  # the solution is (1 - x, across) beside a target of (1, 0)
    return norm * float(np.hypot(1 - (1 + x) * (1 - x), (1 + x) * across))


@given(cases())
def test_never_worse_than_any_plain_method_in_the_norm(case: Any) -> None:
    geometry, a, bt, norm = case
    made, quality = fit(a, bt, geometry, method="fit", moments=norm)
    a_hat, bt_hat = made.expanded(geometry)
    dense = root(norm[1], bt.shape[1]) @ (bt.T @ a - bt_hat.T @ a_hat) @ root(norm[0], a.shape[1])
    scale = quality.calibrated_norm
    np.testing.assert_allclose(quality.calibrated_error, np.linalg.norm(dense), rtol=1e-5, atol=1e-6 * scale)
    for method in ("average", "align", "fit"):
        plain = fit(a, bt, geometry, method=method)[0]
        other = difference_norm(a, bt, *plain.expanded(geometry), norm)
        if method == "fit" and norm != NO_MOMENTS:
            other = longer(other, scale)
        assert quality.calibrated_error <= other * (1 + 1e-9) + 1e-7 * scale


@given(cases(), st.integers(0, 2**31), st.sampled_from([0.0, 1e-9, 1e-6]))
def test_an_error_far_below_the_norm_is_told_as_it_is(case: Any, seed: int, size: float) -> None:
    """In another basis of the ranks the Gram matrices cancel to the last digit, and what they leave is noise."""
    _, a, bt, norm = case
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((len(a), len(a))))[0]
    change = size * rng.standard_normal(a.shape)
    found = difference_norm(a, bt, turn @ (a + change), turn @ bt, norm)
    roots = root(norm[0], a.shape[1]), root(norm[1], bt.shape[1])
    rounding = 1e-13 * float(np.prod([np.linalg.norm(x, 2) for x in (*roots, a, bt)]))
    np.testing.assert_allclose(found, np.linalg.norm(roots[1] @ bt.T @ change @ roots[0]), rtol=1e-3, atol=rounding)


@pytest.mark.parametrize(
    ("unshared", "chunks", "strides"), [(0, (2, 2), (4, 2)), (0, (3, 2), (None, None)), (2, (4, 3), (1, 2))]
)
@pytest.mark.parametrize("outputs", [False, True])
def test_a_half_step_with_enough_iterations_is_the_least_squares_solution(
    unshared: int, chunks: tuple[int, int], strides: tuple[int | None, int | None], *, outputs: bool
) -> None:
    """The few iterations of a half step must come close to the dense solution, whatever the condition of C."""
    rng = np.random.default_rng(0)
    geometry = Geometry(8, unshared, *chunks, *strides)
    in_features, out_features = 35, 26  # both cut short
    a, bt = rng.standard_normal((8, in_features)), rng.standard_normal((8, out_features))
    norm = moments(in_features, 1), moments(out_features, 2) if outputs else None
    problem = WeightedFit(a, bt, geometry, norm)
    begun = fit(a, bt, geometry, method="fit")[0]
    side_a, side_b = problem.start(begun.a_chunk, begun.a_unshared, begun.b_chunk, begun.b_unshared)
    hat = side_b.factor(problem.b.layout)
    made = problem.half_step(
        hat @ problem.b.apply(hat).transpose(0, 2, 1),
        hat @ problem.heavy_b.transpose(0, 2, 1),
        side_a,
        problem.a,
        problem.target_a,
    )
    # Dense: the columns of the design are unit changes of every unknown, in the coordinates of the norm.
    other = begun.expanded(geometry)[1]
    roots = root(norm[0], in_features), root(norm[1], out_features)
    columns = []
    layout = problem.a.layout
    for k, c in itertools.product(range(geometry.shared), range(layout.width)):
        chunk = np.zeros((1, geometry.shared, layout.width))
        chunk[0, k, c] = 1
        full = layout.join(layout.expand(chunk))[0]
        columns.append((roots[1] @ other[: geometry.shared].T @ full @ roots[0]).ravel())
    for k, c in itertools.product(range(unshared), range(in_features)):
        full = np.zeros((1, in_features))
        full[0, c] = 1
        columns.append((roots[1] @ other[geometry.shared + k][:, None] @ full @ roots[0]).ravel())
    design, target = np.array(columns).T, (roots[1] @ bt.T @ a @ roots[0]).ravel()
    best = np.linalg.norm(design @ np.linalg.lstsq(design, target, rcond=None)[0] - target) ** 2
    before, after = problem.error(side_a, side_b), problem.error(made, side_b)
    assert best <= after * (1 + 1e-9)
    assert after - best < 0.1 * (before - best)


@given(cases())
def test_rounds_never_raise_the_error(case: Any) -> None:
    geometry, a, bt, norm = case
    problem = WeightedFit(a, bt, geometry, norm)
    begun = fit(a, bt, geometry, method="align")[0]
    start = problem.start(begun.a_chunk, begun.a_unshared, begun.b_chunk, begun.b_unshared)
    errors = [problem.rounds(*start, most)[2] for most in (0, 1, 3, 9)]
    assert all(after <= before + 1e-9 * problem.norm for before, after in itertools.pairwise(errors))


@given(cases(), st.integers(1, 5))
def test_the_calibrated_svd_is_the_best_lora_in_the_norm(case: Any, rank: int) -> None:
    _, a, bt, norm = case
    a_hat, bt_hat, values = truncated(a, bt, rank, norm)
    roots = root(norm[0], a.shape[1]), root(norm[1], bt.shape[1])
    dense = np.linalg.svd(roots[1] @ bt.T @ a @ roots[0], compute_uv=False)
    best = np.linalg.norm(dense[rank:])
    np.testing.assert_allclose(np.linalg.norm(values[rank:]), best, atol=1e-6 * dense[0])
    found = np.linalg.norm(roots[1] @ (bt.T @ a - bt_hat.T @ a_hat) @ roots[0])
    np.testing.assert_allclose(found, best, rtol=1e-5, atol=1e-6 * dense[0])


@given(cases())
def test_what_is_missing_along_dw_is_made_up_for_to_first_order(case: Any) -> None:
    """With moments the part of dW^ along dW is 1 - x^2, not 1 - x, and the error as told; else nothing changes."""
    geometry, a, bt, norm = case
    shortened = fit(a, bt, geometry, method="align")[0]
    a_hat, bt_hat = shortened.expanded(geometry)
    roots = root(norm[0], a.shape[1]), root(norm[1], bt.shape[1])
    target, before = (roots[1] @ y.T @ x @ roots[0] for x, y in ((a, bt), (a_hat, bt_hat)))
    square = float(np.sum(before**2))
    if square < 1e-12 * np.sum(target**2):
        return
    # The best length first: what least squares would leave.
    factor = float(np.sum(target * before)) / square
    longer_by = length(a, bt, a_hat, factor * bt_hat, norm)
    if norm == NO_MOMENTS:
        assert longer_by == 1
        return
    after = longer_by * factor * before
    size = float(np.linalg.norm(target))
    x = float(np.sum((target - factor * before) ** 2)) / size**2
    np.testing.assert_allclose(np.sum(target * after) / size**2, 1 - x**2, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(target - after), longer(np.sqrt(x) * size, size), atol=1e-6 * size)


@pytest.mark.parametrize("seed", range(4))
def test_by_directions_every_singular_direction_is_nearer_to_its_length(seed: int) -> None:
    """Oracle: dense singular vectors of dW in the norm, and what dW^ has of each."""
    rng = np.random.default_rng(seed)
    geometry = Geometry(6, 1, 3, 2, 1, 2)
    norm = moments(30, seed), moments(24, seed + 1)
    a, bt = rng.standard_normal((6, 30)), rng.standard_normal((6, 24))
    roots = root(norm[0], 30), root(norm[1], 24)
    target = roots[1] @ bt.T @ a @ roots[0]
    left, values, right = np.linalg.svd(target)
    missing = {}
    for lengthen in LENGTHEN:
        made, quality = fit(a, bt, geometry, method="fit", moments=norm, lengthen=lengthen)
        a_hat, bt_hat = made.expanded(geometry)
        dense = roots[1] @ bt_hat.T @ a_hat @ roots[0]
        np.testing.assert_allclose(quality.calibrated_error, np.linalg.norm(target - dense), rtol=1e-5)
        missing[lengthen] = np.array([1 - left[:, k] @ dense @ right[k] / values[k] for k in range(6)])
    assert np.abs(missing["directions"]).sum() < 0.8 * np.abs(missing["whole"]).sum()
    assert missing["directions"].min() > -0.2


def test_directions_change_nothing_where_nothing_is_lost_or_known() -> None:
    """An expanded PRoLoRA, a plain LoRA of smaller rank, and a fit without moments."""
    rng = np.random.default_rng(0)
    geometry = Geometry(4, 1, 2, 2)
    chunks = fit(rng.standard_normal((4, 20)), rng.standard_normal((4, 14)), geometry, method="average")[0]
    norm = moments(20, 1), moments(14, 2)
    other = rng.standard_normal((4, 20)), rng.standard_normal((4, 14))
    cases: list[tuple[Any, Geometry, Any]] = [
        (chunks.expanded(geometry), geometry, norm),
        (other, Geometry.lora(2), norm),
        (other, geometry, NO_MOMENTS),
    ]
    for pair, shape, known in cases:
        whole, directions = (
            fit(pair[0], pair[1], shape, method="fit", moments=known, lengthen=lengthen)[0] for lengthen in LENGTHEN
        )
        for name in ("a_chunk", "b_chunk", "a_unshared", "b_unshared"):
            np.testing.assert_array_equal(getattr(whole, name), getattr(directions, name))


def test_the_svd_that_is_told_is_made_longer_too() -> None:
    """A chosen plain LoRA and the rival of its rank are one and the same, so neither wins."""
    rng = np.random.default_rng(0)
    a, bt, norm = rng.standard_normal((6, 20)), rng.standard_normal((6, 15)), (moments(20, 1), moments(15, 2))
    quality = fit(a, bt, Geometry.lora(2), method="fit", moments=norm)[1]
    np.testing.assert_allclose(quality.calibrated_error, quality.svd_calibrated_error(2), rtol=1e-6)
    cut = float(np.linalg.norm(quality.calibrated_values[2:]))
    np.testing.assert_allclose(quality.svd_calibrated_error(2), longer(cut, quality.calibrated_norm))
    assert quality.svd_calibrated_error(2) > cut


def test_without_moments_the_calibrated_svd_is_the_svd() -> None:
    rng = np.random.default_rng(0)
    a, bt = rng.standard_normal((4, 20)), rng.standard_normal((4, 15))
    a_hat, bt_hat, values = truncated(a, bt, 2, NO_MOMENTS)
    np.testing.assert_allclose(values, np.linalg.svd(bt.T @ a, compute_uv=False)[:4])
    np.testing.assert_allclose(np.linalg.norm(bt.T @ a - bt_hat.T @ a_hat), np.linalg.norm(values[2:]))


def test_a_sketch_stands_for_the_dense_matrix() -> None:
    """Fitted in the norm of a sketch of a third of the dims, the true error is nearly that of the dense fit."""
    rng = np.random.default_rng(0)
    dim, geometry = 120, Geometry(8, 1, 3, 3)
    x = rng.standard_normal((2000, dim)) * np.exp(-np.arange(dim) / 10)
    x = x @ np.linalg.qr(rng.standard_normal((dim, dim)))[0]
    dense = Moments.of_matrix(x.T @ x / len(x))
    rows = rng.choice([-1.0, 1.0], (40, len(x))) @ x / np.sqrt(40 * len(x))
    sketch = Moments.of_sketch(rows, np.mean(x**2, axis=0))
    np.testing.assert_allclose(np.diag(sketch.apply(np.eye(dim))), np.diag(dense.apply(np.eye(dim))), rtol=1e-2)
    np.testing.assert_allclose(
        sketch.block(slice(3, 50), slice(20, 90)), sketch.apply(np.eye(dim))[3:50, 20:90] * 1.0, atol=0.02
    )
    np.testing.assert_allclose(sketch.block(slice(3, 50), slice(3, 50)), sketch.apply(np.eye(dim))[3:50, 3:50])
    a, bt = rng.standard_normal((8, dim)), rng.standard_normal((8, dim))
    errors = {}
    for name, norm in {"dense": dense, "sketch": sketch, "none": None}.items():
        made = fit(a, bt, geometry, method="fit", moments=(norm, None))[0]
        errors[name] = difference_norm(a, bt, *made.expanded(geometry), (dense, None))
    assert errors["dense"] <= errors["sketch"] < 0.5 * errors["dense"] + 0.5 * errors["none"]


def test_what_was_never_seen_is_the_frobenius_norm() -> None:
    for silent in (Moments.of_matrix(np.zeros((5, 5))), Moments.of_sketch(np.zeros((2, 5)), np.zeros(5))):
        np.testing.assert_array_equal(silent.apply(np.eye(5)), np.eye(5))


@pytest.mark.parametrize(("order", "copies"), [(8, 3), (4, 2), (1, 4)])
def test_the_inverse_of_a_sketch_is_that_of_its_dense_matrix(
    order: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By rows where they are few, whole otherwise: the preconditioner is one and the same, cut copy included."""
    rng = np.random.default_rng(0)
    dim = 90 * copies - 7
    rows, diagonal = rng.standard_normal((9, dim)), rng.uniform(9, 10, dim)
    sketch = Moments.of_sketch(rows, diagonal)
    dense = Moments(sketch.apply(np.eye(dim)), None, np.zeros(dim))
    sharing = Geometry(8, 0, copies, copies, 8 // order, 8 // order).a
    other = rng.standard_normal((8, 40))
    schur, right = (other @ other.T)[None], rng.standard_normal((1, 8, sharing.width(dim)))
    for coupled in (True, False):
        if not coupled:
            monkeypatch.setattr(weighted, "_LARGEST_INVERSES", 0)
        made = [weighted._Norm(m, sharing, dim) for m in (sketch, dense)]
        assert made[0].inverses is not None
        assert made[0].inverses[0].dense is None
        found, expected = (m.precondition(m.inverted(schur), right) for m in made)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
