"""Several adapters in one pass, with weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from prolora_tools import compress, expand, merge, verify
from prolora_tools.cli import run
from prolora_tools.errors import MismatchError, RequestError
from tests.support import model, tensors_of, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

Q, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qv")


def made(folder: Path, *, tied: bool = False) -> tuple[Path, list[Path]]:
    """A bfloat16 base and two adapters that overlap in one module."""
    draw = torch.Generator().manual_seed(1)
    base = folder / "base"
    base.mkdir()
    weights = {f"{path}.weight": torch.randn(48, 32, generator=draw).bfloat16() for path in (Q, V)}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": tied}))
    adapters = []
    for name, rank, paths in (("a", 4, (Q,)), ("b", 8, (Q, V))):
        factors = {}
        for path in paths:
            factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, 32, generator=draw)
            factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(48, rank, generator=draw)
        adapters.append(write_adapter(folder / name, {"r": rank, "target_modules": ["q_proj", "v_proj"]}, factors))
    return base, adapters


def delta(adapter: Path, path: str, weight: float) -> torch.Tensor:
    """Weight * scaling * (B A), in PEFT's order of operations."""
    factors = tensors_of(adapter)
    a, b = (factors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
    return (b @ a) * (16 / len(a) * weight)


@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_deltas_are_summed_in_float32_and_rounded_once(scale: float, tmp_path: Path) -> None:
    base, (a, b) = made(tmp_path)
    report = merge(a, tmp_path / "out", base=base, more=[b], weights=[0.7, 0.3], scale=scale)
    found, before = tensors_of(tmp_path / "out"), tensors_of(base)
    both = before[f"{Q}.weight"].float() + delta(a, Q, scale * 0.7) + delta(b, Q, scale * 0.3)
    assert torch.equal(found[f"{Q}.weight"], both.bfloat16())
    assert torch.equal(found[f"{V}.weight"], (before[f"{V}.weight"].float() + delta(b, V, scale * 0.3)).bfloat16())
    assert report.merged_tensors == 2


def test_lora_and_prolora_together(tmp_path: Path) -> None:
    base, (a, b) = made(tmp_path)
    compress(b, tmp_path / "small", unshared=2, chunks=(2, 2))
    expand(tmp_path / "small", tmp_path / "full")
    merge(a, tmp_path / "one", base=base, more=[tmp_path / "small"])
    merge(a, tmp_path / "two", base=base, more=[tmp_path / "full"])
    one, two = (tensors_of(tmp_path / name) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_weight_zero_is_the_base(tmp_path: Path) -> None:
    base, (a, _) = made(tmp_path)
    merge(a, tmp_path / "out", base=base, weights=[0])
    assert all(torch.equal(t, tensors_of(base)[n]) for n, t in tensors_of(tmp_path / "out").items())


def test_a_resumed_merge_knows_its_weights(tmp_path: Path) -> None:
    base, (a, b) = made(tmp_path)
    merge(a, tmp_path / "out", base=base, more=[b], weights=[1, 2], resume=True)
    merge(b, tmp_path / "swapped", base=base, more=[a], weights=[2, 1])
    first, second = (tensors_of(tmp_path / name)[f"{V}.weight"] for name in ("out", "swapped"))
    assert torch.equal(first, second)


def test_a_dora_beside_another_adapter_of_the_same_module_is_refused(tmp_path: Path) -> None:
    adapters = [model(name) for name in ("llama-tiny-py-r8-dora", "llama-tiny-py-r8")]
    with pytest.raises(MismatchError, match="does more"):
        merge(adapters[0], tmp_path / "out", base=model("llama-tiny-en"), more=adapters[1:])
    assert not (tmp_path / "out").exists()


def test_verify_takes_what_merge_took(tmp_path: Path) -> None:
    base, (a, b) = made(tmp_path)
    merge(a, tmp_path / "out", base=base, more=[b], weights=[0.7, 0.3], scale=2)
    report = verify(tmp_path / "out", base=base, adapter=a, more=[b], weights=[0.7, 0.3], scale=2)
    assert report.ok
    assert report.exact_tensors == 2
    assert report.adapter == f"{a} + {b}"
    for weights, scale, more in (([0.7, 0.4], 2, [b]), ([0.7, 0.3], 1, [b]), ([], 2, [b]), ([0.7], 2, [])):
        assert not verify(tmp_path / "out", base=base, adapter=a, more=more, weights=weights, scale=scale).ok
    with pytest.raises(RequestError, match="1 weights, scale 1, for 2 adapters"):
        verify(tmp_path / "out", base=base, adapter=a, more=[b], weights=[0.7])
    options = ["--base", str(base), "--adapter", str(a), "--adapter", str(b), "--weight", "0.7", "--weight", "0.3"]
    assert run(["verify", str(tmp_path / "out"), *options, "--scale", "2", "--quiet"]) == 0
    assert run(["verify", str(tmp_path / "out"), *options, "--quiet"]) == 3


def test_a_dry_run_tells_what_becomes_of_each_tensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, (a, b) = made(tmp_path)
    report = merge(a, tmp_path / "out", base=base, more=[b], weights=[0.5, 1], dry_run=True)
    changes = {c.name: c.change for c in report.changes}
    assert changes == {
        f"{Q}.weight": "+ 2 B A, LoRA of rank 4; + 2 B A, LoRA of rank 8",
        f"{V}.weight": "+ 2 B A, LoRA of rank 8",
    }
    options = ["--base", str(base), "-o", str(tmp_path / "out"), "--dry-run"]
    assert run(["merge", str(a), *options]) == 0
    assert "model.layers.*.self_attn.q_proj.weight  1       48 x 32  + 4 B A, LoRA of rank 4" in capsys.readouterr().out
