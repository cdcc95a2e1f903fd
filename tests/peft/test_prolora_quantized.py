"""On bitsandbytes layers, as the paper trains; skipped where bitsandbytes is not installed. Runs on the CPU."""

from __future__ import annotations

import importlib.util
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils import resolve_quantization_backend
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prolora_tools.files.adapter import Adapter
from prolora_tools.peft import ProLoraConfig, ProLoraLinear
from tests.peft import models
from tests.peft.models import backward

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"),
    # Of PEFT, transformers and bitsandbytes among themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*(MatMul8bitLt|use_reentrant).*:UserWarning"),
]

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}
SHAPE: dict[str, Any] = {"r": 8, "unshared_r": 1, "chunks_A": 7, "chunks_B": 7, "target_modules": "all-linear"}


@pytest.fixture(params=list(QUANTIZATIONS))
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    models.llama(hidden=64, intermediate=128).save_pretrained(tmp_path / "base")  # NF4 on the CPU: blocks of 64
    quantization = QUANTIZATIONS[request.param]

    def load_base() -> Any:
        config = BitsAndBytesConfig(**quantization)
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=config, device_map="cpu"
        ).eval()

    return load_base


def dequantized(layer: Any) -> torch.Tensor:
    backend = resolve_quantization_backend(layer)
    weight: torch.Tensor = backend.get_base_weight(layer)
    return weight


def pair(load: Callable[[], Any]) -> tuple[Any, Any]:
    """Ours, and PEFT's LoRA with the expanded factors, on the same quantised base."""
    ours = get_peft_model(load(), ProLoraConfig(**SHAPE, init_prolora_weights=False)).eval()
    theirs = get_peft_model(load(), LoraConfig(r=8, target_modules="all-linear")).eval()
    found = layers(ours)
    assert len(found) == 14
    for name, layer in found.items():
        assert layer.quantization_backend is not None
        a, b = layer.factors("default")
        lora = theirs.get_submodule(name)
        lora.lora_A["default"].weight.data, lora.lora_B["default"].weight.data = a.detach(), b.detach()
    return ours, theirs


def layers(model: Any) -> dict[str, ProLoraLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, ProLoraLinear)}


def test_forward_is_that_of_peft_lora(load: Callable[[], Any], tokens: torch.Tensor) -> None:
    ours, theirs = pair(load)
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
        assert not torch.allclose(ours(tokens).logits, load()(tokens).logits, atol=1e-3)


def test_training_saving_loading(load: Callable[[], Any], tokens: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(prepare_model_for_kbit_training(load()), ProLoraConfig(**SHAPE)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        expected = model(tokens).logits
    model.save_pretrained(tmp_path / "adapter")
    assert len(Adapter.open(tmp_path / "adapter").modules) == 14
    loaded = PeftModel.from_pretrained(prepare_model_for_kbit_training(load()), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_is_that_of_peft_lora(load: Callable[[], Any], *, safe: bool) -> None:
    ours, theirs = pair(load)
    with warnings.catch_warnings():  # PEFT: merging into quantised layers rounds
        warnings.simplefilter("ignore", UserWarning)
        ours.merge_adapter(safe_merge=safe)
        theirs.merge_adapter(safe_merge=safe)
    for name, layer in layers(ours).items():
        merged = dequantized(layer.get_base_layer())
        assert torch.equal(merged, dequantized(theirs.get_submodule(name).get_base_layer()))
    ours.unmerge_adapter()
    assert not layer.merged
