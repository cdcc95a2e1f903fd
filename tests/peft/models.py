"""Tiny random models of three architectures; dims that 7 and 3 do not divide."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB = 64


def llama(*, tied: bool = False, hidden: int = 32, intermediate: int = 44) -> Any:
    """Linear layers, grouped queries: in and out differ."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    """Conv1D layers, whose weight is (in, out), and a tied head."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config).eval()


def bert() -> Any:
    """Linear layers with biases, and a classifier head."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=44,
        max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


MAKERS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def backward(loss: torch.Tensor) -> None:
    """Backpropagate."""
    loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
