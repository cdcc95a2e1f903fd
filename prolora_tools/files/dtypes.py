"""safetensors dtypes in numpy, bfloat16 included, without torch.

Decoding widens to float32 (float64 stays), which is exact. Encoding rounds once, to nearest even, as torch does
(torch rounds float64 to half precision twice, through float32; we round once).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from ml_dtypes import bfloat16

from prolora_tools.errors import RequestError

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.floating[Any]]

ITEM_BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of one item of every dtype that the safetensors format names."""

# How each float dtype is held in memory.
_CARRIERS: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(bfloat16)
}  # fmt: skip

FLOATS = tuple(_CARRIERS)
"""The dtypes that arithmetic is done on."""

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names of them, as `--dtype` and config.json spell them."""


def parse(name: str) -> str:
    """`bfloat16` -> `BF16`.

    Raises:
        RequestError: not one of the float dtypes of `NAMES`.
    """
    if name not in NAMES:
        raise RequestError(
            "dtype-unknown",
            f"dtype is {name!r}, expected one of {', '.join(NAMES)}",
            hint="for example --dtype bfloat16",
        )
    return NAMES[name]


def n_bytes(dtype: str, items: int) -> int | None:
    """Bytes of `items` items, None where sub-byte items do not fill whole bytes."""
    bits = ITEM_BITS[dtype] * items
    return None if bits % 8 else bits // 8


def decode(raw: bytes | bytearray | memoryview | npt.NDArray[np.uint8], dtype: str) -> Floats:
    """Bytes of a float tensor -> flat float32 (float64 for F64). F32 and F64 share the buffer's memory."""
    items = np.frombuffer(raw, dtype=_CARRIERS[dtype])
    return items.astype("<f4") if items.itemsize < 4 else items


def encode(values: Floats, dtype: str) -> npt.NDArray[Any]:
    """float32 or float64 -> the carrier array of `dtype`, rounded once to nearest even.

    Rounding float64 to BF16 or F16 goes directly, not through float32. Overflow becomes inf, as in torch;
    `all_finite` on the result tells.
    """
    if dtype == "BF16" and values.dtype == np.float64:
        values = _to_odd_float32(values)  # ml_dtypes, as torch, would round to float32 first
    with np.errstate(over="ignore", invalid="ignore"):  # invalid: a signalling nan becomes a quiet one
        return np.ascontiguousarray(values, dtype=_CARRIERS[dtype])


def _to_odd_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """float64 -> float32 rounded to odd, which a second rounding to fewer bits cannot tell from exact."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = values.astype(np.float32)
    inexact = (near.astype(np.float64) != values) & np.isfinite(near)
    bits = near.view(np.uint32)
    # Step back towards zero where rounding went away from it, then set the last bit: sticky.
    away = inexact & (np.abs(near.astype(np.float64)) > np.abs(values))
    bits[away] -= np.uint32(1)
    bits[inexact] |= np.uint32(1)
    return near


def all_finite(carrier: npt.NDArray[Any]) -> bool:
    """Whether an encoded array holds no inf and no nan."""
    return bool(np.isfinite(carrier).all())


_LARGEST = {"F64": 1.7976931348623157e308, "F32": 3.4028234663852886e38, "F16": 65504.0, "BF16": 3.3895313892515355e38}
"""The largest finite number of each float dtype."""


def decode_into(raw: npt.NDArray[np.uint8], dtype: str, out: Floats) -> Floats:
    """`decode` without a new array: fills the flat `out`, or returns a view of `raw` where no bit changes."""
    items = raw.view(_CARRIERS[dtype])
    if items.dtype == out.dtype:
        return items
    if dtype == "F16" and out.dtype == np.float32 and items.size and _from_half(items, out):
        return out
    np.copyto(out, items)
    return out


def _from_half(items: npt.NDArray[Any], out: Floats) -> bool:
    """float16 -> float32 in half of numpy's time; False where there is an inf or a nan, which this gets wrong.

    Sign, exponent and mantissa are put into their places, and the exponent's other bias is a power of two.
    """
    bits = out.view(np.uint32)
    np.copyto(bits, items.view(np.int16), casting="unsafe")  # extends the sign
    np.left_shift(bits, np.uint32(13), out=bits)
    np.bitwise_and(bits, np.uint32(0x8FFFE000), out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)
    return bool(out.min() > -65536 and out.max() < 65536)


def encode_into(
    values: Floats, dtype: str, out: npt.NDArray[np.uint8], scratch: Floats
) -> tuple[npt.NDArray[Any], bool]:
    """`encode` without a new array, told apart by whether all of the result is finite.

    Args:
        values: flat float32 or float64; may be overwritten where the result is finite.
        dtype: of the result.
        out: bytes for the result.
        scratch: of the length and dtype of `values`; overwritten.

    Returns:
        The carrier array, and whether it is finite throughout; it may be `values` itself.
    """
    most = _LARGEST[dtype]
    if not (values.size and -most <= float(values.min()) and float(values.max()) <= most):
        carrier = encode(values, dtype)  # nan, inf, or numbers that may become inf: rare, and may take their time
        return carrier, all_finite(carrier)
    carrier = out.view(_CARRIERS[dtype])
    if carrier.dtype == values.dtype:
        return values, True
    if dtype == "F16" and values.dtype == np.float32:
        _to_half(values, carrier, scratch)
        return carrier, True
    if values.dtype == np.float64:
        values = encode(values, dtype)
    np.copyto(carrier, values, casting="unsafe")
    return carrier, True


_MAGIC = np.float32((1.5 * 2**23 + 0x600) * 2.0**-10)
_MAGIC_SUBNORMAL = np.float32(_MAGIC * np.float32(2.0**-14))


def _to_half(values: Floats, out: npt.NDArray[Any], scratch: Floats) -> None:
    """float32 of at most 65504 in size -> float16, in two thirds of numpy's time; `values` are overwritten.

    To the size of a number with exponent e, at least float16's least, -14, is added one so much larger that the unit in
    the last place of the sum is 2^(e-10), float16's for that e: the addition rounds, to nearest even. The sum's low
    bits then are the number q of those units, its exponent is e + 13, and float16's bits, without the sign, are
    (e + 14) * 2^10 + q, which holds for subnormals too. 0x600 is what makes the constants left over vanish in 16 bits.
    """
    sign, half = out.view(np.uint16), scratch.view(np.uint16)[: out.size]
    total, bits, size = scratch, scratch.view(np.uint32), values.view(np.uint32)
    np.right_shift(size, np.uint32(16), out=bits)
    np.copyto(sign, bits, casting="unsafe")
    np.bitwise_and(sign, np.uint16(0x8000), out=sign)
    np.absolute(values, out=values)
    np.bitwise_and(size, np.uint32(0x7F800000), out=bits)
    np.multiply(total, _MAGIC, out=total)
    np.maximum(total, _MAGIC_SUBNORMAL, out=total)
    np.add(total, values, out=total)
    np.right_shift(bits, np.uint32(13), out=size)
    np.add(size, bits, out=size)
    np.copyto(half, size, casting="unsafe")
    np.bitwise_or(sign, half, out=sign)
