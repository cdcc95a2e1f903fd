"""Our reader and writer of safetensors files against the library itself."""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from prolora_tools.errors import InputError, ProloraError
from prolora_tools.files import dtypes
from prolora_tools.files.tensors import (
    ITEM_ORDER,
    MAX_HEADER,
    StoredTensor,
    _pread_all,
    check_finite,
    layout,
    read_header,
)
from prolora_tools.files.writer import write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).with_name("golden.safetensors")

STRICTER = {"json-duplicate-key", "safetensors-entry", "safetensors-dtype"}
"""What we refuse and the library reads: keys given twice, entries written as arrays, dtypes written as objects."""

Entry = dict[str, Any]


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | str:
    """What our reader makes of a file, or the slug of its error."""
    try:
        tensors, _ = read_header(path)
        return {name: (t.dtype, t.shape, t.read_bytes()) for name, t in tensors.items()}
    except InputError as error:
        return error.code


def theirs(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | str:
    """What the library makes of it, or its error."""
    try:
        return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in deserialize(raw)}  # type: ignore[no-untyped-call] # its stub has no types
    except SafetensorError as error:
        return str(error)


def compare(raw: bytes, path: Path) -> None:
    path.write_bytes(raw)
    found, expected = ours(path), theirs(raw)
    if isinstance(found, str) and not isinstance(expected, str):
        assert found in STRICTER, f"refused as {found}: {raw!r}"
        if found != "json-duplicate-key":
            entries = [v for k, v in json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]).items() if k[:2] != "__"]
            assert any(isinstance(e, list) or isinstance(e["dtype"], dict) for e in entries)
    elif isinstance(expected, str):
        assert isinstance(found, str), f"accepted what the library refuses, {expected}: {raw!r}"
    else:
        assert found == expected


def packed(header: object, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header, ensure_ascii=False).encode("utf-8")
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


@st.composite
def sound(draw: st.DrawFn) -> tuple[dict[str, Entry], int]:
    """A sound header and the size of its data; sub-byte dtypes fill whole bytes."""
    names = draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), unique=True, max_size=4))
    header: dict[str, Entry] = {}
    at = 0
    for name in names:
        dtype = draw(st.sampled_from(sorted(dtypes.ITEM_BITS)))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        if dtypes.n_bytes(dtype, math.prod(shape)) is None:
            shape = [*shape, 8]
        size = dtypes.n_bytes(dtype, math.prod(shape))
        assert size is not None
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header.pop("__metadata__", None)
    return header, at


numbers = st.one_of(st.integers(-3, 40), st.sampled_from([2**31, 2**40, 2**63, 2**64 - 1, 2**64, 2**70, 0.0, 1.5]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(st.characters(codec="utf-8"), max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=5,
)


def spoil(draw: Callable[[Any], Any], entry: Entry) -> object:
    """One entry of a header, changed in one place or as a whole."""
    changed = dict(entry)
    field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    match draw(st.sampled_from(["field", "drop", "extra", "offset", "dim", "entry"])):
        case "field":
            changed[field] = draw(st.one_of(values, st.sampled_from(sorted(dtypes.ITEM_BITS))))
        case "drop":
            del changed[field]
        case "extra":
            changed[draw(st.text(max_size=3))] = draw(values)
        case "offset":
            changed["data_offsets"] = [o + draw(st.integers(-4, 4)) for o in entry["data_offsets"]]
        case "dim":
            changed["shape"] = draw(st.lists(numbers, max_size=4))
        case _:
            return draw(values)
    return changed


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_sound_and_spoilt_headers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    header, size = data.draw(sound())
    spoilt: dict[str, Any] = dict(header)
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), max_size=2)) if header else ():
        spoilt[name] = spoil(data.draw, header[name])
    if data.draw(st.booleans()):
        strings = st.dictionaries(st.text(max_size=2), st.text(max_size=2), max_size=2)
        spoilt["__metadata__"] = data.draw(st.one_of(strings, values))
    raw = json.dumps(spoilt, ensure_ascii=False).encode("utf-8", "surrogatepass")
    raw += b" " * data.draw(st.integers(0, 9))
    content = bytes(i % 251 for i in range(max(size + data.draw(st.sampled_from([0, 0, 0, 1, -1])), 0)))
    compare(packed(raw, content), tmp_path_factory.getbasetemp() / "header.safetensors")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_flipped_bytes(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    header, size = data.draw(sound())
    raw = bytearray(packed(header, bytes(size)))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(list(b'0123456789"{}[],:. aF'))))
    assume(b"-0" not in raw)  # an integer to Python, a float to the library
    compare(bytes(raw), tmp_path_factory.getbasetemp() / "flipped.safetensors")


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=60), length=st.one_of(st.none(), st.integers(0, 70)))
def test_any_bytes(raw: bytes, length: int | None, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = raw if length is None else struct.pack("<Q", length) + raw
    compare(whole, tmp_path_factory.getbasetemp() / "any.safetensors")


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"__metadata__": None},
        {"__metadata__": {"a": "b"}},
        {"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4], "more": {"x": 1}}},
        {"a": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F64", "shape": [2**62], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F4", "shape": [2**63], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": ["F32", [1], [0, 4]]},
        {"a": {"dtype": {"F32": None}, "shape": [1], "data_offsets": [0, 4]}},
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":NaN}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}',
        b'\n{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\t\r\n ',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\0',
        b'\xef\xbb\xbf{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"\\ud83d\\ude00":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
@pytest.mark.parametrize("data", [b"", bytes(4)])
def test_odd_headers(header: object, data: bytes, tmp_path: Path) -> None:
    compare(packed(header, data), tmp_path / "odd.safetensors")


def test_a_header_of_the_librarys_cap(tmp_path: Path) -> None:
    """One byte more than the cap is refused by both, before anything of it is read: the file is sparse."""
    path = tmp_path / "large.safetensors"
    with path.open("wb") as f:
        f.write(struct.pack("<Q", MAX_HEADER + 1))
        f.truncate(8 + MAX_HEADER + 1)
    assert ours(path) == "safetensors-header-size"
    assert "large" in str(theirs(struct.pack("<Q", MAX_HEADER + 1) + b"{}")).lower()


def test_errors_stay_short(tmp_path: Path) -> None:
    """What a hostile header says is not repeated whole, and no number in it is too long to print."""
    many = {"a": {"dtype": "F32", "shape": [2**63] * 100_000, "data_offsets": [0, 4]}}
    path = tmp_path / "long.safetensors"
    path.write_bytes(packed(many, bytes(4)))
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert len(caught.value.message) < 1000


# --- writing

GOLDEN_TENSORS = {
    "b.bf16": torch.tensor([[1.0, -2.5], [0.0, 3.140625]], dtype=torch.bfloat16),
    "a.f32": torch.tensor([1.0, -0.0, 1e-45]),
    "é.f64": torch.tensor(math.pi, dtype=torch.float64),
    "a.i64": torch.tensor([[1], [-1]]),
    'quoted "name"\n': torch.tensor([True, False, True]),
    "empty.f16": torch.zeros(0, 3, dtype=torch.float16),
}


def write(tensors: dict[str, torch.Tensor], path: Path) -> bytes:
    """Our file of torch tensors."""
    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    raw = {k: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for k, t in tensors.items()}
    path.unlink(missing_ok=True)
    size = write_safetensors(path, [(k, names[t.dtype], tuple(t.shape)) for k, t in tensors.items()], raw.__getitem__)
    assert path.stat().st_size == size
    return path.read_bytes()


def test_golden_bytes(tmp_path: Path) -> None:
    golden = GOLDEN.read_bytes()
    assert save(GOLDEN_TENSORS, {"format": "pt"}) == golden
    assert write(GOLDEN_TENSORS, tmp_path / "ours.safetensors") == golden
    assert struct.unpack("<Q", golden[:8])[0] % 8 == 0  # padded, so that what follows is aligned


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_our_bytes_are_the_librarys(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    kinds += [torch.int8, torch.uint8, torch.bool]
    names = data.draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), unique=True, max_size=5))
    tensors = {}
    for name in set(names) - {"__metadata__"}:
        kind = data.draw(st.sampled_from(kinds))
        shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
        tensors[name] = (torch.arange(math.prod(shape)).reshape(shape) % 3).to(kind)
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    assert write(tensors, path) == save(tensors, {"format": "pt"})


def test_item_order_has_every_dtype_once() -> None:
    assert sorted(ITEM_ORDER) == sorted(dtypes.ITEM_BITS)


def test_layout_of_sub_byte_dtypes_is_read_back(tmp_path: Path) -> None:
    specs = [("four", "F4", (2, 3)), ("six", "F6_E2M3", (4,)), ("eight", "F8_E4M3", (5,))]
    path = tmp_path / "small.safetensors"
    write_safetensors(path, specs, lambda name: bytes({"four": 3, "six": 3, "eight": 5}[name]))
    assert {(t.name, t.dtype, t.shape) for t in read_header(path)[0].values()} == set(specs)
    compare(path.read_bytes(), path)
    header, spans = layout(iter(specs))
    assert max(begin + size for begin, size in spans.values()) == len(header) + 11


# --- values


def stored(values: torch.Tensor, path: Path) -> StoredTensor:
    write({"x": values}, path)
    return read_header(path)[0]["x"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (3, 2, 2)])
def test_check_finite_names_the_row(bad: float, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.ones(shape)
    tensor = stored(values, tmp_path / "x.safetensors")
    check_finite(tensor.read(), tensor)
    values.reshape(-1)[-1] = bad
    tensor = stored(values, tmp_path / "x.safetensors")
    with pytest.raises(ProloraError, match=f"holds 1 inf or nan, first in row {shape[0] - 1 if shape else 0}"):
        check_finite(tensor.read(), tensor)


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pread gives 2 GiB at most; the loop for larger tensors is run on a small one."""
    values = torch.arange(1000.0)
    tensor = stored(values, tmp_path / "x.safetensors")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, n, at: real(handle, min(n, 300), at))
    with tensor.file.open("rb") as f:
        assert _pread_all(f, tensor) == values.numpy().tobytes()
