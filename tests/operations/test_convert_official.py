"""Checkpoints of the official code, made by an independent reimplementation, read exactly."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prolora_tools
from prolora_tools.errors import InputError, MismatchError, ProloraError, RequestError, UnsupportedError
from prolora_tools.files.adapter import Adapter
from tests.oracles import official
from tests.support import tensors_of

SHAPE: dict[str, Any] = {"r": 8, "u": 1, "m": 7, "n": 5, "h": 40, "o": 33}


def raw(folder: Path, *, file: str = "adapter_model.safetensors", layers: int = 2, **shape: Any) -> tuple[Path, Any]:
    made = {f"model.layers.{i}.self_attn.q_proj": official.layer(i, **shape) for i in range(layers)}
    tensors = {f"{path}.{name}": t for path, parts in made.items() for name, t in parts.items()}
    return official.write(folder, tensors, r=shape["r"], file=file), made


def check(out: Path, made: Any, **shape: int) -> None:
    """Our reading expands to the official expansion, bit for bit."""
    adapter = Adapter.open(out)
    dims = {k: shape[k] for k in ("m", "n", "h", "o")}
    for path, parts in made.items():
        a, b = official.expanded(parts, **dims)
        found_a, found_b = adapter.modules[path].factors()
        np.testing.assert_array_equal(found_a, a.numpy())
        np.testing.assert_array_equal(found_b, b.numpy())
        assert adapter.modules[path].scaling == 16 / shape["r"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_raw_checkpoints(file: str, tmp_path: Path) -> None:
    folder, made = raw(tmp_path / "raw", file=file, **SHAPE)
    report = prolora_tools.convert_official(folder, tmp_path / "out")
    assert (report.rank, report.unshared, report.chunks_a, report.chunks_b) == (8, 1, 7, 5)
    check(tmp_path / "out", made, **SHAPE)
    prolora_tools.expand(tmp_path / "out", tmp_path / "lora")
    expanded = tensors_of(tmp_path / "lora")
    for path, parts in made.items():
        a, b = official.expanded(parts, m=7, n=5, h=40, o=33)
        assert torch.equal(expanded[f"base_model.model.{path}.lora_A.weight"], a)
        assert torch.equal(expanded[f"base_model.model.{path}.lora_B.weight"], b)


@settings(deadline=None)
@given(
    r=st.integers(1, 7), m=st.integers(1, 9), n=st.integers(1, 9), h=st.integers(1, 30), o=st.integers(1, 30),
    data=st.data(),
)  # fmt: skip
def test_every_shape_is_read_exactly_or_asked_about(r: int, m: int, n: int, h: int, o: int, data: Any) -> None:
    u = data.draw(st.integers(1, r))
    shape: dict[str, Any] = {"r": r, "u": u, "m": m, "n": n, "h": h, "o": o}
    with TemporaryDirectory() as name:
        folder, made = raw(Path(name) / "raw", layers=1, **shape)
        try:
            prolora_tools.convert_official(folder, Path(name) / "out")
        except RequestError as error:
            if error.code != "official-ambiguous":
                raise
            prolora_tools.convert_official(folder, Path(name) / "out", chunks=(m, n))
        check(Path(name) / "out", made, **shape)


def test_where_several_chunks_fit_it_asks(tmp_path: Path) -> None:
    """Five columns in chunks of two: 3 or 4 chunks, whose strides differ with twelve shared ranks."""
    shape: dict[str, Any] = {"r": 13, "u": 1, "m": 4, "n": 1, "h": 5, "o": 6}
    folder, made = raw(tmp_path / "raw", **shape)
    with pytest.raises(RequestError, match="3, 4 chunks of A") as caught:
        prolora_tools.convert_official(folder, tmp_path / "out")
    assert caught.value.code == "official-ambiguous"
    assert not (tmp_path / "out").exists()
    prolora_tools.convert_official(folder, tmp_path / "out", chunks=(4, 1))
    check(tmp_path / "out", made, **shape)
    with pytest.raises(MismatchError, match="2 chunks of A do not give"):
        prolora_tools.convert_official(folder, tmp_path / "out2", chunks=2)


def base_folder(folder: Path, h: int, o: int, layers: int = 2) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(
        {f"model.layers.{i}.self_attn.q_proj.weight": torch.zeros(o, h) for i in range(layers)},
        folder / "model.safetensors",
    )
    return folder


def test_without_unshared_ranks_the_base_tells_the_dims(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"r": 4, "u": 0, "m": 4, "n": 3, "h": 38, "o": 31}
    folder, made = raw(tmp_path / "raw", **shape)
    with pytest.raises(RequestError) as caught:
        prolora_tools.convert_official(folder, tmp_path / "out", chunks=(4, 3))
    assert caught.value.code == "official-needs-base"
    prolora_tools.convert_official(folder, tmp_path / "out", base=base_folder(tmp_path / "base", 38, 31))
    check(tmp_path / "out", made, **shape)
    with pytest.raises(MismatchError) as mismatch:
        prolora_tools.convert_official(folder, tmp_path / "out2", base=base_folder(tmp_path / "other", 7, 31))
    assert mismatch.value.code == "official-no-chunks"


def test_a_folder_with_both_kinds_gives_the_raw_one(tmp_path: Path) -> None:
    folder, made = raw(tmp_path / "both", **SHAPE)
    tensors: dict[str, torch.Tensor] = {}
    for path, parts in made.items():
        a, b = official.expanded(parts, m=7, n=5, h=40, o=33)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    official.write(folder, tensors, r=8, file="adapter_model.bin")
    report = prolora_tools.convert_official(folder, tmp_path / "out")
    assert report.file == "adapter_model.safetensors"
    assert report.notes == ("adapter_model.bin is there too and was not used; adapter_model.safetensors was",)
    check(tmp_path / "out", made, **SHAPE)


def test_other_commands_send_raw_checkpoints_here(tmp_path: Path) -> None:
    folder, _ = raw(tmp_path / "raw", **SHAPE)
    with pytest.raises(UnsupportedError, match="raw training checkpoint") as caught:
        prolora_tools.stats(folder)
    assert "convert-official" in caught.value.hint


def test_damaged_checkpoints(tmp_path: Path) -> None:
    def error(name: str, change: Any, **config: Any) -> str:
        made = {f"model.q_proj.{k}": v for k, v in official.layer(0, **SHAPE).items()}
        change(made)
        folder = official.write(tmp_path / name, made, file="adapter_model.safetensors", **{"r": 8, **config})
        with pytest.raises(ProloraError) as caught:
            prolora_tools.convert_official(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return caught.value.code

    assert error("1", lambda t: t.pop("model.q_proj.lora_B_vec")) == "official-missing-tensor"
    assert error("2", lambda t: t.update({"model.q_proj.lora_C": torch.zeros(1)})) == "official-unknown-tensor"
    assert error("3", lambda t: t.update({"model.q_proj.lora_B_vec": torch.zeros(33, 1)})) == "official-shape"
    assert error("4", lambda _: None, r=9) == "official-rank"
    assert error("5", lambda t: t["model.q_proj.lora_A_vec"].fill_(torch.nan)) == "tensor-not-finite"
    assert (
        error(
            "6",
            lambda t: t.update({"other.lora_A.weight": torch.zeros(1, 3), "other.lora_B.weight": torch.zeros(3, 1)}),
        )
        == "official-needs-base"
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "adapter_config.json").write_text(json.dumps({**official.CONFIG, "r": 8}))
    with pytest.raises(InputError) as caught:
        prolora_tools.convert_official(empty, tmp_path / "out")
    assert caught.value.code == "official-no-weights"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_final_adapters_are_recognised(file: str, tmp_path: Path) -> None:
    """The official code ends with ordinary expanded factors: the chunks come back from the numbers, bit for bit."""
    shape: dict[str, Any] = {"r": 8, "u": 1, "m": 7, "n": 7, "h": 140, "o": 84}
    tensors: dict[str, torch.Tensor] = {}
    made = {f"model.layers.{i}.self_attn.q_proj": official.layer(i, **shape) for i in range(2)}
    for path, parts in made.items():
        a, b = official.expanded(parts, m=7, n=7, h=140, o=84)
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
    folder = official.write(tmp_path / "final", tensors, r=8, file=file)
    report = prolora_tools.convert_official(folder, tmp_path / "out")
    assert (report.source_kind, report.rank, report.unshared) == ("expanded", 8, 1)
    assert (report.chunks_a, report.chunks_b) == (7, 7)
    check(tmp_path / "out", made, **shape)
    assert report.parameters == 2 * sum(t.numel() for t in official.layer(0, **shape).values())
    with pytest.raises(RequestError) as caught:
        prolora_tools.convert_official(folder, tmp_path / "out2", dry_run=True)
    assert caught.value.code == "official-dry-run"
