"""A loopback Hub for every test here, small real folders to push, and the commands as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from prolora_tools.operations.compress import compress

from .server import Hub

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = "alice/base"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as running:
        yield running
    assert not [r for r in running.requests if r.origin == "cdn" and r.authorization], "a token reached the CDN"


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """Its error and hint; anything else on stderr fails the test."""
        lines = [line for line in self.err.splitlines() if not line.startswith(("Note:", "HTTP Error", "Retrying in"))]
        assert [line.split()[0] for line in lines] == ["Error:", "Hint:"], self.err
        return "\n".join(lines)


@dataclass
class Cli:
    """Runs `prolora-tools` against a Hub."""

    hub: Hub
    folder: Path

    def start(
        self, *arguments: object, token: str | None = "hf_alice", xet: bool = True, **env: str
    ) -> subprocess.Popen[str]:
        """Start a command."""
        program = "import sys; from prolora_tools.cli import main; main()"
        environment = self.hub.environment(self.folder / "home", token, xet=xet) | {"OMP_NUM_THREADS": "1"} | env
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object, token: str | None = "hf_alice", xet: bool = True, **env: str) -> Result:
        """Run one to its end."""
        return finish(self.start(*arguments, token=token, xet=xet, **env))


def finish(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=100)
    assert "Traceback" not in err, err
    assert "hf_alice" not in out + err, "the token was shown"
    return Result(process.returncode, out, err)


@pytest.fixture
def cli(hub: Hub, tmp_path: Path) -> Cli:
    (tmp_path / "work").mkdir()
    return Cli(hub, tmp_path / "work")


def write_lora(folder: Path, *, seed: int = 0, width: int = 64, base: str = BASE) -> Path:
    """A LoRA adapter of two modules."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(2):
        path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{path}.lora_A.weight"] = rng.standard_normal((4, width), dtype=np.float32)
        tensors[f"{path}.lora_B.weight"] = rng.standard_normal((width, 4), dtype=np.float32)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    return folder


def write_model(folder: Path, *, shards: int = 2, seed: int = 0) -> Path:
    """A sharded model with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {f"model.layers.{i}.self_attn.q_proj.weight": rng.standard_normal((64, 64), dtype=np.float32)}
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    total = 64 * 64 * 4 * shards
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": {"é": 0}}}))
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ x }}")
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora")


@pytest.fixture
def prolora(lora: Path, tmp_path: Path) -> Path:
    compress(lora, tmp_path / "prolora", unshared=1, chunks=2)
    return tmp_path / "prolora"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leftovers(folder: Path) -> list[str]:
    """What a command left in its working folder, the client's home aside."""
    return sorted(p.name for p in folder.iterdir() if p.name != "home")
