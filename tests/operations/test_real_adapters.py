"""Really trained adapters, end to end, against PEFT and against the loop oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM

import prolora_tools
from prolora_tools.files.adapter import Adapter
from prolora_tools.reports import BudgetReport
from tests.oracles import prolora
from tests.support import ADAPTERS, model, tensors_of

if TYPE_CHECKING:
    from pathlib import Path

LINEAR = sorted(set(ADAPTERS) - {"llama-tiny-py-r8-dora"})


def load(folder: Path, adapter: str, **options: Any) -> Any:
    cls = AutoModel if adapter.startswith("minilm") else AutoModelForCausalLM
    return cls.from_pretrained(folder, **options)


def outputs(network: Any) -> torch.Tensor:
    """Logits, or BERT's hidden states, for fixed tokens."""
    tokens = torch.randint(0, 1000, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out: torch.Tensor = network.eval()(input_ids=tokens)[0]
    return out


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in bfloat16 steps, by counting the bit patterns in order."""

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
        return torch.where(bits >= 0x8000, 0x8000 - bits, bits)

    return int((ordered(a) - ordered(b)).abs().max())


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_merge_is_pefts_merge_and_unload(name: str, tmp_path: Path) -> None:
    base = model(ADAPTERS[name])
    prolora_tools.merge(model(name), tmp_path / "m", base=base)
    expected = PeftModel.from_pretrained(load(base, name), model(name)).merge_and_unload()
    merged, info = load(tmp_path / "m", name, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = merged.state_dict()
    assert set(state) == set(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert state[key].dtype == next(load(base, name).parameters()).dtype
        if state[key].dtype == torch.bfloat16:
            assert ulps(state[key], value.to(torch.bfloat16)) <= (1 if "dora" in name else 0), key
        else:
            torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        outputs(merged.float()), outputs(expected.float()), rtol=1e-5, atol=0.02 if "dora" in name else 1e-5
    )


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_a_float32_merge_gives_pefts_logits(name: str, tmp_path: Path) -> None:
    base = model(ADAPTERS[name])
    prolora_tools.merge(model(name), tmp_path / "m", base=base, dtype="float32")
    unmerged = PeftModel.from_pretrained(load(base, name, dtype=torch.float32), model(name))
    merged = load(tmp_path / "m", name)
    assert merged.dtype == torch.float32
    torch.testing.assert_close(outputs(merged), outputs(unmerged), rtol=1e-4, atol=1e-4)


def with_prolora(network: Any, adapter: Adapter) -> Any:
    """The base with an independent PRoLoRA forward hooked on: factors laid out by the loop oracle."""
    handles = []
    for path, m in adapter.modules.items():
        g = m.geometry
        arrays = {role: m.read(role) for role in m.stored}
        a = prolora.full_a(
            arrays["A"], arrays["A_unshared"], ranks=g.shared, rank_unshared=g.unshared,
            dim=m.in_features, chunks=g.chunks_a, step=g.a.stride,
        )  # fmt: skip
        b = prolora.full_b(
            arrays["B"], arrays["B_unshared"], ranks=g.shared, rank_unshared=g.unshared,
            dim=m.out_features, chunks=g.chunks_b, step=g.b.stride,
        )  # fmt: skip
        rank = len(a)
        alpha = adapter.config.alpha_of(path)
        scaling = alpha / rank**0.5 if adapter.config.use_rslora else alpha / rank
        a_full, b_full = torch.tensor(np.array(a)), torch.tensor(np.array(b))

        def add(_: Any, args: Any, out: Any, a: Any = a_full, b: Any = b_full, scaling: float = scaling) -> Any:
            return out + (args[0] @ a.T @ b.T) * scaling

        handles.append(network.get_submodule(path).register_forward_hook(add))
    return network


@pytest.mark.parametrize("name", [n for n in LINEAR if "lmhead" not in n])
@pytest.mark.parametrize(("unshared", "chunks"), [(0, (2, 2)), (1, (7, 7)), (2, (4, 3))])
def test_expanded_adapters_give_the_loop_oracles_logits(
    name: str, unshared: int, chunks: tuple[int, int], tmp_path: Path
) -> None:
    base = model(ADAPTERS[name])
    prolora_tools.compress(model(name), tmp_path / "c", unshared=unshared, chunks=chunks)
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    expected = outputs(with_prolora(load(base, name, dtype=torch.float32), Adapter.open(tmp_path / "c")))
    found = outputs(PeftModel.from_pretrained(load(base, name, dtype=torch.float32), tmp_path / "e"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    plain = outputs(load(base, name, dtype=torch.float32))
    assert (found - plain).abs().max() > 0.01, "an adapter that does nothing proves nothing"


@pytest.mark.parametrize("name", LINEAR)
def test_merging_the_compressed_and_the_expanded_is_the_same_model(name: str, tmp_path: Path) -> None:
    base = model(ADAPTERS[name])
    prolora_tools.compress(model(name), tmp_path / "c", unshared=2, chunks=4)
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    prolora_tools.merge(tmp_path / "c", tmp_path / "mc", base=base)
    prolora_tools.merge(tmp_path / "e", tmp_path / "me", base=base)
    for file in (tmp_path / "mc").iterdir():
        if file.is_file():
            assert file.read_bytes() == (tmp_path / "me" / file.name).read_bytes(), file.name
    report = prolora_tools.verify(tmp_path / "mc", base=base, adapter=tmp_path / "e")
    assert report.ok
    assert report.exact_tensors == report.merged_tensors


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("method", ["average", "align"])
def test_compressing_an_expanded_adapter_gives_it_back_bit_for_bit(name: str, method: Any, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"unshared": 2, "chunks": (4, 3)}
    first = prolora_tools.compress(model(name), tmp_path / "c", method=method, **shape)
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    again = prolora_tools.compress(tmp_path / "e", tmp_path / "c2", **shape)
    assert again.relative_error == 0
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "c" / file).read_bytes() == (tmp_path / "c2" / file).read_bytes()
    assert prolora_tools.diff(tmp_path / "c", tmp_path / "e", max_error=0).ok
    # The error that was told is the one that another command measures.
    assert first.relative_error is not None
    measured = prolora_tools.diff(model(name), tmp_path / "e").relative_error
    assert measured == pytest.approx(first.relative_error, rel=1e-9)


@pytest.mark.parametrize("name", LINEAR)
def test_told_errors_are_those_of_the_dense_dw(name: str, tmp_path: Path) -> None:
    report = prolora_tools.compress(model(name), tmp_path / "c", unshared=1, chunks=2, dtype="bfloat16")
    original, made = Adapter.open(model(name)), Adapter.open(tmp_path / "c")
    error = norm = 0.0
    for module in report.modules:
        dense = []
        for adapter in (original, made):
            a, b = adapter.modules[module.name].factors()
            dense.append(adapter.config.scaling(module.name) * (b.astype(np.float64) @ a.astype(np.float64)))
        difference = float(np.linalg.norm(dense[0] - dense[1]))
        error, norm = error + difference**2, norm + float(np.linalg.norm(dense[0])) ** 2
        if np.any(dense[0]):
            assert module.relative_error == pytest.approx(difference / np.linalg.norm(dense[0]), rel=1e-6)
        else:  # MiniLM's pooler: B is exactly zero
            assert module.relative_error == 0
    assert report.relative_error == pytest.approx((error / norm) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_stats_count_what_the_file_holds(name: str) -> None:
    report = prolora_tools.stats(model(name), base=model(ADAPTERS[name]))
    tensors = tensors_of(model(name))
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert report.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert report.parameters == sum(m.parameters for m in report.modules) + report.other_parameters
    for groups in (report.by_type, report.by_layer):
        assert sum(g.parameters for g in groups) == report.parameters - report.other_parameters
    assert report.base_parameters == sum(t.numel() for t in tensors_of(model(ADAPTERS[name])).values())


def test_uniform_bakes_scaling_and_pads_ranks(tmp_path: Path) -> None:
    """vLLM and llama.cpp read one r and one lora_alpha; ranks 4, 5, 8, 12, 16 under rsLoRA become one."""
    name = "llama-tiny-py-r16-rslora-patterns"
    report = prolora_tools.expand(model(name), tmp_path / "u", uniform=True)
    assert (report.rank, report.alpha, report.scaling_in_b, report.vllm_max_lora_rank) == (16, 16, True, 16)
    made = Adapter.open(tmp_path / "u")
    assert not made.config.rank_pattern
    assert not made.config.alpha_pattern
    assert not made.config.use_rslora
    assert {m.geometry.rank for m in made.modules.values()} == {16}
    assert {m.scaling for m in made.modules.values()} == {1.0}
    difference = prolora_tools.diff(model(name), tmp_path / "u").relative_error
    assert difference is not None
    assert difference < 1e-7  # one rounding of B
    base = model(ADAPTERS[name])
    expected = PeftModel.from_pretrained(load(base, name, dtype=torch.float32), model(name))
    found = PeftModel.from_pretrained(load(base, name, dtype=torch.float32), tmp_path / "u")
    torch.testing.assert_close(outputs(found), outputs(expected), rtol=1e-4, atol=1e-4)


def test_uniform_leaves_b_alone_where_one_alpha_says_it(tmp_path: Path) -> None:
    report = prolora_tools.expand(model("llama-tiny-py-r8"), tmp_path / "u", uniform=True)
    assert (report.rank, report.alpha, report.scaling_in_b) == (8, 16, False)
    before, after = tensors_of(model("llama-tiny-py-r8")), tensors_of(tmp_path / "u")
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("base", ["llama-tiny-en", "gpt2-tiny-en", "all-MiniLM-L6-v2"])
def test_plan_finds_the_layers_of_all_linear(base: str) -> None:
    name = {"llama-tiny-en": "llama-tiny-py-r8", "gpt2-tiny-en": "gpt2-tiny-py-r8"}.get(base, "minilm-codesearch-r8")
    report = prolora_tools.plan(model(base), rank=8, unshared=8)
    assert isinstance(report, BudgetReport)
    expected = prolora_tools.stats(model(name))
    assert {m.name: m.parameters for m in report.modules} == {m.name: m.parameters for m in expected.modules}
    assert report.kind == "LORA"
