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
    np.copyto(out, items)
    return out


def encode_into(values: Floats, dtype: str, out: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[Any], bool]:
    """`encode` without a new array, told apart by whether all of the result is finite.

    Args:
        values: flat float32 or float64.
        dtype: of the result.
        out: bytes for the result.

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
    if values.dtype == np.float64:
        values = encode(values, dtype)
    np.copyto(carrier, values, casting="unsafe")
    return carrier, True
