"""`compress` with the fit: bytes, strides in the config, modules of many shapes, never worse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import prolora_tools
from prolora_tools.errors import RequestError
from prolora_tools.files.adapter import Adapter
from prolora_tools.operations import compress as operation
from tests.support import model, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

NAME = "llama-tiny-py-r8"


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def config(folder: Path) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return parsed


@pytest.mark.parametrize("shape", [{"unshared": 0, "chunks": 2}, {"unshared": 2, "chunks": (4, 3)}])
def test_the_same_command_gives_the_same_bytes_whatever_the_windows(
    shape: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prolora_tools.compress(model(NAME), tmp_path / "one", **shape)
    prolora_tools.compress(model(NAME), tmp_path / "two", **shape)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr(operation, "_WINDOW", 1)
    monkeypatch.setattr(operation, "_BATCH", 1)
    monkeypatch.setattr(operation, "cores", lambda: 1)
    prolora_tools.compress(model(NAME), tmp_path / "three", **shape)
    assert files(tmp_path / "one") == files(tmp_path / "three")


@pytest.mark.parametrize("name", [NAME, "gpt2-tiny-py-r8", "minilm-codesearch-r8"])
def test_fit_is_better_than_the_averages_module_by_module(name: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"unshared": 1, "chunks": 3, "strides": "official"}
    by_method = {
        method: prolora_tools.compress(model(name), tmp_path / method, method=method, **shape)
        for method in ("average", "align", "fit")
    }
    best = prolora_tools.compress(model(name), tmp_path / "best", **shape)
    assert best.method == "best"
    for i, module in enumerate(by_method["fit"].modules):
        assert module.method == "fit"
        others = [by_method[m].modules[i].relative_error or 0.0 for m in ("average", "align")]
        assert module.relative_error is not None
        assert module.relative_error <= min(others)
        assert best.modules[i].relative_error == module.relative_error
    assert (by_method["fit"].relative_error or 0) < 0.95 * (by_method["align"].relative_error or 0)


def test_told_errors_are_measured_ones(tmp_path: Path) -> None:
    report = prolora_tools.compress(model(NAME), tmp_path / "c", unshared=0, chunks=2)
    measured = prolora_tools.diff(model(NAME), tmp_path / "c").relative_error
    assert report.relative_error == pytest.approx(measured, rel=1e-9)


def test_free_strides_are_written_and_reported(tmp_path: Path) -> None:
    report = prolora_tools.compress(model(NAME), tmp_path / "free", unshared=0, chunks=2)
    written = config(tmp_path / "free")
    pair = written["stride_A"], written["stride_B"]
    assert {m.distinct_blocks for m in report.modules} == {4}  # of four; 2 with the official strides
    assert {(m.stride_a, m.stride_b) for m in report.modules} == {pair}
    assert {(m.geometry.a.stride, m.geometry.b.stride) for m in Adapter.open(tmp_path / "free").modules.values()} == {
        pair
    }
    official = prolora_tools.compress(model(NAME), tmp_path / "official", unshared=0, chunks=2, strides="official")
    assert config(tmp_path / "official")["stride_A"] is None
    assert (report.relative_error or 1) < 0.6 * (official.relative_error or 0)
    given = prolora_tools.compress(model(NAME), tmp_path / "given", unshared=0, chunks=2, strides=pair)
    assert given.relative_error == report.relative_error
    assert files(tmp_path / "given") == files(tmp_path / "free")


def test_averages_keep_the_official_strides_unless_told(tmp_path: Path) -> None:
    report = prolora_tools.compress(model(NAME), tmp_path / "c", unshared=0, chunks=2, method="align")
    assert {(m.stride_a, m.stride_b) for m in report.modules} == {(4, 4)}


def test_every_shared_rank_has_strides_of_its_own(tmp_path: Path) -> None:
    """Ranks 4 and 8, both with m = n = 2: patterns in the config, which the reader understands."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rank in (("q_proj", 4), ("v_proj", 8), ("o_proj", 1)):
        key = f"base_model.model.model.layers.0.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 40, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
    names = {"q_proj": 4, "o_proj": 1}
    adapter = write_adapter(tmp_path / "lora", {"rank_pattern": names, "target_modules": [*names, "v_proj"]}, tensors)
    report = prolora_tools.compress(adapter, tmp_path / "c", unshared=0, chunks=2)
    opened = Adapter.open(tmp_path / "c")
    for module in report.modules:
        geometry = opened.modules[module.name].geometry
        assert (geometry.a.stride, geometry.b.stride) == (module.stride_a, module.stride_b)
        if module.rank > 1:
            assert geometry.distinct_blocks(40, 32) == 4
    assert prolora_tools.diff(adapter, tmp_path / "c").relative_error == pytest.approx(report.relative_error)


def test_a_stride_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="stride of A is -1"):
        prolora_tools.compress(model(NAME), tmp_path / "c", unshared=0, chunks=2, strides=(-1, 1))
