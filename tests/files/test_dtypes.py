"""Decoding and encoding against torch, over every half-precision pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prolora_tools.errors import RequestError
from prolora_tools.files import dtypes

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PATTERNS = np.arange(1 << 16, dtype="<u2")

Values = npt.NDArray[Any]


def bits(values: Values) -> npt.NDArray[np.unsignedinteger[Any]]:
    unsigned: npt.NDArray[np.unsignedinteger[Any]] = values.view(f"<u{values.itemsize}")
    return unsigned


def by_torch(values: Values, dtype: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The bits of `values` rounded by torch."""
    rounded = torch.from_numpy(values.copy()).to(TORCH[dtype])
    carrier = {2: torch.int16, 4: torch.int32, 8: torch.int64}[rounded.element_size()]
    return bits(rounded.view(carrier).numpy())


def same(values: Values, dtype: str) -> None:
    """Encoding equals torch's rounding; any NaN equals any other."""
    found, expected = bits(dtypes.encode(values, dtype)), by_torch(values, dtype)
    nan = np.isnan(values)
    assert np.array_equal(found[~nan], expected[~nan])
    assert np.isnan(dtypes.decode(found[nan].tobytes(), dtype)).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_all_65536_patterns(dtype: str) -> None:
    decoded = dtypes.decode(PATTERNS.tobytes(), dtype)
    expected = torch.from_numpy(PATTERNS.view("<i2").copy()).view(TORCH[dtype]).float().numpy()
    nan = np.isnan(expected)
    assert decoded.dtype == np.float32
    assert np.array_equal(bits(decoded)[~nan], bits(expected)[~nan])
    assert np.array_equal(np.isnan(decoded), nan)
    assert np.array_equal(bits(dtypes.encode(decoded, dtype))[~nan], PATTERNS[~nan])
    assert np.isnan(dtypes.decode(dtypes.encode(decoded, dtype)[nan].tobytes(), dtype)).all()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_every_midpoint_and_its_neighbours(dtype: str, wide: type) -> None:
    """Halfway between two neighbours the one with an even last bit wins; a hair beside it the nearer one."""
    table = dtypes.decode(PATTERNS.tobytes(), dtype)
    finite = np.unique(table[np.isfinite(table)]).astype(np.float64)
    lower, upper = finite[:-1], finite[1:]
    even = dict(zip(table.tolist(), (PATTERNS & 1 == 0).tolist(), strict=True))
    middle: Values = ((lower + upper) / 2).astype(wide)
    nearest = [low if even[low] else up for low, up in zip(lower.tolist(), upper.tolist(), strict=True)]
    beside = (np.nextafter(middle, wide(-np.inf)), np.nextafter(middle, wide(np.inf)))
    for values, expected in ((middle, nearest), (beside[0], lower), (beside[1], upper)):
        assert np.array_equal(dtypes.decode(dtypes.encode(values, dtype).tobytes(), dtype), np.array(expected))
        if wide is np.float32:
            same(values, dtype)


def test_float64_is_not_rounded_twice() -> None:
    """Through float32 this would become the even neighbour of a tie that it is not: 1 + 2^-8 + 2^-40."""
    value = np.array([1 + 2**-8 + 2**-40])
    assert dtypes.decode(dtypes.encode(value, "BF16").tobytes(), "BF16")[0] == 1 + 2**-7
    twice = dtypes.encode(value.astype(np.float32), "BF16")
    assert dtypes.decode(twice.tobytes(), "BF16")[0] == 1


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    source=st.sampled_from([np.float32, np.float64]),
    dtype=st.sampled_from(sorted(TORCH)),
    count=st.integers(0, 40),
)
def test_random_patterns(data: st.DataObject, source: type, dtype: str, count: int) -> None:
    size = np.dtype(source).itemsize
    raw = data.draw(st.binary(min_size=count * size, max_size=count * size))
    values: Values = np.frombuffer(raw, dtype=source)
    if source is np.float64 and dtype in {"F16", "BF16"}:
        return  # torch rounds twice there, through float32; test_float64_to_half has an oracle of its own
    same(values, dtype)


def nearest(value: float, dtype: str) -> float:
    """The slow way: of all finite numbers of a dtype the nearest, of two the one with an even last bit."""
    table = dtypes.decode(PATTERNS.tobytes(), dtype)
    distance = np.abs(np.where(np.isfinite(table), table, np.inf).astype(np.float64) - value)
    best = np.flatnonzero(distance == distance.min())
    return float(table[min(best, key=lambda pattern: pattern & 1)])


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["F16", "BF16"]))
def test_float64_to_half(data: st.DataObject, dtype: str) -> None:
    largest = 65504.0 if dtype == "F16" else 3.3895314e38
    value = data.draw(st.floats(min_value=-largest, max_value=largest))
    found = dtypes.decode(dtypes.encode(np.array([value]), dtype).tobytes(), dtype)[0]
    assert float(found) == nearest(value, dtype)


@pytest.mark.parametrize("source", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_overflow_becomes_infinity_and_is_seen(source: type, dtype: str) -> None:
    largest = {"F64": 1.7976931348623157e308, "F32": 3.4028235e38, "F16": 65504.0, "BF16": 3.3895314e38}[dtype]
    inside = np.array([largest, -largest, 0.0], dtype=np.float64)
    with np.errstate(over="ignore"):
        inside = inside.astype(source)
    if np.isfinite(inside).all():
        assert dtypes.all_finite(dtypes.encode(inside, dtype))
    for bad in (np.inf, -np.inf, np.nan):
        assert not dtypes.all_finite(dtypes.encode(np.array([0, bad, 1], dtype=source), dtype))
    if dtype in {"F16", "BF16"}:
        top = np.finfo(source).max
        assert not dtypes.all_finite(dtypes.encode(np.array([top], dtype=source), dtype))


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_shape_and_order_are_kept(dtype: str) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4).T
    encoded = dtypes.encode(values, dtype)
    assert encoded.shape == (4, 3)
    assert encoded.flags.c_contiguous
    assert np.array_equal(dtypes.decode(encoded.tobytes(), dtype).reshape(4, 3), values)


def test_names() -> None:
    for name, dtype in dtypes.NAMES.items():
        assert dtypes.parse(name) == dtype
        assert getattr(torch, name) == TORCH[dtype]
    with pytest.raises(RequestError):
        dtypes.parse("BF16")


def test_sizes() -> None:
    assert dtypes.n_bytes("BF16", 3) == 6
    assert dtypes.n_bytes("F4", 3) is None
    assert dtypes.n_bytes("F4", 4) == 2
    assert dtypes.n_bytes("F6_E3M2", 4) == 3


def into(values: Values, dtype: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The bits that `encode_into` makes of finite values."""
    out = np.empty(values.size * dtypes.ITEM_BITS[dtype] // 8, dtype=np.uint8)
    carrier, finite = dtypes.encode_into(values.copy(), dtype, out)
    assert finite
    return bits(carrier)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_encoding_in_place_rounds_as_torch_does(dtype: str) -> None:
    """Every number of half precision, every midpoint, their neighbours and theirs, and what lies anywhere between."""
    table = dtypes.decode(PATTERNS.tobytes(), dtype)
    finite = np.unique(table[np.isfinite(table)])
    middle = ((finite[:-1].astype(np.float64) + finite[1:]) / 2).astype(np.float32)
    middle = middle[np.abs(middle) <= finite.max()]
    draw = np.random.default_rng(0)
    between = (finite[:-1] + draw.random(len(finite) - 1) * np.diff(finite.astype(np.float64))).astype(np.float32)
    for values in (finite, middle, between):
        for step in (0, 1, 2, 3, -1, -2, -3):
            moved = (values.view(np.int32) + np.int32(step)).view(np.float32)
            moved = moved[np.abs(moved) <= finite.max()]
            assert np.array_equal(into(moved, dtype), by_torch(moved, dtype))
    zeros = np.array([0.0, -0.0, 1e-45, -1e-45, 2.0**-25, -(2.0**-25), 2.0**-24 * 1.5], dtype=np.float32)
    assert np.array_equal(into(zeros, dtype), by_torch(zeros, dtype))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_decoding_in_place_gives_every_pattern(dtype: str) -> None:
    expected = dtypes.decode(PATTERNS.tobytes(), dtype)
    finite = np.isfinite(expected)
    for kept in (finite, np.ones_like(finite)):
        raw = PATTERNS[kept].view(np.uint8)
        found = dtypes.decode_into(raw, dtype, np.empty(kept.sum(), dtype=np.float32))
        assert np.array_equal(found, expected[kept], equal_nan=True)
        assert np.array_equal(bits(found)[finite[kept]], bits(expected)[finite])
