"""Shapes found in the factors, and shapes chosen under a budget."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import prolora_tools
from prolora_tools.errors import InputError, RequestError
from prolora_tools.files.adapter import Adapter
from prolora_tools.operations import shapes as operation
from tests.support import model, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from prolora_tools.reports import CompressionReport

NAME = "llama-tiny-py-r8"


def permuted(folder: Path, out: Path, *, scaled: bool) -> Path:
    """The same LoRA with every module's ranks in another order, and re-scaled."""
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key in [k for k in tensors if ".lora_A." in k]:
        rank = len(tensors[key])
        order = torch.randperm(rank, generator=generator)
        scale = torch.rand(rank, generator=generator) + 0.5 if scaled else torch.ones(rank)
        other = key.replace("lora_A", "lora_B")
        tensors[key] = (tensors[key][order] * scale[:, None]).contiguous()
        tensors[other] = (tensors[other][:, order] / scale).contiguous()
    out.mkdir()
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return out


@pytest.mark.parametrize("strides", ["official", (4, 2), (0, 0)])
@pytest.mark.parametrize(("unshared", "chunks"), [(1, 7), (2, (4, 3)), (0, 2)])
def test_an_expanded_adapter_is_taken_back_bit_for_bit(
    unshared: int, chunks: Any, strides: Any, tmp_path: Path
) -> None:
    made = prolora_tools.compress(
        model(NAME), tmp_path / "c", unshared=unshared, chunks=chunks, strides=strides, method="align"
    )
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    notes = prolora_tools.stats(tmp_path / "e").notes
    assert any(f"expanded PRoLoRA (r=8 u={unshared}" in note for note in notes)
    report = prolora_tools.compress(tmp_path / "e", tmp_path / "back")
    assert report.relative_error == 0
    assert report.parameters == made.parameters
    if strides == "official":
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
    assert prolora_tools.diff(tmp_path / "e", tmp_path / "back", max_error=0).ok


@pytest.mark.parametrize("scaled", [False, True])
def test_other_bases_are_taken_back_too(tmp_path: Path, *, scaled: bool) -> None:
    made = prolora_tools.compress(model(NAME), tmp_path / "c", unshared=2, chunks=(4, 3), method="align")
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    mixed = permuted(tmp_path / "e", tmp_path / "mixed", scaled=scaled)
    assert any("permuted or re-scaled" in note for note in prolora_tools.stats(mixed).notes)
    report = prolora_tools.compress(mixed, tmp_path / "back")
    assert report.parameters == made.parameters
    found = prolora_tools.diff(mixed, tmp_path / "back").relative_error
    assert found is not None
    assert found < (1e-6 if scaled else 1e-12)


@pytest.mark.parametrize("name", [NAME, "gpt2-tiny-py-r8", "minilm-codesearch-r8"])
def test_ordinary_adapters_are_not_mistaken(name: str, tmp_path: Path) -> None:
    assert not any("expanded PRoLoRA" in note for note in prolora_tools.stats(model(name)).notes)
    with pytest.raises(InputError, match=r"no module of .* is an expanded PRoLoRA"):
        prolora_tools.compress(model(name), tmp_path / "c")


def total_svd_error(folder: Path, rank: int) -> float:
    error = norm = 0.0
    for m in Adapter.open(folder).modules.values():
        a, b = m.factors()
        values = np.linalg.svd(m.scaling * b.astype(np.float64) @ a.astype(np.float64), compute_uv=False)
        error, norm = error + np.sum(values[rank:] ** 2), norm + np.sum(values**2)
    return float(np.sqrt(error / norm))


def checked(report: CompressionReport, folder: Path, source: Path) -> None:
    """The folder opens, and holds the shapes, the size and the error that the report tells."""
    opened = Adapter.open(folder)
    assert sum(m.parameters for m in opened.modules.values()) == report.parameters
    for m in report.modules:
        g = opened.modules[m.name].geometry
        assert (g.rank, g.unshared) == (m.rank, m.unshared)
        if m.rank > m.unshared:
            assert (g.chunks_a, g.chunks_b, g.a.stride, g.b.stride) == (m.chunks_a, m.chunks_b, m.stride_a, m.stride_b)
    before = Adapter.open(source)
    for path, module in opened.modules.items():
        assert module.scaling == pytest.approx(before.modules[path].scaling)
    assert prolora_tools.diff(source, folder).relative_error == pytest.approx(report.relative_error, rel=1e-6)


@pytest.mark.parametrize("ratio", [2, 4])
def test_a_ratio_is_kept_and_no_lora_of_one_rank_is_better(ratio: float, tmp_path: Path) -> None:
    source = model(NAME)
    report = prolora_tools.compress(source, tmp_path / "c", ratio=ratio)
    assert report.budget is not None
    assert 0.9 * report.budget < report.parameters <= report.budget
    checked(report, tmp_path / "c", source)
    assert len({(m.rank, m.unshared, m.chunks_a) for m in report.modules}) > 1
    assert (report.relative_error or 1) < total_svd_error(source, int(8 / ratio))
    # The rival is as free: its ranks are the modules' largest singular values a parameter, until nothing more fits.
    gains = []
    for m in Adapter.open(source).modules.values():
        a, b = m.factors()
        values = np.linalg.svd(m.scaling * b.astype(np.float64) @ a.astype(np.float64), compute_uv=False)[:8]
        gains += [(v**2 / (m.in_features + m.out_features), v, m.path) for v in values]
    gains.sort(reverse=True)
    dims = {m.path: m.in_features + m.out_features for m in Adapter.open(source).modules.values()}
    taken, size = [], 0
    for gain in gains:
        if size + dims[gain[2]] <= report.parameters:
            taken.append(gain)
            size += dims[gain[2]]
    assert report.svd_parameters == size
    assert {m.name: m.svd_rank for m in report.modules} == {p: sum(g[2] == p for g in taken) for p in dims}
    left = 1 - sum(g[1] ** 2 for g in taken) / sum(g[1] ** 2 for g in gains)
    assert report.svd_relative_error == pytest.approx(left**0.5, rel=1e-4)


@pytest.mark.parametrize("name", ["gpt2-tiny-py-r8", "llama-tiny-py-r16-rslora-patterns"])
def test_budgets_keep_scalings_whatever_the_rank(name: str, tmp_path: Path) -> None:
    whole = prolora_tools.stats(model(name)).parameters
    report = prolora_tools.compress(model(name), tmp_path / "c", budget=whole // 3)
    assert report.parameters <= whole // 3
    checked(report, tmp_path / "c", model(name))


def test_an_error_is_met_with_few_parameters(tmp_path: Path) -> None:
    loose, tight = (prolora_tools.compress(model(NAME), tmp_path / str(error), max_error=error) for error in (0.4, 0.1))
    assert loose.ok
    assert tight.ok
    assert loose.parameters < tight.parameters < tight.source_parameters
    checked(tight, tmp_path / "0.1", model(NAME))


def test_large_adapters_are_judged_by_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = prolora_tools.compress(model(NAME), tmp_path / "every", ratio=2)
    monkeypatch.setattr(operation, "_EVERY", 0)
    monkeypatch.setattr(operation, "_TYPICAL", 2)
    sampled = prolora_tools.compress(model(NAME), tmp_path / "sampled", ratio=2)
    assert sampled.parameters <= (sampled.budget or 0)
    assert (sampled.relative_error or 1) < 1.3 * (every.relative_error or 0)


def test_a_module_of_few_directions_gets_a_small_lora(tmp_path: Path) -> None:
    """dW of rank 1 stored at rank 8: nothing is shared, and nothing is lost."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, 64, generator=generator), torch.randn(48, 1, generator=generator)
    mixing = torch.randn(8, 1, generator=generator)
    key = "base_model.model.q_proj"
    tensors = {f"{key}.lora_A.weight": mixing @ a, f"{key}.lora_B.weight": b @ mixing.T / mixing.square().sum()}
    adapter = write_adapter(tmp_path / "lora", {"target_modules": ["q_proj"]}, tensors)
    report = prolora_tools.compress(adapter, tmp_path / "c", max_error=1e-3)
    assert (report.modules[0].rank, report.modules[0].unshared) == (1, 1)
    assert (report.relative_error or 0) < 1e-6
    checked(report, tmp_path / "c", adapter)
    assert json.loads((tmp_path / "c/adapter_config.json").read_text())["alpha_pattern"]


@pytest.mark.parametrize(
    "request_",
    [
        {"unshared": 1},
        {"chunks": 2},
        {"unshared": 1, "chunks": 2, "ratio": 2},
        {"budget": 10**5, "ratio": 2},
        {"budget": 0},
        {"ratio": 0.5},
        {"budget": 10},
        {"ratio": 2, "dry_run": True},
    ],
)
def test_requests_that_make_no_sense(request_: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        prolora_tools.compress(model(NAME), tmp_path / "c", **request_)
    assert not (tmp_path / "c").exists()
