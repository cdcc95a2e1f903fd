"""The pages a person reads: links lead somewhere, commands exist, the demo says what it said."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from prolora_tools.cli import cli
from tests.support import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_exist(page: Path) -> None:
    context = click.Context(cli)
    text = page.read_text().replace("\\\n", " ")
    for line in re.findall(r"prolora-tools ([a-z][^\n`|]*)", text):
        name, *words = line.split()
        command = cli.get_command(context, name)
        if command is None:  # prose, such as "prolora-tools takes"
            assert not any(w.startswith("-") for w in words), line
            continue
        known = {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)}
        used = {w.split("=")[0].rstrip(".,;:)") for w in words if re.match(r"--?[a-z]", w)}
        assert used <= known | {"--help", "--max-lora-rank"}, line


def test_the_reference_is_current() -> None:
    subprocess.run([sys.executable, "scripts/reference.py", "--check"], check=True, cwd=ROOT)


def test_the_demo_measures_what_was_trained(tmp_path: Path) -> None:
    """`make demo`, on a copy: the held-out losses are those of the training logs."""
    import shutil

    shutil.copytree(ROOT / "demo", tmp_path / "demo", ignore=shutil.ignore_patterns("out"))
    result = subprocess.run([sys.executable, "demo/run.py"], capture_output=True, text=True, check=True, cwd=tmp_path)
    losses = {
        match[1].strip(): float(match[2])
        for match in re.finditer(r"^ ?(\S.*?)\s{2,}[\d,-]+\s+(\d\.\d{4})\s+[\d.-]+%", result.stdout, re.MULTILINE)
    }
    assert losses["base, no adapter"] == pytest.approx(6.9268, abs=2e-4)
    assert losses["LoRA, as trained"] == pytest.approx(4.5396, abs=2e-4)
    better = ["PRoLoRA, fit, calibrated", "PRoLoRA, fit", "PRoLoRA, align", "PRoLoRA, average", "base, no adapter"]
    assert [losses[name] for name in better] == sorted(losses[name] for name in better)
    assert "verified" in result.stdout
    assert "Traceback" not in result.stderr
