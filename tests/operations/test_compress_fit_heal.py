"""Healing (docs/howto-heal.md): a compressed adapter trains on, and gets back some of what it lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import prolora_tools
import prolora_tools.peft
from tests.support import model

BASE, ADAPTER = model("gpt2-tiny-en"), model("gpt2-tiny-py-r8")


def windows(file: Path, count: int, length: int = 64) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(BASE)(file.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def loss(network: Any, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = network(input_ids=ids, labels=ids).loss
    return result


def test_a_few_steps_recover_loss(tmp_path: Path) -> None:
    train = windows(Path(json.decoder.__file__), 24)
    held_out = windows(Path(json.encoder.__file__), 24)
    prolora_tools.compress(ADAPTER, tmp_path / "small", unshared=1, chunks=7)
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "small", is_trainable=True
    )
    with torch.no_grad():
        before = float(loss(network, held_out))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    for step in range(24):
        batch = train[step * 8 % 24 :][:8]
        optimizer.zero_grad()
        loss(network, batch).backward()  # type: ignore[no-untyped-call] # torch's own
        optimizer.step()
    with torch.no_grad():
        after = float(loss(network, held_out))
    assert after < before - 0.05
    network.save_pretrained(tmp_path / "healed")
    assert prolora_tools.stats(tmp_path / "healed").parameters == prolora_tools.stats(tmp_path / "small").parameters
