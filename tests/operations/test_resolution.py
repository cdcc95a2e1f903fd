"""What is known of architectures without asking transformers, held to what transformers says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from prolora_tools.operations.mapping import Mapping
from prolora_tools.operations.resolution import PLAIN

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "intermediate_size": 64, "pad_token_id": 0,
}  # fmt: skip


def models(model_type: str) -> list[Any]:
    """Every class that transformers has for the type, on the meta device."""
    config = CONFIG_MAPPING[model_type](**SMALL)
    made = []
    for cls in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
        if type(config) in cls._model_mapping:
            with torch.device("meta"):
                made.append(cls.from_config(config))
    return made


@pytest.mark.parametrize("model_type", sorted(PLAIN))
def test_plain_architectures_store_linear_layers_as_they_are(model_type: str) -> None:
    found = models(model_type)
    assert found
    for model in found:
        parameters = model.state_dict()
        stored = {name: SimpleNamespace(shape=tuple(p.shape)) for name, p in parameters.items()}
        mapping: Any = Mapping(model, SimpleNamespace(tensors=stored))  # type: ignore[arg-type] # all that it looks at
        assert mapping.resolution.keys == {name: name for name in parameters}
        assert not any(parameters[name].dim() == 2 for name in mapping.resolution.in_out)
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 2:
                kind = type(module).__name__
                assert isinstance(module, torch.nn.Linear | torch.nn.Embedding) or kind.lower().endswith(
                    "topkrouter"
                ), name


def test_the_check_sees_architectures_that_are_not_plain() -> None:
    """GPT-2 has Conv1D, and a vision-language model's checkpoint has other names than the model."""
    gpt2 = models("gpt2")[0]
    stored = {name: SimpleNamespace(shape=tuple(p.shape)) for name, p in gpt2.state_dict().items()}
    mapping: Any = Mapping(gpt2, SimpleNamespace(tensors=stored))  # type: ignore[arg-type] # all that it looks at
    assert mapping.resolution.in_out
    assert "gpt2" not in PLAIN
