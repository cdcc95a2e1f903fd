"""Places of a pickled base's tensors: what lies there is what torch.load gives."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from prolora_tools.errors import InputError, ProloraError, UnsupportedError
from prolora_tools.files.checkpoint import Checkpoint
from prolora_tools.files.pickled import DTYPES, read_places, read_whole
from tests.failing.build import Evil

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def held(folder: Path, state: dict[str, torch.Tensor], **how: Any) -> None:
    """Save, find, and compare the bytes with those in memory."""
    file = folder / "pytorch_model.bin"
    torch.save(state, file, **how)
    places = read_places(file)
    assert places.keys() == state.keys()
    for name, tensor in state.items():
        place = places[name]
        assert (place.shape, place.dtype) == (tensor.shape, DTYPES[str(tensor.dtype).removeprefix("torch.")])
        assert place.file == file
        expected = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert place.read_bytes() == expected, name
    assert [p.begin for p in places.values()] == sorted(p.begin for p in places.values())


def draw_of(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 100, shape, generator=generator)
    return values.to(dtype)


@SETTINGS
@given(
    entries=st.lists(
        st.tuples(
            st.lists(st.integers(0, 6), max_size=3).map(tuple),
            st.sampled_from([getattr(torch, name) for name in DTYPES if name != "float8_e8m0fnu"]),
        ),
        max_size=8,
    ),
    constant=st.booleans(),
)
def test_any_shapes_and_dtypes(
    entries: list[tuple[tuple[int, ...], torch.dtype]], constant: bool, tmp_path: Path
) -> None:
    """Scalars, empty tensors, and records of one size and content, which cannot be told apart by their bytes."""
    held(tmp_path, {f"t{i}": draw_of(0 if constant else i, *entry) for i, entry in enumerate(entries)})


def test_shared_storages(tmp_path: Path) -> None:
    """A tied head; slices of one storage, from its middle and its end; a parameter."""
    table, large = torch.randn(6, 4), torch.randn(100)
    state = {"embed.weight": nn.Parameter(table), "head.weight": table, "middle": large[10:22].view(3, 4)}
    state |= {"end": large[96:], "rows": table[2:4], "column": torch.randn(5, 1).T, "last": torch.randn(2)}
    held(tmp_path, state)
    places = read_places(tmp_path / "pytorch_model.bin")
    assert places["embed.weight"].begin == places["head.weight"].begin
    assert places["rows"].begin == places["head.weight"].begin + 32


def test_many_tensors_of_one_size(tmp_path: Path) -> None:
    """The start of the map fits at every record but the last, by sizes alone."""
    held(tmp_path, {f"t{i}": torch.full((8, 8), float(i)) for i in range(20)})
    held(tmp_path, {f"t{i}": torch.zeros(8, 8) for i in range(20)})
    records = {f"t{i}": torch.full((8, 8), float(i)) for i in range(9)}
    held(tmp_path, dict(reversed(records.items())))


@pytest.mark.parametrize("view", [torch.ones(4, 6).T, torch.ones(4, 6)[:, :3], torch.ones(1).expand(4)])
def test_numbers_that_are_not_in_a_row_are_refused(view: torch.Tensor, tmp_path: Path) -> None:
    torch.save({"turned": view}, tmp_path / "x.bin")
    with pytest.raises(UnsupportedError) as caught:
        read_places(tmp_path / "x.bin")
    assert caught.value.code == "bin-not-contiguous"
    assert "'turned'" in caught.value.message


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_an_archive_that_was_packed_anew(method: int, tmp_path: Path) -> None:
    """Uncompressed it is as good as torch's own; compressed it cannot be mapped."""
    state = {"a": torch.arange(50.0), "b": torch.arange(9)}
    torch.save(state, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as old, zipfile.ZipFile(tmp_path / "y.bin", "w") as new:
        for info in old.infolist():
            data = "/data/" in info.filename
            new.writestr(info.filename, old.read(info), method if data else zipfile.ZIP_STORED)
    if method == zipfile.ZIP_STORED:
        assert read_places(tmp_path / "y.bin")["b"].read_bytes() == state["b"].numpy().tobytes()
        return
    with pytest.raises(ProloraError) as caught:
        read_places(tmp_path / "y.bin")
    assert caught.value.code in {"bin-places", "bin-unreadable"}


def test_the_old_format_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError) as caught:
        read_places(tmp_path / "x.bin")
    assert caught.value.code == "bin-old"
    assert read_whole(tmp_path / "x.bin")["a"].read().tolist() == [1, 1, 1]  # an adapter may be that old


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(3), "b": Evil()}, tmp_path / "x.bin")
    with pytest.raises(InputError) as caught:
        read_places(tmp_path / "x.bin")
    assert caught.value.code == "bin-unreadable"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "odd", [torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.complex64), {"a": torch.ones(2)}, 1, None]
)
def test_what_is_no_tensor_is_refused(odd: object, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3), "odd": odd}, tmp_path / "x.bin")
    with pytest.raises(InputError) as caught:
        read_places(tmp_path / "x.bin")
    assert caught.value.code == "bin-content"


@SETTINGS
@given(data=st.data())
def test_damaged_files_are_typed_errors(data: st.DataObject, tmp_path: Path) -> None:
    """Cut off, or a byte changed: the tensors' bytes as they are in the file, or a typed error."""
    file = tmp_path / "x.bin"
    torch.save({"a": torch.arange(20.0), "b": torch.arange(5)}, file)
    raw = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        places = read_places(file)
    except ProloraError:
        return
    for place in places.values():
        assert len(place.read_bytes()) == place.n_bytes


def shard(folder: Path, **files: dict[str, torch.Tensor]) -> dict[str, str]:
    """Shards of a pickled base, and what its index says."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name, tensors in files.items():
        torch.save(tensors, folder / f"{name}.bin")
    return {key: f"{name}.bin" for name, tensors in files.items() for key in tensors}


def test_shards_get_the_names_that_transformers_gives(tmp_path: Path) -> None:
    weight_map = shard(tmp_path, odd_b={"x": torch.ones(2)}, odd_a={"y": torch.ones(3), "z": torch.ones(1)})
    index = {"metadata": {"total_size": 24}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    base = Checkpoint.open(tmp_path, pickled=True)
    assert {k: list(v) for k, v in base.shards.items()} == {
        "model-00001-of-00002.safetensors": ["y", "z"],
        "model-00002-of-00002.safetensors": ["x"],
    }
    assert [f.name for f in base.files] == ["odd_a.bin", "odd_b.bin"]
    with pytest.raises(InputError, match="neither"):
        Checkpoint.open(tmp_path)  # for what must be safetensors
