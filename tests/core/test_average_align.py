"""Chunk averaging, plain and in the SVD basis; errors against dense dW."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.core.fitting import SharedFactors, align, average, difference_norm, fit, product_norm, svd_basis
from prolora_tools.core.geometry import Geometry
from prolora_tools.core.sharing import expand, project

Array = np.ndarray[Any, np.dtype[np.float64]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Geometry, int, int, int]:
    rank = draw(st.integers(1, 6))
    geometry = Geometry(rank, draw(st.integers(0, rank)), draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    return geometry, draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(0, 2**32 - 1))


def random_factors(geometry: Geometry, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((geometry.rank, in_features)), rng.standard_normal((geometry.rank, out_features))


def random_shared(geometry: Geometry, in_features: int, out_features: int, seed: int) -> SharedFactors:
    rng = np.random.default_rng(seed)
    shapes = [
        (geometry.shared, geometry.a.width(in_features)),
        (geometry.shared, geometry.b.width(out_features)),
        (geometry.unshared, in_features),
        (geometry.unshared, out_features),
    ]
    return SharedFactors(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


@given(cases())
def test_errors_are_those_of_the_dense_dw(case: tuple[Geometry, int, int, int]) -> None:
    geometry, *dims, seed = case
    a, bt = random_factors(geometry, dims[0], dims[1], seed)
    for maker in (average, align):
        a_hat, bt_hat = maker(a, bt, geometry).expanded(geometry)
        dense = np.linalg.norm(bt.T @ a - bt_hat.T @ a_hat)
        np.testing.assert_allclose(difference_norm(a, bt, a_hat, bt_hat), dense, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(product_norm(a, bt), np.linalg.norm(bt.T @ a), rtol=1e-9)


@given(cases(), st.integers(1, 6))
def test_difference_takes_other_ranks(case: tuple[Geometry, int, int, int], other: int) -> None:
    geometry, *dims, seed = case
    a, bt = random_factors(geometry, dims[0], dims[1], seed)
    c, dt = random_factors(Geometry.lora(other), dims[0], dims[1], seed + 1)
    dense = np.linalg.norm(bt.T @ a - dt.T @ c)
    np.testing.assert_allclose(difference_norm(a, bt, c, dt), dense, rtol=1e-9, atol=1e-9)


@given(cases())
def test_structured_factors_come_back_bit_for_bit(case: tuple[Geometry, int, int, int]) -> None:
    geometry, *dims, seed = case
    stored = random_shared(geometry, dims[0], dims[1], seed)
    a, bt = stored.expanded(geometry)
    found, quality = fit(a, bt, geometry, store=lambda x: x.astype(np.float32))
    assert quality.error == 0.0
    assert quality.method == "average"
    for name in ("a_chunk", "b_chunk", "a_unshared", "b_unshared"):
        np.testing.assert_array_equal(getattr(found, name), getattr(stored, name))


@given(cases())
def test_svd_basis_is_the_svd(case: tuple[Geometry, int, int, int]) -> None:
    geometry, *dims, seed = case
    a, bt = random_factors(geometry, dims[0], dims[1], seed)
    ut, values, vt = svd_basis(a, bt)
    np.testing.assert_allclose((ut.T * values) @ vt, bt.T @ a, atol=1e-9)
    dense = np.linalg.svd(bt.T @ a, compute_uv=False)
    np.testing.assert_allclose(values, dense[: len(values)], atol=1e-9)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(vt)), atol=1e-9)
    assert all(row[np.abs(row).argmax()] > 0 for row in vt)


@given(cases())
def test_no_other_sign_of_one_singular_pair_keeps_more(case: tuple[Geometry, int, int, int]) -> None:
    geometry, *dims, seed = case
    a, bt = random_factors(geometry, dims[0], dims[1], seed)
    ut, values, vt = svd_basis(a, bt)
    made = align(a, bt, geometry)
    root = np.sqrt(values)[:, None]
    u, missing = geometry.unshared, ((0, geometry.rank - len(values)), (0, 0))
    sides = [(np.pad(root * x, missing)[u:], s) for x, s in ((vt, geometry.a), (ut, geometry.b))]

    def kept(signs: Array) -> float:
        full = [expand(project(signs[:, None] * x, s), s, x.shape[1]) for x, s in sides]
        return float(sum(np.sum(x**2) for x in full))

    def found(signs: Array) -> bool:
        pairs = ((made.a_chunk, sides[0]), (made.b_chunk, sides[1]))
        return all(np.allclose(chunk, project(signs[:, None] * x, s), atol=1e-9) for chunk, (x, s) in pairs)

    tried = [np.array(signs) for signs in itertools.product((1.0, -1.0), repeat=geometry.shared)]
    chosen = next(signs for signs in tried if found(signs))
    for k in range(geometry.shared):
        other = chosen.copy()
        other[k] *= -1
        assert kept(other) <= kept(chosen) * (1 + 1e-8)
    assert kept(chosen) >= kept(np.ones(geometry.shared)) * (1 - 1e-8)


@given(cases())
def test_the_reported_svd_is_as_good_as_it_can_be(case: tuple[Geometry, int, int, int]) -> None:
    geometry, in_features, out_features, seed = case
    a, bt = random_factors(geometry, in_features, out_features, seed)
    _, quality = fit(a, bt, geometry, method="average")
    values = np.linalg.svd(bt.T @ a, compute_uv=False)
    for rank in range(geometry.rank + 1):
        np.testing.assert_allclose(quality.svd_error(rank), np.linalg.norm(values[rank:]), atol=1e-7)
    np.testing.assert_allclose(quality.norm, np.linalg.norm(values), rtol=1e-9)


@given(cases())
def test_without_a_method_the_smaller_error_is_taken(case: tuple[Geometry, int, int, int]) -> None:
    geometry, *dims, seed = case
    a, bt = random_factors(geometry, dims[0], dims[1], seed)
    best = fit(a, bt, geometry)[1].error
    assert best <= min(fit(a, bt, geometry, method=m)[1].error for m in ("average", "align"))


def test_the_costly_ranks_stay_unshared() -> None:
    """A rank that carries most of dW must be among the unshared, wherever it stands."""
    rng = np.random.default_rng(0)
    a, bt = rng.standard_normal((4, 24)), rng.standard_normal((4, 24))
    a[1] *= 100
    made = average(a, bt, Geometry(4, 1, 3, 3))
    np.testing.assert_array_equal(made.a_unshared[0], a[1])


def test_unstructured_factors_lose_what_theory_says() -> None:
    """sqrt(1 - 1/m) per factor (METHOD.md section 4)."""
    rng = np.random.default_rng(0)
    geometry = Geometry(8, 0, 7, 1)
    a = rng.standard_normal((8, 7000))
    made = average(a, rng.standard_normal((8, 5)), geometry)
    residual = np.linalg.norm(a - made.expanded(geometry)[0]) / np.linalg.norm(a)
    np.testing.assert_allclose(residual, np.sqrt(1 - 1 / 7), rtol=0.01)
