"""State dicts that torch.save wrote, through torch's weights_only unpickler and nothing else.

Adapters are small and are read whole. A base's weights are not read: torch maps the file, and what is wanted of each
tensor is its place in it, so that it can be read and copied like a tensor of a safetensors file.
"""

from __future__ import annotations

import os
import re
import zipfile
from typing import TYPE_CHECKING, Any

from prolora_tools.errors import InputError, UnsupportedError, first_line
from prolora_tools.files.tensors import LoadedTensor, StoredTensor, reading

if TYPE_CHECKING:
    from pathlib import Path

    import torch

FLOATS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names of the dtypes that an adapter may have."""

DTYPES = {
    **FLOATS, "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
    "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
"""torch's names of the dtypes that a base may have, and safetensors' names of them."""

_SAMPLE = 64
"""Bytes compared at each end of a tensor, to make sure that its place was found."""


def read_whole(file: Path) -> dict[str, StoredTensor]:
    """The float tensors of a pickled state dict, with their values.

    Raises:
        InputError: the file is missing or broken, or holds anything but float tensors.
    """
    found: dict[str, StoredTensor] = {}
    for name, (dtype, value) in _load(file, "float tensor", FLOATS).items():
        raw = _bytes(value.contiguous())
        found[name] = LoadedTensor(name, dtype, tuple(value.shape), file, 0, len(raw), raw)
    return found


def read_places(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a pickled state dict lie in their file, in the order of their data.

    Tensors that share a storage, as a tied head and its embedding do, have the same place or overlap. Memory: pages
    of the file, mapped while this runs.

    Raises:
        InputError: the file is missing or broken, or holds anything but tensors.
        UnsupportedError: the file has torch's format from before 1.6, which cannot be mapped, or a tensor's numbers
            do not lie one after the other in it.
    """
    with reading(file), file.open("rb") as f:
        zipped = f.read(4) == b"PK\x03\x04"
    if not zipped:
        raise UnsupportedError(
            "bin-old",
            f"{file} is no zip archive, which torch.save has written since torch 1.6",
            hint="if it is a Git LFS pointer, run git lfs pull; if it is an old file, load the model with transformers "
            "and save_pretrained() it",
        )
    state = _load(file, "tensor", DTYPES, mmap=True)
    with reading(file), file.open("rb") as f:
        places = _places(file, f.fileno(), _records(f), state)
    return {t.name: t for t in sorted(places, key=lambda t: t.begin)}


def _load(file: Path, what: str, known: dict[str, str], **how: Any) -> dict[str, tuple[str, torch.Tensor]]:
    """The entries of a state dict, which must be tensors of the `known` dtypes: name -> (dtype, tensor)."""
    import torch  # noqa: PLC0415 - only files of this kind need torch

    with reading(file):
        file.open("rb").close()
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, **how)
    except Exception as error:  # a broken pickle makes torch raise anything, IndexError and TypeError too
        # The whole message of an UnpicklingError advises to run the code all the same.
        why = re.search("(WeightsUnpickler error|Trying to load unsupported GLOBAL).*", str(error))
        raise InputError(
            "bin-unreadable",
            f"{file}: torch.load(weights_only=True) refuses it: {why[0] if why else first_line(error)}",
            hint="the file is damaged, or holds code; get it as safetensors",
        ) from error
    found = {}
    for name, value in state.items() if isinstance(state, dict) else [("", state)]:
        strided = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.device.type == "cpu"
        dtype = known.get(str(value.dtype).removeprefix("torch.")) if strided else None
        if not isinstance(name, str) or dtype is None:
            raise InputError(
                "bin-content",
                f"{file}: the entry {name!r} is a {type(value).__name__}, expected a {what} by its name",
                hint="get it as safetensors",
            )
        found[name] = dtype, value.detach()
    return found


def _bytes(value: torch.Tensor) -> bytes:
    import torch  # noqa: PLC0415 - only files of this kind need torch

    return value.reshape(-1).view(torch.uint8).numpy().tobytes()


def _records(f: Any) -> dict[int, int]:
    """Offset -> size of every uncompressed record of a zip archive, by its directory; none if it cannot be read."""
    records = {}
    try:
        with zipfile.ZipFile(f) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    continue
                # The local header's extra field is longer than the directory's: torch aligns the data with it.
                head = os.pread(f.fileno(), 30, info.header_offset)
                names = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
                records[info.header_offset + 30 + names] = info.file_size
    except (zipfile.BadZipFile, ValueError):
        return {}
    return records


def _places(
    file: Path, handle: int, records: dict[int, int], state: dict[str, tuple[str, torch.Tensor]]
) -> list[StoredTensor]:
    """The place of each tensor.

    torch does not tell where a storage lies in the file, but it maps the file as one piece: every address is the
    start of the map plus an offset of a record. The start is the one for which all storages are records, of their
    sizes, and the file holds the bytes there that the tensors have.
    """
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for _, t in state.values()) if s.nbytes()}
    for name, (_, value) in state.items():
        if not value.is_contiguous():
            raise UnsupportedError(
                "bin-not-contiguous",
                f"{file}: the numbers of {name!r}, {list(value.shape)}, do not lie one after the other in the file: "
                f"its strides are {list(value.stride())}",
                hint="load the model with transformers and save_pretrained() it",
            )
    lowest = min(storages, default=0)
    for offset in records if storages else [0]:
        start = lowest - offset
        if all(records.get(address - start) == size for address, size in storages.items()):
            places = [_place(file, name, *entry, start) for name, entry in state.items()]
            if all(_holds(handle, place, state[place.name][1]) for place in places):
                return places
    raise UnsupportedError(
        "bin-places",
        f"{file}: the tensors that torch reads from it are not found as they are in the file",
        hint="load the model with transformers and save_pretrained() it",
    )


def _place(file: Path, name: str, dtype: str, value: torch.Tensor, start: int) -> StoredTensor:
    n_bytes = value.numel() * value.element_size()
    begin = value.data_ptr() - start if n_bytes else 0
    return StoredTensor(name, dtype, tuple(value.shape), file, begin, n_bytes)


def _holds(handle: int, place: StoredTensor, value: torch.Tensor) -> bool:
    """Whether the file has a tensor's first and last numbers at its place."""
    flat, count = value.reshape(-1), max(1, _SAMPLE // value.element_size())
    for part, begin in ((flat[:count], place.begin), (flat[-count:], place.begin + place.n_bytes)):
        expected = _bytes(part)
        at = begin if begin == place.begin else begin - len(expected)
        if os.pread(handle, len(expected), at) != expected:
            return False
    return True
