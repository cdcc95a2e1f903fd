"""docs/tutorial-train.md, block by block."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prolora_tools.files.adapter import Adapter
from tests.support import ROOT

if TYPE_CHECKING:
    import pytest

TUTORIAL = ROOT / "docs" / "tutorial-train.md"


def blocks() -> list[tuple[str, str]]:
    """The fenced blocks in order: (language, text)."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)


def run_console(text: str) -> None:
    for line in text.splitlines():
        command = shlex.split(line.removeprefix("$ "))
        assert command[0] == "prolora-tools"
        done = subprocess.run(
            [sys.executable, "-m", "prolora_tools", *command[1:]], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    namespace: dict[str, Any] = {}
    seen = []
    for language, text in blocks():
        seen.append(language)
        if language == "python":
            exec(compile(text, TUTORIAL.name, "exec"), namespace)
        else:
            run_console(text)
    assert seen.count("python") == 5
    assert seen.count("console") == 4
    assert namespace["after"] < namespace["before"] - 0.5
    printed = capfd.readouterr().out
    assert "the same outputs: True" in printed
    assert "with the same outputs: True" in printed
    # "That is what a LoRA of rank 2 costs", up to the ceil of chunks.
    modules = Adapter.open(Path("my-prolora")).modules.values()
    lora_2 = sum(2 * (m.in_features + m.out_features) for m in modules)
    assert 1 <= sum(m.parameters for m in modules) / lora_2 < 1.01
    first, again = (Adapter.open(Path(folder)) for folder in ("my-prolora", "my-prolora-again"))
    for path, module in first.modules.items():
        for role, tensor in module.stored.items():
            assert torch.equal(torch.tensor(tensor.read()), torch.tensor(again.modules[path].stored[role].read()))
