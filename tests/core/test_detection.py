"""Recognising expanded PRoLoRA in plain factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prolora_tools.core.detection import LEAST, detect
from prolora_tools.core.fitting import SharedFactors, average, difference_norm
from prolora_tools.core.geometry import Geometry

Array = np.ndarray[Any, np.dtype[np.float32]]
EPS = 2.0**-24


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Geometry, int, int, int]:
    """Every geometry that shares something, and dims that a few numbers of a copy are left of."""
    rank = draw(st.integers(1, 9))
    unshared = draw(st.integers(0, rank - 1))
    strides = [draw(st.none() | st.integers(0, 9)) for _ in range(2)]
    geometry = Geometry(rank, unshared, draw(st.integers(1, 8)), draw(st.integers(1, 8)), *strides)
    dims = draw(st.integers(10, 70)), draw(st.integers(10, 70))
    assume(not geometry.is_lora)
    return geometry, *dims, draw(st.integers(0, 2**31))


def expanded(geometry: Geometry, in_features: int, out_features: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    shapes = [
        (geometry.shared, geometry.a.width(in_features)),
        (geometry.shared, geometry.b.width(out_features)),
        (geometry.unshared, in_features),
        (geometry.unshared, out_features),
    ]
    stored = SharedFactors(*(rng.standard_normal(s).astype(np.float32) for s in shapes))
    a, bt = stored.expanded(geometry)
    return a.astype(np.float32), bt.astype(np.float32)


def enough(geometry: Geometry, in_features: int, out_features: int) -> bool:
    """Whether some side has LEAST numbers beyond its chunk."""
    beyond = (in_features - geometry.a.width(in_features), out_features - geometry.b.width(out_features))
    return all(geometry.shared * n >= LEAST for n in beyond if n) and any(beyond)


@given(geometries())
def test_every_geometry_is_found_and_undone_without_loss(case: tuple[Geometry, int, int, int]) -> None:
    geometry, *dims, seed = case
    assume(enough(geometry, dims[0], dims[1]))
    a, bt = expanded(geometry, dims[0], dims[1], seed)
    found = detect(a, bt, EPS)
    assert found is not None
    assert found.stored
    assert found.geometry.parameters(dims[0], dims[1]) <= geometry.parameters(dims[0], dims[1])
    stored = average(a, bt, found.geometry).map(lambda x: x.astype(np.float32))
    for made, original in zip(stored.expanded(found.geometry), (a, bt), strict=True):
        np.testing.assert_array_equal(made, original)


@pytest.mark.parametrize("strides", [(None, None), (1, 3), (0, 0), (2, 5)])
@pytest.mark.parametrize(("unshared", "chunks"), [(0, (2, 2)), (1, (7, 7)), (2, (4, 3)), (3, (5, 1)), (7, (3, 3))])
def test_the_shape_is_the_one_it_was_made_with(
    unshared: int, chunks: tuple[int, int], strides: tuple[int | None, int | None]
) -> None:
    geometry = Geometry(8, unshared, *chunks, *strides)
    found = detect(*expanded(geometry, 84, 120, 0), EPS)
    assert found is not None
    assert found.geometry.unshared == unshared
    assert found.geometry.chunks_a == geometry.chunks_a
    assert found.geometry.chunks_b == geometry.chunks_b
    if strides == (None, None):
        assert found.geometry == geometry
    for side, made in ((geometry.a, found.geometry.a), (geometry.b, found.geometry.b)):
        if side.chunks > 1:
            assert (side.stride - made.stride) % geometry.shared == 0


@given(geometries(), st.sampled_from(["float32", "bfloat16"]), st.booleans())
def test_permuted_and_rescaled_ranks_are_found(case: tuple[Geometry, int, int, int], dtype: str, scaled: bool) -> None:
    geometry, _, _, seed = case
    dims = 96, 120  # each copy long enough to be told from chance
    a, bt = expanded(geometry, *dims, seed)
    rng = np.random.default_rng(seed + 1)
    order = rng.permutation(geometry.rank)
    scale = rng.uniform(0.2, 5.0, (geometry.rank, 1)) * rng.choice([-1, 1], (geometry.rank, 1)) if scaled else 1.0
    mixed_a, mixed_bt = (a[order] * scale).astype(np.float32), (bt[order] / scale).astype(np.float32)
    eps = EPS
    if dtype == "bfloat16":
        mixed_a, mixed_bt = (_bfloat16(x) for x in (mixed_a, mixed_bt))
        eps = 2.0**-9
    found = detect(mixed_a, mixed_bt, eps)
    assert found is not None
    assert found.geometry.parameters(*dims) <= geometry.parameters(*dims)
    restored = found.restored(mixed_a, mixed_bt)
    stored = average(*restored, found.geometry)
    error = difference_norm(mixed_a, mixed_bt, *stored.expanded(found.geometry))
    norm = difference_norm(mixed_a, mixed_bt, 0 * mixed_a, 0 * mixed_bt)
    assert error <= 8 * eps * norm
    if not scaled and dtype == "float32":
        rounded = stored.map(lambda x: x.astype(np.float32))
        for made, original in zip(rounded.expanded(found.geometry), restored, strict=True):
            np.testing.assert_array_equal(made, original)


def _bfloat16(x: Array) -> Array:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def test_random_factors_are_never_mistaken() -> None:
    rng = np.random.default_rng(0)
    for number in range(1000):
        rank, in_features, out_features = (int(rng.integers(*span)) for span in ((1, 17), (8, 200), (8, 200)))
        a = rng.standard_normal((rank, in_features)).astype(np.float32)
        bt = rng.standard_normal((rank, out_features)).astype(np.float32)
        eps = EPS
        if number % 2:
            a, bt, eps = _bfloat16(a), _bfloat16(bt), 2.0**-9
        if number % 5 == 0:
            bt[:] = 0
        assert detect(a, bt, eps) is None, (number, rank, in_features, out_features)


def test_one_changed_number_ends_it() -> None:
    a, bt = expanded(Geometry(8, 1, 4, 4), 64, 64, 0)
    assert detect(a, bt, EPS) is not None
    a[3, 20] *= 1.001
    found = detect(a, bt, EPS)
    assert found is None or found.geometry.chunks_a == 1  # B's structure is still there


def test_before_training_a_alone_tells() -> None:
    a, bt = expanded(Geometry(8, 1, 4, 4), 64, 64, 0)
    found = detect(a, 0 * bt, EPS)
    assert found is not None
    assert found.geometry == Geometry(8, 1, 4, 4)


def test_ranks_of_zeros_prove_nothing() -> None:
    rng = np.random.default_rng(0)
    a, bt = (rng.standard_normal((4, 40)).astype(np.float32) for _ in range(2))
    a[0] = 0
    bt[0] = 0
    assert detect(a, bt, EPS) is None
