"""Killed, interrupted and resumed merges; the manifest."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from prolora_tools import merge
from prolora_tools.cli import run
from prolora_tools.files.writer import STAGE
from prolora_tools.operations import manifest as manifests
from prolora_tools.operations.manifest import MANIFEST, check_manifest
from prolora_tools.progress import Silent
from tests.support import tensors_of, write_adapter

if TYPE_CHECKING:
    from pathlib import Path

SHARDS = 4


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """A base of four shards, one layer each, and an adapter for all of them."""
    draw = torch.Generator().manual_seed(0)
    base, factors, weight_map = tmp_path / "base", {}, {}
    base.mkdir()
    for layer in range(SHARDS):
        name = f"model.layers.{layer}.self_attn.q_proj"
        file = f"model-{layer + 1:05}-of-{SHARDS:05}.safetensors"
        save_file({f"{name}.weight": torch.randn(256, 256, generator=draw)}, base / file)
        weight_map[f"{name}.weight"] = file
        factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, 256, generator=draw)
        factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(256, 4, generator=draw)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return base, write_adapter(tmp_path / "adapter", {"r": 4, "target_modules": ["q_proj"]}, factors)


class KillAfter(Silent):
    """Interrupts once so many shards are done."""

    def __init__(self, shards: int) -> None:
        self.left = shards

    def milestone(self, message: str) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt(message)


def stages(folder: Path) -> list[Path]:
    return sorted(folder.glob(f".*{STAGE}-*"))


def same(a: Path, b: Path) -> bool:
    found, wanted = (
        {p.name: p.read_bytes() for p in f.iterdir() if p.name not in {MANIFEST, "README.md"}} for f in (a, b)
    )
    return found == wanted


def test_a_resumed_merge_keeps_finished_shards(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out", base=base, resume=True, threads=1, progress=KillAfter(2))
    (stage,) = stages(tmp_path)
    kept = {p.name: p.stat().st_ino for p in stage.glob("*1-of*.safetensors")}
    damaged = stage / f"model-00002-of-{SHARDS:05}.safetensors"
    with damaged.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"\xff")
    merge(adapter, tmp_path / "out", base=base, resume=True)
    assert stages(tmp_path) == []
    for name, inode in kept.items():
        assert (tmp_path / "out" / name).stat().st_ino == inode
    merge(adapter, tmp_path / "whole", base=base)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert check_manifest(tmp_path / "out").ok
    assert not (tmp_path / "out" / manifests.JOURNAL).exists()


@pytest.mark.parametrize("change", ["adapter", "dtype", "journal"])
def test_nothing_is_kept_of_another_request(change: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    with pytest.raises(KeyboardInterrupt):
        merge(adapter, tmp_path / "out", base=base, resume=True, threads=1, progress=KillAfter(3))
    options: dict[str, Any] = {}
    if change == "adapter":
        save_file({k: -t for k, t in tensors_of(adapter).items()}, adapter / "adapter_model.safetensors")
    elif change == "dtype":
        options["dtype"] = "bfloat16"
    else:
        (journal,) = tmp_path.glob(f".*/{manifests.JOURNAL}")
        journal.write_bytes(journal.read_bytes()[:-20])  # torn by the kill
    merge(adapter, tmp_path / "out", base=base, resume=True, **options)
    merge(adapter, tmp_path / "whole", base=base, **options)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert stages(tmp_path) == []


def test_a_stage_goes_only_when_its_process_is_dead(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    live, dead = (tmp_path / f".out{STAGE}-{n}" for n in (1, 2))
    for stage in (live, dead):
        stage.mkdir()
        (stage / "half").write_bytes(b"half")
    handle = os.open(live, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        merge(adapter, tmp_path / "out", base=base)
        assert stages(tmp_path) == [live]
        assert (live / "half").exists()
    finally:
        os.close(handle)
    merge(adapter, tmp_path / "out", base=base, overwrite=True)
    assert stages(tmp_path) == []


def test_an_output_that_was_moved_aside_comes_back(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    merge(adapter, tmp_path / "out", base=base)
    (tmp_path / "out").rename(tmp_path / f".out{STAGE}-7-replaced")  # killed between the two renames
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out"), "-q"]) == 1  # it exists
    assert (tmp_path / "out" / "config.json").is_file()
    assert stages(tmp_path) == []


def test_the_manifest_tells_every_change(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    out = tmp_path / "out"
    merge(adapter, out, base=base, manifest=True)
    assert run(["verify", str(out), "--manifest", "-q"]) == 0
    first, second, third, _ = sorted(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1] + b"\0")
    second.write_bytes(b"short")
    third.unlink()
    (out / "more.txt").write_text("new")
    report = check_manifest(out)
    assert {p.name for p in report.problems} == {first.name, second.name, third.name, "more.txt"}
    assert run(["verify", str(out), "--manifest", "-q"]) == 3
    assert run(["verify", str(out), "-q"]) == 2
    assert run(["verify", str(out), "--manifest", "--base", str(base), "-q"]) == 2


def test_one_shard_of_an_index_keeps_its_index(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Its name is not model.safetensors, so that nothing would find it without."""
    base, adapter = inputs
    tensors = tensors_of(base)
    for file in base.glob("*.safetensors"):
        file.unlink()
    one = "model-00001-of-00001.safetensors"
    save_file(tensors, base / one)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, one)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(adapter, tmp_path / "out", base=base)
    found = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert found["weight_map"] == index["weight_map"]


def test_manifests_are_reproducible(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = inputs
    for name in ("a", "b"):
        merge(adapter, tmp_path / name, base=base, manifest=True)
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def test_a_log_has_a_line_a_shard_and_one_for_all(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = inputs
    assert run(["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    json.loads(out)
    lines = err.splitlines()
    assert sorted(line.partition(":")[0] for line in lines[:-1]) == sorted(p.name for p in base.glob("*.safetensors"))
    assert lines[-1].endswith(f"{SHARDS} tensors merged, 0 copied")


def _kill(command: list[str], seconds: float) -> int:
    child = subprocess.Popen(
        [sys.executable, "-m", "prolora_tools", *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    time.sleep(seconds)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    return child.returncode


@pytest.mark.parametrize(
    ("name", "times"),
    [
        pytest.param(name, times, marks=pytest.mark.slow if times > 2 else ())
        for name in ("merge", "resume", "compress", "expand")
        for times in (2, 30)
    ],
)
def test_sigkill_leaves_all_or_nothing(name: str, times: int, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """At random moments of the command's own running time, overwriting in every second round."""
    base, adapter = inputs
    out, whole = tmp_path / "out", tmp_path / "whole"
    command = {
        "merge": ["merge", str(adapter), "--base", str(base)],
        "resume": ["merge", str(adapter), "--base", str(base), "--resume"],
        "compress": ["compress", str(adapter), "--unshared", "1", "--chunks", "2"],
        "expand": ["expand", str(adapter)],
    }[name]
    assert run([*command, "-o", str(whole), "-q"]) == 0
    subprocess.run([sys.executable, "-m", "prolora_tools", *command, "-o", str(out), "-q"], check=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "prolora_tools", *command, "-o", str(out), "--overwrite", "-q"], check=True)
    whole_run = time.monotonic() - begin
    chance = random.Random(5)
    for turn in range(times):
        if turn % 2 == 0:
            shutil.rmtree(out)
        _kill([*command, "-o", str(out), "--overwrite", "-q"], chance.uniform(0.3, 1.05) * whole_run)
        if out.exists():
            assert same(out, whole)
        assert run([*command, "-o", str(out), "--overwrite", "-q"]) == 0
        assert same(out, whole)
        assert stages(tmp_path) == []
