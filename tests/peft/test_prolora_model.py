"""What PEFT asks of its own tuners, asked of this one, on three architectures."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file, save_file

from prolora_tools.errors import RequestError, UnsupportedError
from prolora_tools.files.adapter import Adapter
from prolora_tools.peft import ProLoraConfig, ProLoraLayer, ProLoraLinear, ProLoraModel
from tests.peft import models
from tests.peft.models import backward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONFIGS: dict[str, dict[str, Any]] = {
    "prolora": {"r": 8, "unshared_r": 1, "chunks_A": 7, "chunks_B": 7},
    "rolora": {"r": 4, "chunks_A": 3, "chunks_B": 2},
    "clora": {"r": 4, "chunks_A": 3, "chunks_B": 2, "rotate": False},
    "lora": {"r": 4, "unshared_r": 4},
    "strides": {
        "r": 6,
        "unshared_r": 2,
        "chunks_A": 5,
        "chunks_B": 4,
        "stride_A": 3,
        "stride_B": 2,
        "use_rslora": True,
    },
}


def config(name: str = "prolora", /, **options: Any) -> ProLoraConfig:
    """One that changes the output from the start."""
    return ProLoraConfig(**{"target_modules": "all-linear", "init_prolora_weights": False, **CONFIGS[name], **options})


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    found: torch.Tensor = model(tokens, **kwargs).logits
    return found


def layers(model: Any) -> dict[str, ProLoraLinear]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, ProLoraLinear)}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(
    make_base: Callable[[], Any], tokens: torch.Tensor, tmp_path: Path, name: str, *, low_cpu_mem_usage: bool
) -> None:
    base = make_base()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    expected_base = logits(base, tokens)
    model = get_peft_model(base, config(name)).eval()
    expected = logits(model, tokens)
    assert not close(expected, expected_base, 1e-3)
    model.save_pretrained(tmp_path)

    # Our reader opens it, and sees the factors that the layers use.
    adapter = Adapter.open(tmp_path)
    assert set(adapter.modules) == set(layers(model))
    for path, layer in layers(model).items():
        found, own = adapter.modules[path].factors(), layer.factors("default")
        assert all(np.array_equal(f, o.detach().numpy()) for f, o in zip(found, own, strict=True))
        assert adapter.modules[path].scaling == layer.scaling["default"]
        assert adapter.modules[path].geometry == layer.geometry["default"]
    expected_keys = {
        f"base_model.model.{path}.prolora_{part}"
        for path in layers(model)
        for part in ("A", "B", "A_unshared", "B_unshared")
    }
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == expected_keys

    fresh = make_base()
    loaded = PeftModel.from_pretrained(fresh, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert isinstance(loaded.base_model, ProLoraModel)
    assert not any(p.is_meta for p in loaded.parameters())
    assert torch.equal(logits(loaded, tokens), expected)
    assert torch.equal(logits(loaded.unload(), tokens), expected_base)
    assert all(torch.equal(v, before[k]) for k, v in model.unload().state_dict().items())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    """target_modules and exclude_modules are sets, whose order is another in every process."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        model = get_peft_model(
            models.llama(), config(target_modules=["v_proj", "q_proj"], exclude_modules=["k_proj", "o_proj"])
        )
        model.save_pretrained(folder)
    saved = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["q_proj", "v_proj"]
    assert saved["exclude_modules"] == ["k_proj", "o_proj"]
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_loading_a_bin_file(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(models.llama(), config("rolora")).eval()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(logits(PeftModel.from_pretrained(models.llama(), tmp_path), tokens), logits(model, tokens))
    assert set(Adapter.open(tmp_path).modules) == set(layers(model))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("safe", "tolerance"), [(False, 1e-4), (True, 1e-6)])
def test_merge(make_base: Callable[[], Any], tokens: torch.Tensor, name: str, *, safe: bool, tolerance: float) -> None:
    base = make_base()
    expected_base = logits(base, tokens)
    model = get_peft_model(base, config(name)).eval()
    expected = logits(model, tokens)
    model.merge_adapter(safe_merge=safe)
    assert close(logits(model, tokens), expected, tolerance)
    model.unmerge_adapter()
    assert close(logits(model, tokens), expected, tolerance)
    with model.disable_adapter():
        assert close(logits(model, tokens), expected_base, tolerance)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=safe)
    assert not any(isinstance(m, ProLoraLayer) for m in merged.modules())
    assert close(logits(merged, tokens), expected, tolerance)


def test_disabling_while_merged_unmerges(tokens: torch.Tensor) -> None:
    base = models.llama()
    expected = logits(base, tokens)
    model = get_peft_model(base, config()).eval()
    model.merge_adapter()
    with model.disable_adapter():
        assert close(logits(model, tokens), expected, 1e-6)


def test_several_adapters(make_base: Callable[[], Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    """Of different shapes: switched, active together, saved apart, deleted."""
    base = make_base()
    expected_base = logits(base, tokens)
    model = get_peft_model(base, config("prolora"), adapter_name="first").eval()
    expected = {"first": logits(model, tokens)}
    model.add_adapter("second", config("strides"))
    model.eval()
    assert torch.equal(logits(model, tokens), expected["first"])  # adding does not switch
    model.set_adapter("second")
    expected["second"] = logits(model, tokens)
    assert not close(expected["second"], expected["first"], 1e-3)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if n.endswith(".second")
    }
    model.save_pretrained(tmp_path)
    for name, found in expected.items():
        assert set(Adapter.open(tmp_path / name).modules) == set(layers(model))
        assert torch.equal(logits(PeftModel.from_pretrained(make_base(), tmp_path / name), tokens), found)

    model.base_model.set_adapter(["first", "second"])
    deltas = {
        p: layer.get_delta_weight("first") + layer.get_delta_weight("second") for p, layer in layers(model).items()
    }
    both = logits(model, tokens)
    model.merge_adapter(["first", "second"])
    assert close(logits(model, tokens), both, 1e-4)
    model.unmerge_adapter()
    for path, layer in layers(model).items():
        x = torch.randn(2, layer.in_features)
        delta = deltas[path].T if layer.fan_in_fan_out else deltas[path]
        assert close(layer(x), layer.get_base_layer()(x) + x @ delta.T, 1e-5)

    model.base_model.set_adapter("second")
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("second")
    # Up to the rounding of having been merged and unmerged.
    assert close(logits(model, tokens), expected["first"], 1e-5)
    assert not any("second" in n for n in model.state_dict())
    with model.disable_adapter():
        assert close(logits(model, tokens), expected_base, 1e-5)


def test_deleting_the_only_adapter_leaves_the_base(tokens: torch.Tensor) -> None:
    base = models.llama()
    expected = logits(base, tokens)
    model = get_peft_model(base, config())
    model.delete_adapter("default")
    assert torch.equal(logits(model.base_model, tokens), expected)


def test_mixed_batch(make_base: Callable[[], Any], tokens: torch.Tensor) -> None:
    model = get_peft_model(make_base(), config("prolora"), adapter_name="first").eval()
    model.add_adapter("second", config("clora"))
    model.eval()
    batch = tokens[[0, 1, 0, 1, 0]]
    names = ["second", "first", "__base__", "second", "first"]
    expected = torch.empty_like(logits(model, batch))
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                expected[i] = logits(model, batch[i : i + 1])[0]
        else:
            model.set_adapter(name)
            expected[i] = logits(model, batch[i : i + 1])[0]
    assert close(logits(model, batch, adapter_names=names), expected, 1e-5)
    assert close(logits(model, batch, adapter_names=["second"] * 5)[3], expected[3], 1e-5)


def test_mixed_batch_with_modules_to_save(tokens: torch.Tensor) -> None:
    model = get_peft_model(models.bert(), config(modules_to_save=["classifier"]), adapter_name="first").eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["first"].weight.add_(1.0)
    mixed = logits(model, tokens, adapter_names=["first", "__base__"])
    assert close(mixed[0], logits(model, tokens)[0], 1e-5)
    with model.disable_adapter():
        assert close(mixed[1], logits(model, tokens)[1], 1e-5)


def test_mixed_batch_in_beam_search(tokens: torch.Tensor) -> None:
    model = get_peft_model(models.llama(), config("prolora"), adapter_name="first").eval()
    model.add_adapter("second", config("rolora"))
    model.eval()
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(tokens)
    mixed = model.generate(tokens, attention_mask=mask, adapter_names=["first", "second"], **options)
    for i, name in enumerate(("first", "second")):
        model.set_adapter(name)
        assert torch.equal(model.generate(tokens[i : i + 1], attention_mask=mask[:1], **options)[0], mixed[i])


def test_mixed_batch_refusals(tokens: torch.Tensor) -> None:
    model = get_peft_model(models.llama(), config()).eval()
    cases = [
        ("peft-mixed-unknown", ["default", "other"], lambda: None),
        ("peft-mixed-length", ["default"], lambda: None),
        ("peft-mixed-merged", ["default", "default"], model.merge_adapter),
        ("peft-mixed-training", ["default", "default"], model.train),
    ]
    for code, names, prepare in cases:
        prepare()
        with pytest.raises(RequestError) as caught:
            logits(model, tokens, adapter_names=names)
        assert caught.value.code == code
    model.eval()
    model.unmerge_adapter()
    assert close(logits(model, tokens), logits(model, tokens, adapter_names=["default", "default"]), 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_adapter_is_trained(make_base: Callable[[], Any], tokens: torch.Tensor, name: str) -> None:
    model = get_peft_model(make_base(), config(name, lora_dropout=0.1)).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    backward(model(tokens).logits.square().sum())
    optimizer.step()
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) != ("prolora_" in n), n


def test_status_is_regular() -> None:
    model = get_peft_model(models.llama(), config("rolora"))  # has factors without elements
    status = model.get_model_status()
    assert status.requires_grad == {"default": True}
    assert status.devices == {"default": ["cpu"]}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {s.module_type for s in model.get_layer_status()} == {"prolora.ProLoraLinear"}
    model.set_requires_grad("default", requires_grad=False)
    assert model.get_model_status().requires_grad == {"default": False}


@pytest.mark.parametrize("name", ["prolora", "rolora", "lora"])
def test_a_frozen_adapter_makes_no_graph(tokens: torch.Tensor, tmp_path: Path, name: str) -> None:
    """Factors without elements are buffers; were they to ask for gradients, so would the output."""
    get_peft_model(models.llama(), config(name)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.llama(), tmp_path)
    assert not loaded(tokens).logits.requires_grad


@pytest.mark.parametrize("name", ["prolora", "rolora", "lora"])
@pytest.mark.parametrize("upcast", [True, False])
def test_half_precision_base(make_base: Callable[[], Any], tokens: torch.Tensor, name: str, *, upcast: bool) -> None:
    base = make_base().to(torch.bfloat16)
    model = get_peft_model(base, config(name), autocast_adapter_dtype=upcast)
    expected = torch.float32 if upcast else torch.bfloat16
    parts = [t for n, t in model.state_dict().items() if "prolora_" in n]
    assert {t.dtype for t in parts} == {expected}
    out = model(tokens).logits
    assert out.dtype == torch.bfloat16
    backward(out.float().sum())
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {expected}
    for layer in layers(model).values():
        assert layer.get_delta_weight("default").dtype == expected


def test_autocast(tokens: torch.Tensor) -> None:
    model = get_peft_model(models.llama(), config()).eval()
    expected = logits(model, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(tokens).logits
        backward(found.float().square().sum())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_input_casting_can_be_switched_off() -> None:
    """PEFT's helper reaches the layer: float64 input then meets float32 factors."""
    model = get_peft_model(models.llama(), config())
    layer = next(iter(layers(model).values()))
    layer.get_base_layer().double()
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    assert layer(x).dtype == torch.float64
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(tokens: torch.Tensor, *, reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = get_peft_model(models.llama(), config()).train()
        if checkpointing:
            model.enable_input_require_grads()
            with warnings.catch_warnings():  # transformers 5.23 renames it
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(3)
        for layer in layers(model).values():
            layer.reset_prolora_parameters("default", init=False)
        backward(model(input_ids=tokens, labels=tokens).loss)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("name", ["prolora", "lora"])
def test_compile_without_graph_breaks(name: str) -> None:
    """One graph, forward and backward; the backend that needs no C++ compiler."""
    model = get_peft_model(models.llama(), config(name, lora_dropout=0.0))
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        layer.zero_grad()
        out = run(x)
        backward(out.square().sum())
        results.append((out, [p.grad.clone() for p in layer.parameters() if p.grad is not None]))
    torch.testing.assert_close(*results)


def test_convert_to_lora(make_base: Callable[[], Any], tokens: torch.Tensor) -> None:
    """PEFT's own conversion, by SVD: exact at our rank."""
    options = {"r": 4, "unshared_r": 1, "exclude_modules": ["classifier"] if make_base is models.bert else None}
    model = get_peft_model(make_base(), config(**options)).eval()
    assert model.supports_lora_conversion()
    expected = logits(model, tokens)
    lora_config, state = convert_to_lora(model, rank=4)
    assert isinstance(lora_config, LoraConfig)
    lora_config.fan_in_fan_out = make_base is models.gpt2  # PEFT warns where it has to find out by itself
    lora = get_peft_model(make_base(), lora_config).eval()
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    assert close(logits(lora, tokens), expected, 1e-4)


def test_a_bias_beside_b_is_no_lora_delta(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(models.bert(), config(lora_bias=True)).eval()
    assert not model.supports_lora_conversion()
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert all("bias" in m.stored for m in Adapter.open(tmp_path).modules.values())
    assert torch.equal(logits(PeftModel.from_pretrained(models.bert(), tmp_path), tokens), expected)
    assert close(logits(model.merge_and_unload(), tokens), expected, 1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_load_adapter(
    make_base: Callable[[], Any], tokens: torch.Tensor, tmp_path: Path, name: str
) -> None:
    model = get_peft_model(make_base(), config(name)).eval()
    model.save_pretrained(tmp_path)
    base = make_base()
    base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, tokens), logits(model, tokens))


def test_transformers_add_adapter_and_save(tokens: torch.Tensor, tmp_path: Path) -> None:
    base = models.llama()
    base.add_adapter(config(), "default")
    base.save_pretrained(tmp_path)
    base.eval()
    assert torch.equal(logits(PeftModel.from_pretrained(models.llama(), tmp_path), tokens), logits(base, tokens))


def test_injection_from_a_state_dict(tokens: torch.Tensor, tmp_path: Path) -> None:
    """PEFT finds the targeted modules by the keys, prefix and all."""
    model = get_peft_model(models.llama(), config(target_modules=["q_proj", "up_proj"])).eval()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    injected = inject_adapter_in_model(config(target_modules=["q_proj", "up_proj"]), models.llama(), state_dict=state)
    result = set_peft_model_state_dict(injected, state)
    assert not result.unexpected_keys
    assert torch.equal(logits(injected.eval(), tokens), logits(model, tokens))


def test_a_wrong_tensor_shape_is_an_error(tmp_path: Path) -> None:
    get_peft_model(models.llama(), config()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = next(k for k in state if k.endswith("prolora_A"))
    state[key] = state[key][:, :-1].contiguous()
    save_file(state, file)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(models.llama(), tmp_path)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved(tokens: torch.Tensor, tmp_path: Path, bias: str) -> None:
    model = get_peft_model(models.bert(), config(bias=bias, target_modules=["query"])).eval()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")}
    assert all("query" in n for n in trained) == (bias == "lora_only")
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in trained:
                p.add_(0.5)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert len(Adapter.open(tmp_path).whole) == len(trained)
    assert torch.equal(logits(PeftModel.from_pretrained(models.bert(), tmp_path), tokens), expected)


def test_modules_to_save(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(models.bert(), config(modules_to_save=["classifier"])).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1.0)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert set(Adapter.open(tmp_path).whole) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(logits(PeftModel.from_pretrained(models.bert(), tmp_path), tokens), expected)


def test_trainable_tokens(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(models.llama(), config(trainable_token_indices={"embed_tokens": [3, 5]})).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "trainable_tokens_delta" in n:
                p.add_(1.0)
    expected = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert set(Adapter.open(tmp_path).tokens) == {"model.embed_tokens"}
    assert torch.equal(logits(PeftModel.from_pretrained(models.llama(), tmp_path), tokens), expected)


def test_tied_modules_to_save_stay_tied(tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(models.llama(tied=True), config(modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    inner = model.eval().base_model.model
    embedding = inner.model.embed_tokens.modules_to_save["default"].weight
    assert inner.lm_head.modules_to_save["default"].weight is embedding
    with torch.no_grad():
        embedding.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(models.llama(tied=True), tmp_path)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_layers_and_exclusions() -> None:
    model = get_peft_model(models.llama(), config(target_modules=["q_proj", "v_proj"], layers_to_transform=[1]))
    assert set(layers(model)) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}
    model = get_peft_model(models.llama(), config(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"]))
    assert set(layers(model)) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    model = get_peft_model(models.llama(), config(target_modules=None))  # PEFT's default for the architecture
    assert {n.rsplit(".", 1)[1] for n in layers(model)} == {"q_proj", "v_proj"}


def test_patterns_reach_layers_and_the_file(tokens: torch.Tensor, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 3},
        "alpha_pattern": {"down_proj": 2},
        "unshared_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 0},
        "chunks_A_pattern": {"layers.0.self_attn.q_proj": 4},
        "chunks_B_pattern": {r".*\.up_proj": 3},
        "stride_A_pattern": {"layers.0.self_attn.q_proj": 2},
        "stride_B_pattern": {r".*\.up_proj": 5},
    }
    model = get_peft_model(models.llama(), config(**patterns)).eval()
    found = {p: str(layer.geometry["default"]) for p, layer in layers(model).items()}
    assert found["model.layers.0.self_attn.q_proj"] == "r=5 u=2 m=4 n=7 strides=2,1"
    assert found["model.layers.1.self_attn.q_proj"] == "r=8 u=1 m=7 n=7"
    assert found["model.layers.1.mlp.down_proj"] == "r=3 u=0 m=7 n=7"
    assert found["model.layers.1.mlp.up_proj"] == "r=8 u=1 m=7 n=3 strides=1,5"
    assert layers(model)["model.layers.1.mlp.down_proj"].scaling["default"] == 2 / 3
    model.save_pretrained(tmp_path)
    adapter = Adapter.open(tmp_path)
    assert {p: str(m.geometry) for p, m in adapter.modules.items()} == found
    assert {p: m.scaling for p, m in adapter.modules.items()} == {
        p: layer.scaling["default"] for p, layer in layers(model).items()
    }
    assert torch.equal(logits(PeftModel.from_pretrained(models.llama(), tmp_path), tokens), logits(model, tokens))


def test_patterns_whose_order_the_file_would_change_are_refused() -> None:
    """PEFT saves sorted: what matched first in training would match second after loading."""
    with pytest.raises(RequestError) as caught:
        get_peft_model(models.llama(), config(rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 5}))
    assert caught.value.code == "peft-pattern-order"


def test_adding_to_an_embedding_is_refused_before_anything_is_changed() -> None:
    with pytest.raises(UnsupportedError, match="embed_tokens"):
        get_peft_model(models.llama(), config(target_modules=["embed_tokens"]))


def test_on_top_of_a_lora_layer(tokens: torch.Tensor) -> None:
    """Wrapping another tuner's layer: the LoRA below stays, and both add up."""
    lora = get_peft_model(models.llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = logits(lora, tokens)
    with pytest.warns(UserWarning, match="second time|Already found"):
        both = get_peft_model(lora, config(target_modules=["q_proj"], init_prolora_weights="rectified")).eval()
    assert len([m for m in both.modules() if isinstance(m, ProLoraLinear)]) == 2
    assert close(logits(both, tokens), expected, 1e-6)


def test_copies_and_pickles() -> None:
    assert pickle.loads(pickle.dumps(PeftType("PROLORA"))) is PeftType.PROLORA
    assert copy.deepcopy(PeftType.PROLORA) is PeftType.PROLORA
    original = config("strides", rank_pattern={"q_proj": 3})
    restored = pickle.loads(pickle.dumps(original))
    assert restored == original
    assert restored.peft_type is PeftType.PROLORA
    layer = next(iter(layers(get_peft_model(models.llama(), config())).values()))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    x = torch.randn(2, layer.in_features)
    assert torch.equal(copied(x), layer(x))


def test_config_roundtrip(tmp_path: Path) -> None:
    original = config("strides", target_modules=["q_proj"], unshared_pattern={"q_proj": 1})
    original.save_pretrained(tmp_path)
    for loader in (PeftConfig, ProLoraConfig):
        assert loader.from_pretrained(tmp_path) == original


def test_moving_and_casting(tokens: torch.Tensor) -> None:
    model = get_peft_model(models.llama(), config()).eval()
    expected = logits(model, tokens)
    model.to(torch.float64)
    assert close(logits(model, tokens).float(), expected, 1e-4)
    meta = model.to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
