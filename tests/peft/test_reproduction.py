"""The reduced reproduction runs, and its variants share and rotate along the dims that they are named after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import reproduction

if TYPE_CHECKING:
    from pathlib import Path


def test_the_reduced_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reproduction.main(["--quick", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "results.json").read_text())
    assert [r["method"] for r in report["rows"]] == ["LoRA r=2", "PRoLoRA (8,1,7)"]
    for row in report["rows"]:
        assert row["mean"] < report["base_test_loss"]  # a few steps help already
        # The rate was chosen by validation loss, and not by test loss.
        runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
        own = [run for run in runs if run["method"] == row["method"]]
        assert row["rate"] == min(own, key=lambda run: float(run["validation"]))["rate"]
    assert report["rows"][0]["parameters"] == pytest.approx(report["rows"][1]["parameters"], rel=0.01)
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()
    assert (tmp_path / "plot.svg").read_text().count("<circle") == 2
    before = (tmp_path / "runs.jsonl").read_bytes()
    reproduction.main(["--quick", "--out", str(tmp_path)])  # everything is there: nothing is trained again
    assert (tmp_path / "runs.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["hidden-hidden", "rank-hidden", "rank-rank"])
def test_variants_by_loops(kind: str) -> None:
    ranks, dim, copies = 8, 12, 4
    rows, width = (ranks, dim // copies) if kind.startswith("hidden") else (ranks // copies, dim)
    stored = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    found = reproduction.Variant.laid(stored, kind, ranks, dim)
    assert found.shape == (ranks, dim)
    # Steps of a copy: its size along the rotated dim over the number of copies, at least 1.
    for k in range(ranks):
        for c in range(dim):
            copy = c // width if kind.startswith("hidden") else k // rows
            row, column = k % rows, c % width
            if kind.endswith("hidden"):
                column = (column + copy * max(width // copies, 1)) % width
            else:
                row = (row + copy * max(rows // copies, 1)) % rows
            assert found[k, c] == stored[row, column]


def test_budgets_are_as_said() -> None:
    """Every method of the first two groups costs what LoRA of rank 2 costs; the large one, half of rank 16."""
    count = {m: reproduction.build(m, 0).num_parameters(only_trainable=True) for m in reproduction.METHODS}
    big = ["LoRA r=16", "LoRA r=8", "PRoLoRA (32,4,7)"]
    assert all(1 <= n / count["LoRA r=2"] < 1.01 for m, n in count.items() if m not in big)
    assert count["PRoLoRA (32,4,7)"] == pytest.approx(count["LoRA r=16"] / 2, rel=0.01)
