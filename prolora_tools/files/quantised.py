"""Quantised weights of a base, as the float weights that they stand for.

What a quantised weight is, is the weight that its model computes with:

- bitsandbytes 4-bit: code * absmax in float32, rounded to the dtype of the quant_state, which is what
  bitsandbytes.functional.dequantize_4bit gives, its matrix products and PEFT's merge included. Our bits are equal.
- bitsandbytes int8: q * SCB * (1 / 127) in float32, not rounded, bitsandbytes' int8_vectorwise_dequant. Its products
  are int8 sums that are scaled afterwards, so no rounded weight exists.
- FP8: q * scale in float32, not rounded, for the same reason. Rounded to the output's dtype this is transformers'
  Fp8Dequantize, bit for bit, and compressed-tensors' decompression.

A delta is then added in float32 and the sum rounded once.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_dtypes import float8_e4m3fn, float8_e5m2, float8_e8m0fnu

from prolora_tools.errors import InputError, UnsupportedError
from prolora_tools.files import dtypes
from prolora_tools.files.checkpoint import Checkpoint
from prolora_tools.files.stream import Files
from prolora_tools.files.tensors import StoredTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy.typing as npt

    from prolora_tools.files.dtypes import Floats

    Numbers = npt.NDArray[np.float32]

CONFIGS = ("quantization_config", "compression_config")
"""Fields of config.json that say how a model is quantised; the second is compressed-tensors' older name."""
PARTS = ("text_config", "llm_config")
"""Parts of a composite config.json that may say it instead."""

ORIGINAL = "merge into the original float model, and quantise the result"
"""The hint where a quantised base is refused."""

_QUANT_STATE = ".quant_state.bitsandbytes__"
_NOT_WEIGHTS = (
    ".input_scale", ".activation_scale", ".input_scale_ub", ".output_scale", ".q_scale", ".k_scale", ".v_scale"
)  # fmt: skip
"""Ends of the names of FP8 tensors that scale activations and caches: they go with the quantisation."""


@dataclass(frozen=True)
class QuantisedTensor(StoredTensor):
    """A weight that is stored quantised; `file`, `begin` and `n_bytes` are those of its packed numbers.

    Attributes:
        dtype: what it is in a merged model unless another is asked for.
        shape: of the float weight.
        packed: the stored tensor of the packed numbers.
    """

    packed: StoredTensor

    def read(self) -> Floats:
        """The weight in its shape, float32."""
        out = np.empty(self.items, dtype=np.float32)
        with Files() as files:
            self.read_items(files, 0, out)
        return out.reshape(self.shape)

    def read_items(self, files: Files, begin: int, out: Floats) -> None:
        """Fill `out` with the weight's numbers from flat index `begin` on.

        Args:
            files: open files.
            begin: a multiple of the last dim, as is the number of items.
            out: flat, float32 or float64.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FourBit(QuantisedTensor):
    """bitsandbytes nf4 and fp4: two codes a byte, the first in the high half, blocks along the flat weight.

    Attributes:
        scales: absmax of each block, float32 (blocks,); with double quantisation uint8 codes of it.
        codes: float32 (16,), what the codes stand for.
        block: numbers in a block.
        rounding: the dtype that bitsandbytes dequantises into.
        nested: for double quantisation (absmax of blocks of scales, float32 (256,) codes, block, offset).
    """

    scales: StoredTensor
    codes: StoredTensor
    block: int
    rounding: str
    nested: tuple[StoredTensor, StoredTensor, int, float] | None = None

    def read_items(self, files: Files, begin: int, out: Floats) -> None:
        """Whole blocks are read, of an even number of codes, so that none begins inside a byte."""
        first, last = begin // self.block, -(-(begin + out.size) // self.block)
        offset = first * self.block // 2
        packed = np.zeros((last - first) * self.block // 2, dtype=np.uint8)
        stored = packed[: self.packed.n_bytes - offset]
        files.read_into(self.packed, offset, stored)
        codes = _floats(files, self.codes, 0, 16)
        pairs = np.stack([np.repeat(codes, 16), np.tile(codes, 16)], axis=1)  # byte -> two numbers
        values = np.take(pairs, packed, axis=0).reshape(last - first, self.block)
        with np.errstate(all="ignore"):  # whether the result is finite is checked where it is used
            values *= self.absmax(files, first, last)[:, None]
        flat = values.reshape(-1)[begin - first * self.block :][: out.size]
        out[:] = flat if self.rounding == "F32" else dtypes.decode(dtypes.encode(flat, self.rounding), self.rounding)

    def absmax(self, files: Files, first: int, last: int) -> Numbers:
        """The scales of blocks `first` to `last`."""
        if self.nested is None:
            return _floats(files, self.scales, first, last)
        absmax, codes, block, offset = self.nested
        packed = np.empty(last - first, dtype=np.uint8)
        files.read_into(self.scales, first, packed)
        outer = _floats(files, absmax, first // block, -(-last // block))
        scales = np.take(_floats(files, codes, 0, 256), packed)
        with np.errstate(all="ignore"):
            scales *= outer[np.arange(first, last) // block - first // block]
            scales += np.float32(offset)
        return scales


@dataclass(frozen=True)
class EightBit(QuantisedTensor):
    """bitsandbytes int8: a scale for each row, the row's largest magnitude.

    Attributes:
        scales: SCB, float32 (rows,).
    """

    scales: StoredTensor

    def read_items(self, files: Files, begin: int, out: Floats) -> None:
        """The product in bitsandbytes' order, which decides the last bit."""
        columns = self.shape[-1]
        packed = np.empty(out.size, dtype=np.uint8)
        files.read_into(self.packed, begin, packed)
        values = packed.view(np.int8).astype(np.float32).reshape(-1, columns)
        with np.errstate(all="ignore"):
            values *= _floats(files, self.scales, begin // columns, begin // columns + len(values))[:, None]
            values *= np.float32(7.874015718698502e-3)
        out[:] = values.reshape(-1)


@dataclass(frozen=True)
class Float8(QuantisedTensor):
    """FP8 with scales that multiply: one for a tensor, for each row or column, or for each block.

    Attributes:
        scales: a float tensor, or powers of two as their exponents (F8_E8M0, or U8 as MXFP8 stores them).
        grid: how many scales there are along (the dims before the last two, taken as one; rows; columns).
        block: (rows, columns) that a scale is for.
    """

    scales: StoredTensor
    grid: tuple[int, int, int]
    block: tuple[int, int]

    def read_items(self, files: Files, begin: int, out: Floats) -> None:
        """Rows of the weight, and the rows of scales that belong to them."""
        columns, height = self.shape[-1], self.shape[-2] if len(self.shape) > 1 else 1
        packed = np.empty(out.size, dtype=np.uint8)
        files.read_into(self.packed, begin, packed)
        values = np.take(_FP8[self.packed.dtype], packed).reshape(-1, columns)
        matrix, row = np.divmod(np.arange(begin // columns, begin // columns + len(values)), height)
        rows = (matrix if self.grid[0] > 1 else 0) * self.grid[1] + row // self.block[0]
        wide, first, last = self.grid[2], int(rows.min()), int(rows.max()) + 1
        scales = _floats(files, self.scales, first * wide, last * wide).reshape(-1, wide)
        if wide > 1:
            scales = np.repeat(scales, self.block[1], axis=1)[:, :columns]
        with np.errstate(all="ignore"):
            values *= scales[rows - first]
        out[:] = values.reshape(-1)


_FP8: dict[str, Numbers] = {
    name: np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    for name, dtype in (("F8_E4M3", float8_e4m3fn), ("F8_E5M2", float8_e5m2))
}
"""What each byte stands for."""


def _floats(files: Files, tensor: StoredTensor, begin: int, end: int) -> Numbers:
    """Numbers `begin` to `end` of a flat tensor of scales, float32."""
    size = dtypes.ITEM_BITS[tensor.dtype] // 8
    raw = np.empty((end - begin) * size, dtype=np.uint8)
    files.read_into(tensor, begin * size, raw)
    if tensor.dtype in {"F8_E8M0", "U8"}:
        return np.array(raw.view(float8_e8m0fnu), dtype=np.float32)
    return np.array(dtypes.decode(raw, tensor.dtype), dtype=np.float32)


def quantisation(config: dict[str, Any]) -> Any:
    """What config.json says about the model's quantisation, None if nothing."""
    return next((part[key] for part in _parts(config) for key in CONFIGS if part.get(key)), None)


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and what of it is a config of a part of the model."""
    return [config, *(config[key] for key in PARTS if isinstance(config.get(key), dict))]


def open_base(folder: Path) -> Checkpoint:
    """A base of any kind that can be merged into, its quantised weights under the names of the float weights.

    Raises:
        InputError: something is missing or broken.
        UnsupportedError: the base is quantised in a way that is not read, or its `.bin` files are of such a kind.
    """
    return dequantised(Checkpoint.open(folder, pickled=True))


def dequantised(base: Checkpoint) -> Checkpoint:
    """The same base with each quantised weight as a QuantisedTensor, and without what belongs to the quantisation.

    Raises:
        UnsupportedError: a kind of quantisation that is not read.
        InputError: the parts of a quantised weight are missing or do not fit each other.
    """
    config = quantisation(base.config)
    if config is None:
        return base
    told = config if isinstance(config, dict) else {"quant_method": config}
    method, form = str(told.get("quant_method", "unknown")), told.get("format")
    readers: dict[str, Callable[[Checkpoint, dict[str, Any]], dict[str, StoredTensor]]] = {
        "bitsandbytes": _bitsandbytes,
        "fp8": _float8,
        "fbgemm_fp8": _float8,
        "compressed-tensors": _float8,
    }
    if method not in readers or form not in (None, "float-quantized"):
        raise UnsupportedError(
            "base-quantised",
            f"{base.folder}/config.json has a quantization_config ({method}{f', {form}' if form else ''}): "
            "this kind of packed weights is not read",
            hint=ORIGINAL,
        )
    kept = readers[method](base, told)
    shards = {file: {name: kept[name] for name in tensors if name in kept} for file, tensors in base.shards.items()}
    found = [t for t in kept.values() if isinstance(t, QuantisedTensor)]
    note = f"the base is quantised ({method}): {len(found):,} of its weights are taken as the floats they stand for"
    return replace(
        base,
        shards={file: tensors for file, tensors in shards.items() if tensors},
        tensors={name: kept[name] for name in base.tensors if name in kept},
        as_stored=False,
        notes=(*base.notes, note),
    )


def _default_dtype(config: dict[str, Any]) -> str:
    """The dtype that config.json gives the model, BF16 if none."""
    named = (part.get(key) for part in _parts(config) for key in ("dtype", "torch_dtype"))
    return next((dtypes.NAMES[n] for n in named if isinstance(n, str) and n in dtypes.NAMES), "BF16")


def _bad(tensor: StoredTensor, what: str) -> InputError:
    return InputError("base-quantised-tensor", f"{tensor.file}: {tensor.name!r} {what}", hint=ORIGINAL)


def _part(base: Checkpoint, weight: StoredTensor, name: str, dtype: str | None, items: int | None) -> StoredTensor:
    """A tensor that belongs to a weight, of the dtype and the number of items that it must have."""
    found = base.tensors.get(name)
    if found is None:
        raise _bad(weight, f"is quantised, and {name!r}, which belongs to it, is missing")
    if (dtype is not None and found.dtype != dtype) or (items is not None and found.items != items):
        wanted = f"{dtype or 'any dtype'} with {'any number of' if items is None else f'{items:,}'} items"
        raise _bad(found, f"is {found.dtype} {list(found.shape)}, expected {wanted} for {weight.name!r}")
    return found


def _bitsandbytes(base: Checkpoint, _: dict[str, Any]) -> dict[str, StoredTensor]:
    kept: dict[str, StoredTensor] = {}
    used: set[str] = set()
    dtype = _default_dtype(base.config)
    states = {name.partition(_QUANT_STATE)[0]: name for name in base.tensors if _QUANT_STATE in name}
    for name, tensor in base.tensors.items():
        path = name.removesuffix(".weight")
        if name in states:
            kept[name] = _four_bit(base, tensor, base.tensors[states[name]], dtype)
            used |= {states[name], *(f"{name}.{end}" for end in _FOUR_BIT_PARTS)}
        elif f"{path}.SCB" in base.tensors and path != name:
            kept[name] = _eight_bit(base, tensor, dtype)
            used |= {f"{path}.SCB", f"{path}.weight_format"}
        else:
            kept[name] = tensor
    for name in used:
        kept.pop(name, None)
    for name, tensor in kept.items():
        ends = name.endswith((".SCB", *(f".{end}" for end in _FOUR_BIT_PARTS))) or _QUANT_STATE in name
        if ends or (name.endswith(".weight") and tensor.dtype in {"I8", "U8"}):
            raise _bad(tensor, f"is {tensor.dtype} {list(tensor.shape)}, and what would make a weight of it is missing")
    return kept


_FOUR_BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def _four_bit(base: Checkpoint, tensor: StoredTensor, state: StoredTensor, dtype: str) -> FourBit:
    """A weight by its quant_state, a JSON object stored as bytes."""
    try:
        told = json.loads(state.read_bytes())
        shape, block = tuple(told["shape"]), told["blocksize"]
        rounding = dtypes.NAMES[told["dtype"]]
        doubled = None if "nested_blocksize" not in told else (told["nested_blocksize"], float(told["nested_offset"]))
        counts = [*shape, block, *(doubled or ())[:1]]
        valid = told["quant_type"] in {"nf4", "fp4"} and all(type(n) is int and n > 0 for n in counts) and not block % 2
    except (ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise _bad(state, "is no quant_state of bitsandbytes; from the Hub, download the base with `pull` first")
    items, name = math.prod(shape), tensor.name
    if tensor.n_bytes != -(-items // 2):
        raise _bad(tensor, f"has {tensor.n_bytes:,} bytes, expected half of the {items:,} of {list(shape)}")
    blocks = -(-items // block)
    nested = None
    if doubled is not None:
        absmax = _part(base, tensor, f"{name}.nested_absmax", "F32", -(-blocks // doubled[0]))
        nested = (absmax, _part(base, tensor, f"{name}.nested_quant_map", "F32", 256), *doubled)
    scales = _part(base, tensor, f"{name}.absmax", "F32" if nested is None else "U8", blocks)
    codes = _part(base, tensor, f"{name}.quant_map", "F32", 16)
    where = (tensor.file, tensor.begin, tensor.n_bytes)
    return FourBit(name, dtype, shape, *where, tensor, scales, codes, block, rounding, nested)


def _eight_bit(base: Checkpoint, tensor: StoredTensor, dtype: str) -> EightBit:
    path = tensor.name.removesuffix(".weight")
    if tensor.dtype != "I8" or len(tensor.shape) != 2 or not tensor.items:
        raise _bad(tensor, f"is {tensor.dtype} {list(tensor.shape)} beside an SCB, expected I8 with 2 dims")
    layout = base.tensors.get(f"{path}.weight_format")
    if layout is not None and any(layout.read_bytes()):
        raise _bad(layout, "says that the weight is not stored row by row, which is the only layout that is read")
    scales = _part(base, tensor, f"{path}.SCB", "F32", tensor.shape[0])
    return EightBit(tensor.name, dtype, tensor.shape, tensor.file, tensor.begin, tensor.n_bytes, tensor, scales)


def _float8(base: Checkpoint, config: dict[str, Any]) -> dict[str, StoredTensor]:
    kept: dict[str, StoredTensor] = {}
    used: set[str] = set()
    dtype = _default_dtype(base.config)
    for name, tensor in base.tensors.items():
        scales = next((s for s in (f"{name}_scale_inv", f"{name}_scale") if s in base.tensors), None)
        if scales is not None and tensor.dtype in _FP8:
            kept[name] = _scaled(tensor, base.tensors[scales], config, dtype)
            used.add(scales)
        elif not name.endswith(_NOT_WEIGHTS):
            kept[name] = tensor
    for name in used:
        kept.pop(name)
    for name, tensor in kept.items():
        of_weight = name.endswith("_scale") and name.removesuffix("_scale") in base.tensors
        if of_weight or name.endswith(("_scale_inv", ".weight_zero_point", ".weight_packed")):
            raise _bad(tensor, "belongs to no F8_E4M3 or F8_E5M2 weight")
    return kept


def _scaled(tensor: StoredTensor, scales: StoredTensor, config: dict[str, Any], dtype: str) -> Float8:
    """A weight by the shape of its scales: one, one a row or a column, or one a block of the config's size."""
    height, columns = (1, *tensor.shape)[-2:]
    above = math.prod(tensor.shape[:-2])
    shape = scales.shape
    if len(shape) == 1 and shape[0] == height and len(tensor.shape) == 2:
        shape = (height, 1)
    if scales.items == 1:
        shape = (1, 1)
    shape = (*(1,) * (2 - len(shape)), *shape)
    grid = (math.prod(shape[:-2]), shape[-2], shape[-1])
    block = _block_size(config)
    sides = _side(height, grid[1], block[0]), _side(columns, grid[2], block[1])
    powers = scales.dtype in {"F8_E8M0", "U8"}
    if 0 in sides or not tensor.items or grid[0] not in {1, above} or not (powers or scales.dtype in dtypes.FLOATS):
        raise _bad(
            scales, f"is {scales.dtype} {list(scales.shape)}, no scales for {list(tensor.shape)} in blocks of {block}"
        )
    where = (tensor.file, tensor.begin, tensor.n_bytes)
    return Float8(tensor.name, dtype, tensor.shape, *where, tensor, scales, grid, sides)


def _side(size: int, scales: int, block: int) -> int:
    """How many of `size` numbers share a scale, 0 where the numbers of scales says nothing that makes sense."""
    if scales == 1:
        return max(size, 1)
    return block if -(-size // block) == scales else int(scales == size)


def _block_size(config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block of scales: transformers' field, or compressed-tensors', else DeepSeek's 128 x 128."""
    groups = config.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    told = [config.get("weight_block_size"), *(w.get("block_structure") for w in weights if isinstance(w, dict))]
    for size in told:
        if isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
            return size[0], size[1]
    return 128, 128
