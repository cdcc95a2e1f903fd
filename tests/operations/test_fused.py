"""Bases whose stored names and shapes differ from the model's: mixtures of experts, vision-language models, fused rows.

Each is made by transformers with random weights and adapted by PEFT; PEFT's unmerged forward is the oracle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

import prolora_tools
from prolora_tools.errors import MismatchError, UnsupportedError
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import Checkpoint
from prolora_tools.operations.merge_plan import plan_merge
from tests.operations.test_variants import VOCAB, Variant, logits, trained, used
from tests.support import tensors_of, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
IMAGE = 58


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def qwen_moe() -> Any:
    config = Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=20, shared_expert_intermediate_size=28, num_experts=5, num_experts_per_tok=2
    )
    return Qwen2MoeForCausalLM(config)


def deepseek() -> Any:
    """Its first layer is dense."""
    config = DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4}, moe_intermediate_size=20, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def gpt_oss() -> Any:
    """Its experts are stored fused, (experts, in, out)."""
    config = GptOssConfig(
        **SMALL | {"intermediate_size": 20, "head_dim": 8}, num_local_experts=4, num_experts_per_tok=2
    )
    return GptOssForCausalLM(config)


def llava(*, tied: bool = False) -> Any:
    text = LlamaConfig(**SMALL, tie_word_embeddings=tied)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=4, tie_word_embeddings=tied
    )
    return LlavaForConditionalGeneration(config)


ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}


def qwen_vl() -> Any:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config={**SMALL, "rope_parameters": ROPE}, vision_config=vision, image_token_id=IMAGE)
    )


def qwen_vl_moe() -> Any:
    """Its experts are stored fused and with the last two dims swapped."""
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 2, "out_hidden_size": 24,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {
        **SMALL, "moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "rope_parameters": {**ROPE, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=IMAGE)
    )


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
VARIANTS = {
    "mixtral-attention": Variant(mixtral, {"target_modules": ["q_proj", "o_proj"]}),
    "mixtral-experts": Variant(mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "mixtral-only-experts": Variant(mixtral, {"target_modules": [], "target_parameters": [*EXPERTS, "gate.weight"]}),
    "mixtral-down": Variant(mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "mixtral-old-names": Variant(mixtral, {"target_modules": ["w1", "w2", "w3", "v_proj"]}),
    "mixtral-patterns": Variant(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"down_proj": 2, "layers.1.mlp.experts.gate_up_proj": 5},
            "alpha_pattern": {"gate_up_proj": 7},
            "use_rslora": True,
        },
    ),
    "qwen-moe": Variant(qwen_moe, {"target_modules": "all-linear", "target_parameters": EXPERTS}),
    "qwen-moe-old-names": Variant(qwen_moe, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "deepseek": Variant(deepseek, {"target_modules": ["q_b_proj", "kv_a_proj_with_mqa"], "target_parameters": EXPERTS}),
    "gpt-oss": Variant(gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "llava": Variant(llava, {"target_modules": ["q_proj", "linear_1", "down_proj"]}),
    "llava-text": Variant(llava, {"target_modules": r".*language_model.*\.(k|v)_proj"}),
    "llava-head-tied": Variant(
        llava, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, make_options={"tied": True}
    ),
    "qwen-vl": Variant(qwen_vl, {"target_modules": ["q_proj", "qkv", "gate_proj"]}),
    "qwen-vl-moe": Variant(qwen_vl_moe, {"target_modules": ["q_proj", "qkv"], "target_parameters": EXPERTS}),
}


def outputs(network: Any) -> torch.Tensor:
    """Logits of text, and of text with an image where the model sees."""
    found = logits(network)
    if not hasattr(network.config, "vision_config"):
        return found
    draw = torch.Generator().manual_seed(5)
    ids = torch.tensor([[3, *[IMAGE] * 4, 7, 9]])
    image: dict[str, torch.Tensor] = {"pixel_values": torch.randn(1, 3, 8, 8, generator=draw)}
    if network.config.model_type != "llava":
        patches = torch.randn(16, 3 * 2 * 2 * 2, generator=draw)
        types = (ids == IMAGE).long()
        image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": types}
    with torch.no_grad():
        seen = network(input_ids=ids, **image).logits
    return torch.cat([found.reshape(-1, found.shape[-1]), seen.reshape(-1, found.shape[-1])])


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_merged_outputs_are_pefts(name: str, tmp_path: Path) -> None:
    network, base, adapter = trained(VARIANTS[name], tmp_path)
    report = prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert set(after) - set(before) == set(report.new_tensors)
    plan = plan_merge(Adapter.open(adapter), Checkpoint.open(base), None)
    assert report.adapter_tensors == len(tensors_of(adapter))
    assert set(tensors_of(adapter)) <= {n for t in plan.tensors.values() if t.changed for n in used(t)}
    merged, info = type(network.get_base_model()).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(outputs(merged), outputs(network), rtol=1e-4, atol=1e-4)
    plain = type(network.get_base_model()).from_pretrained(base)
    assert (outputs(merged) - outputs(plain)).abs().max() > 1e-3
    assert prolora_tools.verify(tmp_path / "merged", base=base, adapter=adapter).ok


def of_peft(adapter: Path, network: Any, base: Path) -> Any:
    """PEFT's own loading of an adapter folder onto a fresh base."""
    return PeftModel.from_pretrained(type(network).from_pretrained(base), adapter)


def factors(shapes: dict[str, tuple[int, int]], rank: int = 3) -> dict[str, torch.Tensor]:
    """Random factors by module path, the shapes (in, out)."""
    draw, made = torch.Generator().manual_seed(3), {}
    for path, (width, height) in shapes.items():
        made[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
        made[f"base_model.model.{path}.lora_B.weight"] = torch.randn(height, rank, generator=draw)
    return made


def saved(network: Any, folder: Path) -> Path:
    network.save_pretrained(folder)
    return folder


def test_an_adapter_of_transformers_4_names_experts_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = mixtral()
    base = saved(network, tmp_path / "base")
    shapes = {
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{w}": (40, 24) if w == "w2" else (24, 40)
        for i in range(2)
        for e in range(4)
        for w in ("w1", "w2", "w3")
    }
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["w1", "w2", "w3"], "base_model_name_or_path": str(base)}
    adapter = write_adapter(tmp_path / "adapter", config, factors(shapes))
    prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    merged = type(network).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(of_peft(adapter, network, base)), rtol=1e-4, atol=1e-4)
    # They are plain modules, so they compress.
    prolora_tools.compress(adapter, tmp_path / "small", unshared=1, chunks=2)
    prolora_tools.merge(tmp_path / "small", tmp_path / "merged-small", base=base)
    prolora_tools.expand(tmp_path / "small", tmp_path / "expanded")
    prolora_tools.merge(tmp_path / "expanded", tmp_path / "merged-expanded", base=base)
    small, expanded = tensors_of(tmp_path / "merged-small"), tensors_of(tmp_path / "merged-expanded")
    assert all(torch.equal(small[k], expanded[k]) for k in small)


def test_experts_of_a_base_without_its_prefix(tmp_path: Path) -> None:
    """Neither the parameters' nor the modules' names are keys: transformers' renaming finds the i-th expert."""
    torch.manual_seed(1)
    network = mixtral()
    base = saved(network, tmp_path / "base")
    shapes = {f"model.layers.{i}.block_sparse_moe.experts.{e}.w2": (40, 24) for i in range(2) for e in range(4)}
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["w2"]}
    adapter = write_adapter(tmp_path / "adapter", config, factors(shapes))
    prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    state = load_file(base / "model.safetensors")
    bare = {k.removeprefix("model."): v for k, v in state.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    prolora_tools.merge(adapter, tmp_path / "bare", base=base)
    found, expected = tensors_of(tmp_path / "bare"), tensors_of(tmp_path / "merged")
    assert all(torch.equal(found[k.removeprefix("model.")], expected[k]) for k in expected)
    assert any(not torch.equal(bare[k], found[k]) for k in bare)


def test_an_adapter_of_transformers_4_for_a_vision_language_model(tmp_path: Path) -> None:
    """Its `language_model.model.` has become `model.language_model.`, and so has the checkpoint's."""
    torch.manual_seed(1)
    network = llava()
    base = saved(network, tmp_path / "base")
    shapes = {f"language_model.model.layers.{i}.self_attn.q_proj": (24, 24) for i in range(2)}
    shapes |= {f"vision_tower.vision_model.encoder.layers.{i}.self_attn.q_proj": (16, 16) for i in range(2)}
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj"]}
    adapter = write_adapter(tmp_path / "adapter", config, factors(shapes))
    prolora_tools.merge(adapter, tmp_path / "merged", base=base)
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert sum(not torch.equal(before[k], after[k]) for k in before) == 4
    merged = type(network).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged), outputs(of_peft(adapter, network, base)), rtol=1e-4, atol=1e-4)


def dinov2() -> Any:
    """Its checkpoint holds gate_proj and up_proj as one tensor, one above the other."""
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4,
        use_swiglu_ffn=True,
    )  # fmt: skip
    return transformers.Dinov2ForImageClassification(config)


@pytest.mark.parametrize("targets", [["up_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_rows_of_a_fused_tensor(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = dinov2()
    base = saved(network, tmp_path / "base")
    fused = [k for k in tensors_of(base) if "weights_in" in k and k.endswith("weight")]
    assert len(fused) == 2
    wrapped = get_peft_model(type(network).from_pretrained(base), LoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(tmp_path / "adapter")
    prolora_tools.merge(tmp_path / "adapter", tmp_path / "merged", base=base)
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert all(not torch.equal(before[k], after[k]) for k in fused)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    merged = type(network).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(pixels).logits, wrapped.eval()(pixels).logits, rtol=1e-4, atol=1e-4)


def test_dora_on_rows_of_a_fused_tensor_is_refused(tmp_path: Path) -> None:
    network = dinov2()
    base = saved(network, tmp_path / "base")
    wrapped = get_peft_model(
        type(network).from_pretrained(base), LoraConfig(r=3, target_modules=["up_proj"], use_dora=True)
    )
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match=r"weights_in.*more to it"):
        prolora_tools.merge(tmp_path / "adapter", tmp_path / "merged", base=base)


@pytest.mark.parametrize("name", ["mixtral-experts", "gpt-oss", "qwen-vl-moe"])
def test_experts_do_not_depend_on_blocks_threads_shards_or_dtype(name: str, tmp_path: Path) -> None:
    _, base, adapter = trained(VARIANTS[name], tmp_path)
    prolora_tools.merge(adapter, tmp_path / "one", base=base, threads=1)
    prolora_tools.merge(adapter, tmp_path / "two", base=base, threads=3, max_shard_size=3000)
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    prolora_tools.merge(adapter, tmp_path / "half", base=base, dtype="bfloat16")
    half = tensors_of(tmp_path / "half")
    assert all(torch.equal(half[k], one[k].to(torch.bfloat16)) for k in one if one[k].is_floating_point())


def test_a_layer_whose_experts_have_no_factors_is_an_error(tmp_path: Path) -> None:
    _, base, adapter = trained(VARIANTS["mixtral-experts"], tmp_path)
    kept = {k: v for k, v in tensors_of(adapter).items() if "layers.1.mlp" not in k}
    save_file(kept, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"no factors for model\.layers\.1\.mlp\.experts"):
        prolora_tools.merge(adapter, tmp_path / "merged", base=base)


def test_stats_count_the_factors_of_parameters(tmp_path: Path) -> None:
    for name in ("mixtral-experts", "mixtral-only-experts"):
        _, _, adapter = trained(VARIANTS[name], tmp_path / name)
        report = prolora_tools.stats(adapter)
        tensors = tensors_of(adapter)
        assert report.parameters == sum(t.numel() for t in tensors.values())
        assert report.other_parameters == sum(t.numel() for k, t in tensors.items() if ".mlp." in k)
        with pytest.raises(UnsupportedError, match="target_parameters"):
            prolora_tools.expand(adapter, tmp_path / "out")
        assert any("target_parameters" in note for note in report.notes)
