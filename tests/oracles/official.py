"""What the official code leaves on disk, reimplemented from METHOD.md section 3, with plain torch.

Independent of prolora_tools: roll and concatenate, as a module of the official code would expand itself.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"peft_type": "LORA", "lora_alpha": 16, "bias": "none", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}


def layer(seed: int, *, r: int, u: int, m: int, n: int, h: int, o: int) -> dict[str, torch.Tensor]:
    """Parameters of one layer: chunk 0 of A and B, and the vectors, B's transposed."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "lora_A.weight": torch.randn(r - u, -(-h // m), generator=g),
        "lora_B.weight": torch.randn(-(-o // n), r - u, generator=g),
    }
    if u:
        made |= {"lora_A_vec": torch.randn(u, h, generator=g), "lora_B_vec": torch.randn(u, o, generator=g)}
    return made


def expanded(made: dict[str, torch.Tensor], *, m: int, n: int, h: int, o: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, h) and B (o, r): copies rolled along the rank and cut, shared ranks first."""
    a0, b0 = made["lora_A.weight"], made["lora_B.weight"]
    ranks = a0.shape[0]
    step_a, step_b = max(ranks // m, 1), max(ranks // n, 1)
    a = torch.cat([torch.roll(a0, -i * step_a, dims=0) for i in range(m)], dim=1)[:, :h]
    b = torch.cat([torch.roll(b0, -j * step_b, dims=1) for j in range(n)], dim=0)[:o]
    if "lora_A_vec" in made:
        a, b = torch.cat([a, made["lora_A_vec"]]), torch.cat([b, made["lora_B_vec"].T], dim=1)
    return a, b


def write(folder: Path, tensors: dict[str, torch.Tensor], *, r: int, file: str, **config: Any) -> Path:
    """A folder with its plain LoRA config; `file` decides between safetensors and a pickled state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "r": r, **config}))
    full = {f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()}
    if file.endswith(".bin"):
        torch.save(full, folder / file)
    else:
        save_file(full, folder / file)
    return folder
