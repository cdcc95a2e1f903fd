"""safetensors files, read by header: strict validation first, tensor bytes on demand.

Format: 8 bytes little-endian header length, a JSON object of that length, then the data
(https://github.com/huggingface/safetensors#format). Our own parser, since the library does not tell where
in the file a tensor lies, which streaming needs. It is as strict as the library's, and refuses three things that
the library lets pass: a key given twice (which of the two would hold?), and an entry written as an array or a
dtype written as an object, accidents of the library's JSON reader.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from prolora_tools.errors import InputError, UnsupportedError
from prolora_tools.files import dtypes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from prolora_tools.files.dtypes import Floats

MAX_HEADER = 100_000_000
"""Header bytes accepted, the library's own cap."""

REDOWNLOAD = "copy or download the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: nothing of it is read yet.

    Attributes:
        name: its key.
        dtype: as safetensors spells it, such as BF16.
        shape: its dims.
        file: the file that holds it.
        begin: offset of its first byte in the file.
        n_bytes: its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    n_bytes: int

    @property
    def items(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def read_bytes(self) -> bytes:
        """All its bytes.

        Raises:
            InputError: the file ends early or cannot be read.
        """
        with reading(self.file), self.file.open("rb", buffering=0) as f:
            raw = os.pread(f.fileno(), self.n_bytes, self.begin) if self.n_bytes < 1 << 30 else _pread_all(f, self)
        if len(raw) != self.n_bytes:
            raise InputError(
                "file-changed",
                f"{self.file}: {self.name!r} has {len(raw):,} bytes where its header says {self.n_bytes:,}",
                hint="the file changed while it was read; run the command again",
            )
        return raw

    def read(self) -> Floats:
        """Its values in its shape, float32 (float64 for F64).

        Raises:
            UnsupportedError: not a float tensor.
            InputError: the file ends early or cannot be read.
        """
        self.require_float()
        return dtypes.decode(self.read_bytes(), self.dtype).reshape(self.shape)

    def require_float(self) -> None:
        """Raises UnsupportedError unless arithmetic can be done on this tensor."""
        if self.dtype not in dtypes.FLOATS:
            raise UnsupportedError(
                "tensor-not-float",
                f"{self.file}: {self.name!r} is {self.dtype}, expected one of {', '.join(dtypes.FLOATS)}",
                hint="quantised and integer tensors take no delta: give the float original",
            )


@dataclass(frozen=True)
class LoadedTensor(StoredTensor):
    """A tensor that has been read already, from a `.bin` file."""

    data: bytes = b""

    def read_bytes(self) -> bytes:
        """Its bytes."""
        return self.data


def _pread_all(f: Any, tensor: StoredTensor) -> bytes:
    """Read in pieces: one pread returns 2 GiB at most."""
    raw = bytearray()
    while len(raw) < tensor.n_bytes:
        piece = os.pread(f.fileno(), min(tensor.n_bytes - len(raw), 1 << 30), tensor.begin + len(raw))
        if not piece:
            break
        raw += piece
    return bytes(raw)


class reading:  # noqa: N801 - reads as a verb: `with reading(path):`
    """Turn an OSError while `path` is read into an InputError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Translate FileNotFoundError and other OSErrors; let everything else pass."""
        if isinstance(error, FileNotFoundError):
            raise InputError(
                "file-missing", f"{self.path} is missing", hint="check the path, or download the folder again"
            ) from error
        if isinstance(error, OSError):
            raise InputError(
                "file-unreadable",
                f"{self.path} cannot be read: {error.strerror or error}",
                hint="check that it is a file, its permissions and the disk",
            ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: missing, unreadable, no JSON, a key given twice, or no object.
    """
    with reading(path):
        raw = path.read_bytes()
    try:
        return _parse_object(raw, path)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "json-invalid", f"{path}: no JSON object: {error}", hint="repair the JSON, or download the file again"
        ) from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _parse_object(raw: bytes, path: Path, *, parse_constant: Callable[[str], object] | None = None) -> dict[str, Any]:
    """A JSON object that can be written again, every key given once; any other fault is a ValueError.

    Python's JSON knows NaN and Infinity, and configs written by transformers use them; `parse_constant` says what
    becomes of them.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise InputError(
                    "json-duplicate-key",
                    f"{path}: the key {key!r} stands twice in one JSON object",
                    hint="which of the two holds cannot be known: repair the file, or get it again",
                )
            seen[key] = value
        return seen

    parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=parse_constant)
    if not isinstance(parsed, dict):
        raise ValueError(f"it is a {type(parsed).__name__}")  # noqa: TRY004 - the caller asks for ValueErrors
    if b"\\ud" in raw.lower():
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return parsed


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata, by reading the header only.

    Returns:
        Tensors by name, in the order of their data, and the `__metadata__` strings.

    Raises:
        InputError: the file is missing, too short, or its header is not a valid one.
    """
    with reading(path), path.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        head = f.read(8)
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER:
            raise InputError(
                "safetensors-header-size",
                f"{path}: by its first 8 bytes the header has {length:,}, at most {MAX_HEADER:,} are accepted",
                hint="this is no safetensors file; if it is a Git LFS pointer, run git lfs pull",
            )
        if len(head) < 8 or length > size - 8:
            least = f"{8 + length:,}, 8 and the header" if len(head) == 8 else "8"
            raise InputError(
                "safetensors-truncated", f"{path}: {size:,} bytes long, expected at least {least}", hint=REDOWNLOAD
            )
        raw = f.read(length)
    try:
        header = _parse_object(raw, path, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "safetensors-header-json", f"{path}: the header is no JSON object: {error}", hint=REDOWNLOAD
        ) from error
    metadata = header.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InputError(
            "safetensors-metadata",
            f"{path}: __metadata__ is not an object of strings",
            hint="write the file again with the safetensors library",
        )
    tensors = [_stored_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.begin, t.n_bytes))
    _check_layout(path, tensors, 8 + length, size)
    return {t.name: t for t in tensors}, metadata


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _bits(dtype: str, shape: list[int]) -> int:
    """Bits of a tensor, or the first product of its dims, from the left, that is too large: as the library does."""
    items = 1
    for dim in shape:
        items *= dim
        if items >= 2**64:
            return items
    return items * dtypes.ITEM_BITS[dtype]


def _stored_tensor(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    """One entry of the header, checked by itself."""
    bad = f"{path}: the header's entry for {name!r}"
    hint = "write the file again with the safetensors library"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise InputError("safetensors-entry", f"{bad} is not an object of dtype, shape and data_offsets", hint=hint)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.ITEM_BITS:
        raise InputError("safetensors-dtype", f"{bad} has the unknown dtype {reprlib.repr(dtype)}", hint=hint)
    if not isinstance(shape, list) or not all(_is_count(d) for d in shape) or _bits(dtype, shape) >= 2**64:
        raise InputError(
            "safetensors-shape",
            f"{bad} has the shape {reprlib.repr(shape)}, expected whole numbers, under 2^64 bits",
            hint=hint,
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(o) for o in offsets):
        raise InputError(
            "safetensors-offsets",
            f"{bad} has the data_offsets {reprlib.repr(offsets)}, expected [begin, end]",
            hint=hint,
        )
    begin, end = offsets
    expected = dtypes.n_bytes(dtype, math.prod(shape))
    if end - begin != expected:
        whole = "whole bytes" if expected is None else f"{expected:,}"
        raise InputError(
            "safetensors-size",
            f"{bad} has the data_offsets {offsets}, {end - begin:,} bytes, expected {whole} for {dtype} {shape}",
            hint=REDOWNLOAD,
        )
    return StoredTensor(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def _check_layout(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The data must be covered without a gap or an overlap, as the format asks."""
    at = data_start
    for tensor in tensors:
        if tensor.begin != at:
            what = "overlaps the tensor before it" if tensor.begin < at else "leaves a gap before it"
            raise InputError(
                "safetensors-layout",
                f"{path}: {tensor.name!r} starts at byte {tensor.begin:,}, expected {at:,}: it {what}",
                hint=REDOWNLOAD,
            )
        at += tensor.n_bytes
    if at != size:
        raise InputError(
            "safetensors-data-size", f"{path}: {size:,} bytes long, expected {at:,} from its header", hint=REDOWNLOAD
        )


def layout(tensors: Iterator[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header of a new safetensors file, and the span of every tensor in it.

    Tensors stand as the library writes them: wide dtypes first, then by name; the header is padded to 8 bytes
    and has the one metadata entry that transformers asks for, {"format": "pt"}.

    Args:
        tensors: (name, dtype, shape) of each.

    Returns:
        The bytes before the data, and for each name its (begin, n_bytes) counted from the file's start.
    """
    ordered = sorted(tensors, key=lambda t: (-ITEM_ORDER.index(t[1]), t[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, spans = 0, {}
    for name, dtype, shape in ordered:
        size = dtypes.n_bytes(dtype, math.prod(shape))
        assert size is not None  # it was read from a file with whole bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        spans[name] = (at, size)
        at += size
    blob = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    blob += b" " * (-len(blob) % 8)
    start = 8 + len(blob)
    return len(blob).to_bytes(8, "little") + blob, {name: (start + b, n) for name, (b, n) in spans.items()}


ITEM_ORDER = (
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
    "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
)  # fmt: skip
"""The library's order of dtypes; a test holds our files to its bytes."""


def check_finite(values: Floats, tensor: StoredTensor) -> None:
    """Raises InputError naming the first row of `values` that holds inf or nan."""
    finite = np.isfinite(values)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0]) if values.ndim else 0
        raise InputError(
            "tensor-not-finite",
            f"{tensor.file}: {tensor.name!r} holds {np.count_nonzero(~finite):,} inf or nan, first in row {row}",
            hint="the training diverged or the file is damaged: use an earlier checkpoint",
        )
