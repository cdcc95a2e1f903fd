"""What compression keeps of real adapters: held-out loss for every method, geometry and budget, with times.

    python benchmarks/fidelity.py --models FOLDER --eval TEXT --calibration TEXT [--json OUT] [--page OUT] [--plot OUT]

FOLDER holds adapters and their bases (adapter_config.json names each base); the bundled ones are taken without it.
Kept = (loss of base - loss of compressed) / (loss of base - loss of LoRA). --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from prolora_tools.core.fitting import truncated
from prolora_tools.core.geometry import Geometry
from prolora_tools.files.adapter import Adapter
from prolora_tools.operations.calibrate import Statistics, calibrate
from prolora_tools.operations.compress import compress

# u, chunks, strides: the rows of the table. Shares of the parameters are those of r = 8; u is scaled with the rank.
ROWS: list[tuple[int, int, Any]] = [
    (1, 7, (1, 3)),
    (1, 7, "free"),
    (2, 4, "official"),
    (2, 4, "free"),
    (0, 2, "official"),
    (0, 2, (4, 2)),
    (0, 2, "free"),
    (2, 2, "official"),
    (2, 2, "free"),
    (4, 2, "official"),
    (4, 2, "free"),
]
METHODS = ("average", "align", "fit", "fit, inputs", "fit, inputs and outputs")


@dataclass
class Cell:
    """One measurement."""

    adapter: str
    kind: str  # PRoLoRA or SVD
    shape: str
    parameters: int
    share: float
    method: str
    seconds: float
    loss: float
    kept: float
    strides: str = ""


class Bench:
    """One adapter on its base, and the loss of any dW in its place."""

    def __init__(self, folder: Path, base: Path, text: Path, *, length: int, windows: int | None) -> None:
        self.folder, self.base = folder, base
        self.adapter = Adapter.open(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        modules = dict(self.model.named_modules())
        self.weights = {path: modules[path].weight for path in self.adapter.modules}
        self.original = {path: w.detach().clone() for path, w in self.weights.items()}
        self.conv = {path for path in self.weights if type(modules[path]).__name__ == "Conv1D"}
        ids = transformers.AutoTokenizer.from_pretrained(base)(
            text.read_text(), add_special_tokens=False, verbose=False
        )["input_ids"]
        count = len(ids) // length
        self.windows = torch.tensor(ids[: count * length]).view(count, length)[:windows]
        self.before = self.loss({})
        self.after = self.loss(self.deltas(self.adapter))

    @staticmethod
    def deltas(adapter: Adapter) -> dict[str, np.ndarray[Any, Any]]:
        out = {}
        for path, module in adapter.modules.items():
            a, b = module.factors()
            out[path] = module.scaling * (b.astype(np.float64) @ a.astype(np.float64))
        return out

    @torch.no_grad()
    def loss(self, deltas: dict[str, np.ndarray[Any, Any]]) -> float:
        """Nats a token over positions 2 and on of every window."""
        for path, weight in self.weights.items():
            weight.copy_(self.original[path])
            if path in deltas:
                delta = torch.from_numpy(deltas[path]).float()
                weight.add_(delta.T if path in self.conv else delta)
        total = 0.0
        for start in range(0, len(self.windows), 8):
            ids = self.windows[start : start + 8]
            logits = self.model(ids).logits[:, :-1]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="sum"
                )
            )
        return total / (len(self.windows) * (self.windows.shape[1] - 1))

    def kept(self, loss: float) -> float:
        return (self.before - loss) / (self.before - self.after)

    def prolora(self, out: Path, unshared: int, chunks: int, strides: Any, method: str, stats: Any) -> Cell:
        begun = time.perf_counter()
        report = compress(
            self.folder,
            out,
            unshared=unshared,
            chunks=chunks,
            strides=strides,
            method="fit" if method.startswith("fit") else method,  # type: ignore[arg-type] # one of METHODS
            statistics=stats,
            overwrite=True,
        )
        seconds = time.perf_counter() - begun
        loss = self.loss(self.deltas(Adapter.open(out)))
        pairs = sorted({(m.stride_a, m.stride_b) for m in report.modules if m.rank > m.unshared})
        return Cell(
            self.folder.name,
            "PRoLoRA",
            f"u={unshared}, m=n={chunks}, {strides if isinstance(strides, str) else f'strides {strides}'}",
            report.parameters,
            report.parameters / report.source_parameters,
            method,
            seconds,
            loss,
            self.kept(loss),
            " ".join(map(str, pairs)),
        )

    def svd(self, rank: int, method: str, stats: Statistics | None) -> Cell:
        begun, deltas, parameters, whole = time.perf_counter(), {}, 0, 0
        for path, module in self.adapter.modules.items():
            a, b = module.factors()
            norm = (
                (None, None)
                if stats is None
                else (
                    stats.moments(path, "input", module.in_features),
                    stats.moments(path, "output", module.out_features),
                )
            )
            a_hat, bt_hat, _ = truncated(a, b.T, rank, norm)
            deltas[path] = module.scaling * (bt_hat.T @ a_hat)
            parameters += Geometry.lora(len(a_hat)).parameters(module.in_features, module.out_features)
            whole += module.parameters
        seconds = time.perf_counter() - begun
        loss = self.loss(deltas)
        return Cell(
            self.folder.name,
            "SVD",
            f"rank {rank}",
            parameters,
            parameters / whole,
            method,
            seconds,
            loss,
            self.kept(loss),
        )


def measure(bench: Bench, calibration: Path, length: int) -> tuple[list[Cell], dict[str, float]]:
    rank = max(m.geometry.rank for m in bench.adapter.modules.values())
    facts: dict[str, float] = {"rank": rank, "loss of base": bench.before, "loss of LoRA": bench.after}
    stats: dict[str, Statistics | None] = {"": None}
    for name, outputs in (("inputs", False), ("inputs and outputs", True)):
        begun = time.perf_counter()
        stats[name] = calibrate(bench.folder, base=bench.base, text=calibration, outputs=outputs, length=length)
        facts[f"seconds to calibrate, {name}"] = time.perf_counter() - begun
    cells = []
    for share in (2, 3, 4, 5, 6):
        for name, found in stats.items():
            cells.append(bench.svd(share * rank // 8, f"SVD, {name}" if name else "SVD", found))
            show(cells[-1])
    with tempfile.TemporaryDirectory() as scratch:
        for unshared, chunks, strides in ROWS:
            scale = rank // 8
            wanted = tuple(s * scale for s in strides) if isinstance(strides, tuple) and chunks == 2 else strides
            for method in METHODS if strides != "free" else METHODS[2:]:
                found = stats[method.removeprefix("fit").removeprefix(", ")] if method.startswith("fit") else None
                cells.append(bench.prolora(Path(scratch) / "out", unshared * scale, chunks, wanted, method, found))
                show(cells[-1])
    return cells, facts


def show(cell: Cell) -> None:
    print(
        f"{cell.adapter:36} {cell.shape:30} {cell.share:.3f} {cell.method:26} kept {cell.kept:8.2%} "
        f"{cell.seconds:6.1f} s {cell.strides[:24]}",
        flush=True,
    )


def page(results: list[dict[str, Any]]) -> str:
    """The tables of docs/fidelity.md between its markers."""
    lines: list[str] = []
    for result in results:
        cells, facts = [Cell(**c) for c in result["cells"]], result["facts"]
        lines += [
            f"### {result['adapter']} (rank {facts['rank']:.0f})",
            "",
            (
                f"Held-out loss {facts['loss of base']:.3f} nats a token without the adapter, "
                f"{facts['loss of LoRA']:.3f} with it. "
                f"Statistics: {facts['seconds to calibrate, inputs']:.0f} s for inputs, "
                f"{facts['seconds to calibrate, inputs and outputs']:.0f} s for inputs and outputs."
            ),
            "",
            "| shape | share of parameters | average | align | fit | fit, inputs | fit, inputs and outputs | seconds |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for shape in dict.fromkeys(c.shape for c in cells if c.kind == "PRoLoRA"):
            row = {c.method: c for c in cells if c.shape == shape}
            kept = " | ".join(f"{row[m].kept:.1%}" if m in row else "" for m in METHODS)
            some = next(iter(row.values()))
            seconds = ", ".join(f"{row[m].seconds:.1f}" for m in METHODS[2:] if m in row)
            lines.append(f"| {shape} | {some.share:.3f} | {kept} | {seconds} |")
        lines += ["", "| LoRA of rank | share | SVD | SVD, inputs | SVD, inputs and outputs |", "|---|---|---|---|---|"]
        for shape in dict.fromkeys(c.shape for c in cells if c.kind == "SVD"):
            found = [c for c in cells if c.shape == shape]
            kept = " | ".join(f"{c.kept:.1%}" for c in found)
            lines.append(f"| {shape.removeprefix('rank ')} | {found[0].share:.3f} | {kept} |")
        lines.append("")
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Kept gain against the share of parameters, one panel an adapter."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - for this picture only

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "prolora-tools"  # the same picture gives the same bytes
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4.2), squeeze=False)
    series = [
        ("PRoLoRA", "align", "o", "tab:gray"),
        ("PRoLoRA", "fit", "o", "tab:blue"),
        ("PRoLoRA", "fit, inputs and outputs", "o", "tab:red"),
        ("SVD", "SVD", "x", "tab:olive"),
        ("SVD", "SVD, inputs and outputs", "x", "black"),
    ]
    for axis, result in zip(axes[0], results, strict=True):
        cells = [Cell(**c) for c in result["cells"]]
        for kind, method, marker, color in series:
            best: dict[float, float] = {}
            for c in cells:
                if c.kind == kind and c.method == method:
                    best[c.share] = max(best.get(c.share, -1.0), 100 * c.kept)
            label = method if kind == "SVD" else f"PRoLoRA, {method}"
            axis.plot(sorted(best), [best[s] for s in sorted(best)], marker=marker, color=color, label=label)
        axis.set(
            title=result["adapter"], xlabel="share of the LoRA's parameters", ylabel="kept gain, %", ylim=(80, 100.5)
        )
        axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def bundled() -> Path:
    return Path(__file__).parents[1] / "tests/data/models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=bundled(), help="folder of adapters and bases")
    parser.add_argument("--adapter", action="append", help="only this one, repeatable")
    parser.add_argument("--eval", type=Path, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="text for the statistics")
    parser.add_argument("--windows", type=int, help="first windows of the held-out text only")
    parser.add_argument("--json", type=Path, help="write the measurements here, or read them with --render")
    parser.add_argument("--page", type=Path, help="put the tables between the markers of this Markdown page")
    parser.add_argument("--plot", type=Path, help="draw the picture here")
    parser.add_argument("--render", action="store_true", help="measure nothing: page and plot from --json")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    results: list[dict[str, Any]] = []
    if options.render:
        results = json.loads(options.json.read_text())["adapters"]
    else:
        for folder in sorted(options.models.iterdir()):
            file = folder / "adapter_config.json"
            if not file.is_file() or (options.adapter and folder.name not in options.adapter):
                continue
            config = json.loads(file.read_text())
            base = options.models / Path(config["base_model_name_or_path"]).name
            if config.get("use_dora") or config.get("modules_to_save") or not base.is_dir():
                continue
            length = min(256, json.loads((base / "config.json").read_text()).get("n_positions", 256))
            bench = Bench(folder, base, options.eval, length=length, windows=options.windows)
            cells, facts = measure(bench, options.calibration, length)
            results.append({"adapter": folder.name, "facts": facts, "cells": [asdict(c) for c in cells]})
        if options.json:
            options.json.write_text(json.dumps({"adapters": results}, indent=1) + "\n")
    if options.page:
        head, mark, rest = options.page.read_text().partition("<!-- tables -->\n")
        _, end, tail = rest.partition("<!-- end of tables -->")
        options.page.write_text(head + mark + page(results) + end + tail)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
