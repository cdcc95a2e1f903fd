"""Bases whose stored names and shapes differ from the model's: mixtures of experts, vision-language models, fused rows.

Each is made by transformers with random weights and adapted by PEFT; PEFT's unmerged forward is the oracle.
"""

from __future__ import annotations

import json
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
from tests.operations.test_variants import VOCAB, Variant, logits, trained
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
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=IMAGE))


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
    "deepseek": Variant(
        deepseek,
        {"target_modules": ["q_b_proj", "kv_a_proj_with_mqa"], "target_parameters": EXPERTS},
    ),
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
    merged, info = type(network.get_base_model()).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    torch.testing.assert_close(outputs(merged), outputs(network), rtol=1e-4, atol=1e-4)
    plain = type(network.get_base_model()).from_pretrained(base)
    assert (outputs(merged) - outputs(plain)).abs().max() > 1e-3
    assert prolora_tools.verify(tmp_path / "merged", base=base, adapter=adapter).ok
