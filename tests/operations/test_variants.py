"""Every ordinary kind of PEFT LoRA: made by PEFT on tiny models, merged by us, logits equal PEFT's forward.

PEFT's unmerged forward is the oracle: its own merge is wrong for tied heads (it adds the delta to both).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import prolora_tools
from prolora_tools.errors import UnsupportedError
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import Checkpoint
from prolora_tools.operations.merge_plan import plan_merge
from tests.support import tensors_of

if TYPE_CHECKING:
    from pathlib import Path

    from prolora_tools.operations.merge_plan import OutputTensor

VOCAB = 60


def llama(*, tied: bool = False, layers: int = 2) -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=40, bos_token_id=0, eos_token_id=1)
    )


def bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            num_labels=3,
        )
    )  # fmt: skip


@dataclass
class Variant:
    make: Any
    options: dict[str, Any] = field(default_factory=dict)
    resize: int | None = None
    make_options: dict[str, Any] = field(default_factory=dict)


TIED = {"tied": True}
VARIANTS = {
    "linear": Variant(llama, {"target_modules": ["q_proj", "down_proj"]}),
    "regex": Variant(llama, {"target_modules": r".*layers\.1\..*(q|o)_proj"}),
    "all-linear": Variant(llama, {"target_modules": "all-linear"}),
    "patterns": Variant(
        llama,
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 5, "k_proj": 2},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3, "^model.layers.1.self_attn.q_proj": 7},
            "use_rslora": True,
        },
    ),
    "layers-to-transform": Variant(llama, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "exclude-modules": Variant(llama, {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.0.*"}),
    "conv1d": Variant(gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d-wrong-fan-flag": Variant(gpt2, {"target_modules": ["c_proj"]}),
    "lora-bias": Variant(gpt2, {"target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
    "bias-lora-only": Variant(gpt2, {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "bias-all": Variant(gpt2, {"target_modules": ["c_attn"], "bias": "all"}),
    "embedding": Variant(llama, {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-tied": Variant(llama, {"target_modules": ["embed_tokens", "q_proj"]}, make_options=TIED),
    "embedding-wte-tied": Variant(gpt2, {"target_modules": ["wte", "c_attn"]}),
    "head": Variant(llama, {"target_modules": ["lm_head", "q_proj"]}),
    "head-tied": Variant(llama, {"target_modules": ["lm_head", "q_proj"]}, make_options=TIED),
    "head-tied-gpt2": Variant(gpt2, {"target_modules": ["lm_head"]}),
    "save-head": Variant(llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "save-head-tied": Variant(llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, make_options=TIED),
    "save-embedding-tied": Variant(
        llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, make_options=TIED
    ),
    "save-both-kept-tied": Variant(
        llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        make_options=TIED,
    ),
    "save-classifier": Variant(
        bert, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
    ),
    "save-norms": Variant(llama, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    "tokens": Variant(llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 59]}),
    "tokens-tied": Variant(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 59]}, make_options=TIED
    ),
    "tokens-by-name": Variant(
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [0, 9]}}
    ),
    "resized": Variant(llama, {"target_modules": ["q_proj"]}, resize=VOCAB + 5),
    "resized-smaller": Variant(llama, {"target_modules": ["q_proj"]}, resize=VOCAB - 8),
    "resized-tied": Variant(llama, {"target_modules": ["q_proj"]}, resize=VOCAB + 5, make_options=TIED),
    "dora": Variant(llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora-conv1d": Variant(gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "dora-embedding": Variant(llama, {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "dora-rslora": Variant(llama, {"target_modules": ["v_proj"], "use_dora": True, "use_rslora": True}),
}


def tokens(network: Any) -> torch.Tensor:
    size = min(network.config.get_text_config().vocab_size, VOCAB)
    return torch.randint(0, size, (3, 17), generator=torch.Generator().manual_seed(2))


def logits(network: Any) -> torch.Tensor:
    network = network.eval()
    with torch.no_grad():
        out: torch.Tensor = network(input_ids=tokens(network)).logits
    return out


def trained(variant: Variant, folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Path, Path]:
    """A saved base, a saved adapter whose every number is random, and the reloaded PEFT model."""
    torch.manual_seed(0)
    base = variant.make(**variant.make_options).to(dtype)
    for name, parameter in base.named_parameters():
        if "bias" in name or "norm" in name or "ln_" in name:
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    base.save_pretrained(folder / "base")
    again = type(base).from_pretrained(folder / "base")
    if variant.resize:
        again.resize_token_embeddings(variant.resize, mean_resizing=False)
    options = {"r": 3, "lora_alpha": 5, "base_model_name_or_path": str(folder / "base"), **variant.options}
    network = get_peft_model(again, LoraConfig(**options))
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                else:
                    parameter.add_(torch.randn_like(parameter) * (1.5 if "lora_" in name else 0.3))
    network.save_pretrained(folder / "adapter")
    return network, folder / "base", folder / "adapter"


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_merged_logits_are_pefts(name: str, tmp_path: Path) -> None:
    network, base, adapter = trained(VARIANTS[name], tmp_path)
    report = prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    assert report.merged_tensors > 0
    merged, info = type(network.get_base_model()).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert merged.config.vocab_size == (VARIANTS[name].resize or VOCAB)
    torch.testing.assert_close(logits(merged), logits(network), rtol=1e-4, atol=1e-4)
    plain = type(network.get_base_model()).from_pretrained(base)
    if not VARIANTS[name].resize:
        assert (logits(merged) - logits(plain)).abs().max() > 1e-3
    verified = prolora_tools.verify(tmp_path / "merged", base=base, adapter=adapter)
    assert verified.ok, verified.problems


def used(tensor: OutputTensor) -> set[str]:
    """The names of the adapter's tensors that a tensor of the output is made of."""
    factors = {t.name for u in (*tensor.updates, *tensor.biases) for t in u.module.stored.values()}
    return factors | ({tensor.tokens.stored.name} if tensor.tokens else set()) | {tensor.source.name}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_tensor_of_the_adapter_has_its_place_in_the_plan(variant: str, tmp_path: Path) -> None:
    _, base, adapter = trained(VARIANTS[variant], tmp_path)
    plan = plan_merge(Adapter.open(adapter), Checkpoint.open(base), None)
    changed = [t for t in plan.tensors.values() if t.changed]
    tensors, names = tensors_of(adapter), {n for t in changed for n in used(t)}
    for name in set(tensors) - names:  # a head that stays tied is stored twice, and one of the two is enough
        assert any(torch.equal(tensors[name], tensors[other]) for other in names & set(tensors))
    assert all(t.change for t in changed)
    assert Adapter.open(adapter).tensor_count == len(tensors)
    assert not any(t.change for t in plan.tensors.values() if not t.changed)


@pytest.mark.parametrize("name", sorted(n for n, v in VARIANTS.items() if not v.options.get("use_dora")))
def test_compress_and_expand_keep_every_variant(name: str, tmp_path: Path) -> None:
    """With all ranks unshared nothing may be lost: the expanded adapter is the original, and PEFT loads it."""
    network, base, adapter = trained(VARIANTS[name], tmp_path)
    report = prolora_tools.compress(adapter, tmp_path / "c", unshared=3, chunks=2, method="average")
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    original, made = tensors_of(adapter), tensors_of(tmp_path / "e")
    assert set(original) == set(made)
    exact = {k for k in original if torch.equal(original[k], made[k])}
    shared = {m.name for m in report.modules if m.rank > m.unshared}  # the patterns variant has a rank above 3
    assert set(original) - exact <= {k for k in original if any(f".{n}.lora_" in k for n in shared)}
    again = type(network.get_base_model()).from_pretrained(base)
    if VARIANTS[name].resize:
        again.resize_token_embeddings(VARIANTS[name].resize, mean_resizing=False)
    loaded = PeftModel.from_pretrained(again, tmp_path / "e")
    if not shared:
        torch.testing.assert_close(logits(loaded), logits(network), rtol=1e-5, atol=1e-5)
    # And the PRoLoRA folder merges to what its expansion merges to.
    prolora_tools.merge(tmp_path / "c", tmp_path / "mc", base=base)
    prolora_tools.merge(tmp_path / "e", tmp_path / "me", base=base)
    assert all(
        torch.equal(a, b)
        for a, b in zip(tensors_of(tmp_path / "mc").values(), tensors_of(tmp_path / "me").values(), strict=True)
    )


@pytest.mark.parametrize("name", ["linear", "conv1d", "embedding", "lora-bias"])
def test_shared_variants_keep_their_told_error(name: str, tmp_path: Path) -> None:
    _, _, adapter = trained(VARIANTS[name], tmp_path)
    report = prolora_tools.compress(adapter, tmp_path / "c", unshared=1, chunks=2)
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    assert report.relative_error is not None
    assert report.relative_error > 0.01
    assert prolora_tools.diff(adapter, tmp_path / "e").relative_error == pytest.approx(report.relative_error)


def test_tied_heads_part_ways_only_where_they_must(tmp_path: Path) -> None:
    for name, untied in (("head-tied", True), ("embedding-tied", True), ("tokens-tied", False), ("linear", False)):
        _, base, adapter = trained(VARIANTS[name], tmp_path / name)
        report = prolora_tools.merge(adapter, tmp_path / name / "m", base=base)
        assert report.untied == untied, name
        assert ("lm_head.weight" in report.new_tensors) == untied
        config = json.loads((tmp_path / name / "m/config.json").read_text())
        assert config["tie_word_embeddings"] == (name.endswith("tied") and not untied)


def vit() -> Any:
    """Its patches are a Conv2d of kernel 4 x 4."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
            patch_size=4, num_labels=3,
        )
    )  # fmt: skip


def whisper() -> Any:
    """Its encoder starts with two Conv1d of kernel 3."""
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10,
            max_target_positions=12, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
            suppress_tokens=None, begin_suppress_tokens=None,
        )
    )  # fmt: skip


CONVOLUTIONS = {
    "conv2d": Variant(vit, {"target_modules": ["projection", "q_proj"]}),
    "conv2d-dora": Variant(vit, {"target_modules": ["projection"], "use_dora": True}),
    "conv1d-kernel": Variant(whisper, {"target_modules": ["conv1", "conv2"]}),
}


@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_convolutions(name: str, tmp_path: Path) -> None:
    network, base, adapter = trained(CONVOLUTIONS[name], tmp_path)
    opened = Adapter.open(adapter)
    assert "conv" in {m.kind for m in opened.modules.values()}
    prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    found = type(network.get_base_model()).from_pretrained(tmp_path / "merged").state_dict()
    for key, value in network.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)
    if opened.dora:
        with pytest.raises(UnsupportedError, match="DoRA"):
            prolora_tools.compress(adapter, tmp_path / "c", unshared=1, chunks=2)
        return
    prolora_tools.compress(adapter, tmp_path / "c", unshared=3, chunks=2)
    prolora_tools.expand(tmp_path / "c", tmp_path / "e")
    before, after = tensors_of(adapter), tensors_of(tmp_path / "e")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    report = prolora_tools.compress(adapter, tmp_path / "c1", unshared=1, chunks=2)
    assert prolora_tools.diff(adapter, tmp_path / "c1").relative_error == pytest.approx(report.relative_error)


def test_a_base_only_checkpoint_lacks_the_prefix(tmp_path: Path) -> None:
    """The hub's gpt2 has `h.0...` for what the adapter calls `transformer.h.0...`."""
    network, base, adapter = trained(VARIANTS["conv1d"], tmp_path)
    state = load_file(base / "model.safetensors")
    bare = {k.removeprefix("transformer."): v for k, v in state.items()}
    assert bare.keys() != state.keys()
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    assert tensors_of(tmp_path / "merged").keys() == bare.keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(network), rtol=1e-4, atol=1e-4)


def test_half_precision_adapters_are_widened_first(tmp_path: Path) -> None:
    """PEFT upcasts a bfloat16 adapter to float32 when it loads it, and multiplies then."""
    _, base, adapter = trained(VARIANTS["linear"], tmp_path, dtype=torch.bfloat16)
    file = adapter / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in load_file(file).items()}, file)
    prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = loaded.merge_and_unload().state_dict()
    for key, value in tensors_of(tmp_path / "merged").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[key]), key
