"""The paper's claims in miniature: a tiny English Llama learns Python, by LoRA and PRoLoRA at equal budgets.

One command: `python benchmarks/reproduction.py --out FOLDER` writes runs.jsonl (one line a training run; a second call
goes on where the first stopped), results.json, table.md and plot.svg. `--quick` does a part of it in seconds.

Text: the standard library of the running Python, split by file into training, validation and test. For each method
the learning rate with the lowest validation loss on the first seed is taken; the test loss is then told over all seeds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import statistics
import sys
import sysconfig
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from html import escape
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from prolora_tools.peft import ProLoraConfig, ProLoraLinear

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BASE = Path(__file__).parents[1] / "demo" / "models" / "llama-tiny-en"
WINDOW = 64
BATCH = 8
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SCALING = 2  # alpha / r of every method


def prolora(r: int, u: int, m: int, **options: Any) -> dict[str, Any]:
    return {"r": r, "unshared_r": u, "chunks_A": m, "chunks_B": m, **options}


METHODS: dict[str, dict[str, Any]] = {
    # at the budget of LoRA r=2
    "LoRA r=2": {"r": 2},
    "PRoLoRA (8,1,7)": prolora(8, 1, 7),
    "PRoLoRA (4,1,3)": prolora(4, 1, 3),
    # its parts taken away, same budget
    "CLoRA (8,0,4)": prolora(8, 0, 4, rotate=False),
    "RoLoRA (8,0,4)": prolora(8, 0, 4),
    "(8,1,7) without rotation": prolora(8, 1, 7, rotate=False),
    "(8,1,7) without rectified init": prolora(8, 1, 7, init_prolora_weights="unrectified"),
    # the dims of sharing and rotating, same budget; hidden x rank is RoLoRA (8,0,4)
    "share hidden, rotate hidden": prolora(8, 0, 4, variant="hidden-hidden"),
    "share rank, rotate hidden": prolora(8, 0, 4, variant="rank-hidden"),
    "share rank, rotate rank": prolora(8, 0, 4, variant="rank-rank"),
    # half of LoRA r=16
    "LoRA r=16": {"r": 16},
    "LoRA r=8": {"r": 8},
    "PRoLoRA (32,4,7)": prolora(32, 4, 7),
}


class Variant(ProLoraLinear):
    """The other ways to share and rotate, for the comparison only: u = 0, and both factors are built alike.

    Sharing along the rank keeps (r / m, dim) and stacks m copies. Rotating along the hidden dim rolls a copy's
    columns, by the copy's number times its width / m.
    """

    kind = ""

    @staticmethod
    def laid(stored: torch.Tensor, kind: str, ranks: int, dim: int) -> torch.Tensor:
        shared, rotated = kind.split("-")
        if shared == "hidden":  # stored (r, ceil(dim / m))
            copies, step = -(-dim // stored.shape[1]), max(stored.shape[1] // (-(-dim // stored.shape[1])), 1)
        else:  # stored (r / m, dim)
            copies = ranks // stored.shape[0]
            step = dim // copies if rotated == "hidden" else max(stored.shape[0] // copies, 1)
        axis = 1 if rotated == "hidden" else 0
        parts = [torch.roll(stored, -i * step, axis) for i in range(copies)]
        return torch.cat(parts, dim=1 if shared == "hidden" else 0)[:, :dim]

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        ranks = self.r[adapter_name]
        a = self.laid(self.prolora_A[adapter_name], self.kind, ranks, self.in_features)
        bt = self.laid(self.prolora_B[adapter_name].t(), self.kind, ranks, self.out_features)
        return a, bt.t().contiguous()


def as_variant(model: torch.nn.Module, kind: str) -> None:
    for layer in model.modules():
        if isinstance(layer, ProLoraLinear):
            layer.__class__ = type("Variant", (Variant,), {"kind": kind})
            if kind.startswith("rank"):
                g = layer.geometry["default"]
                rows = g.rank // g.chunks_a
                bound = layer.in_features**-0.5
                layer.prolora_A["default"] = torch.empty(rows, layer.in_features).uniform_(-bound, bound)
                layer.prolora_B["default"] = torch.zeros(layer.out_features, rows)


@dataclass(frozen=True)
class Run:
    method: str
    rate: float
    seed: int
    steps: int


@cache
def windows() -> dict[str, torch.Tensor]:
    """The text as (pieces, WINDOW) tokens: every tenth file is test, the one after it validation."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.model_max_length = sys.maxsize  # it is cut below
    found: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    limits = {"train": 6000 * WINDOW, "validation": 100 * WINDOW, "test": 100 * WINDOW}
    for i, file in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        part = {0: "test", 1: "validation"}.get(i % 10, "train")
        share = 10 * WINDOW if part != "train" else limits[part]  # many files, a little of each
        if len(found[part]) < limits[part]:
            found[part] += tokenizer(file.read_text(encoding="utf-8"))["input_ids"][:share]
    return {
        part: torch.tensor(ids[: len(ids) // WINDOW * WINDOW])[: limits[part]].view(-1, WINDOW)
        for part, ids in found.items()
    }


@torch.no_grad()
def loss_on(model: Any, part: torch.Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=b, labels=b).loss) * len(b) for b in torch.split(part, 25)]
    model.train()
    return sum(losses) / len(part)


def build(method: str, seed: int) -> Any:
    options = dict(METHODS[method])
    kind = options.pop("variant", None)
    options |= {"lora_alpha": SCALING * options["r"], "target_modules": "all-linear"}
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 with transformers 5.23
        model = get_peft_model(base, ProLoraConfig(**options) if "chunks_A" in options else LoraConfig(**options))
    if kind is not None:
        as_variant(model, kind)
    return model


def train(run: Run) -> dict[str, Any]:
    """One training run: its losses, in nats a token, and its trainable parameters."""
    torch.set_num_threads(1)
    begin, text = time.perf_counter(), windows()
    model = build(run.method, run.seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=0.0)
    warm = max(run.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (run.steps - s) / (run.steps - warm + 1))
    )
    order = torch.Generator().manual_seed(run.seed)
    model.train()
    for _ in range(run.steps):
        batch = text["train"][torch.randint(len(text["train"]), (BATCH,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return {
        **asdict(run),
        "validation": loss_on(model, text["validation"]),
        "test": loss_on(model, text["test"]),
        "parameters": sum(p.numel() for p in parameters),
        "seconds": round(time.perf_counter() - begin, 1),
    }


class Log:
    """The finished runs, appended to a file as they come."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.done = {self.key(entry): entry for entry in map(json.loads, lines)}

    @staticmethod
    def key(entry: dict[str, Any]) -> Run:
        return Run(entry["method"], entry["rate"], entry["seed"], entry["steps"])

    def complete(self, runs: Sequence[Run], workers: int) -> None:
        missing = [run for run in runs if run not in self.done]
        for entry in results(missing, workers):
            self.done[self.key(entry)] = entry
            with self.file.open("a") as f:
                f.write(json.dumps(entry) + "\n")
            print(
                f"{entry['method']} rate {entry['rate']:g} seed {entry['seed']}: {entry['test']:.4f}", file=sys.stderr
            )


def results(runs: Sequence[Run], workers: int) -> Iterator[dict[str, Any]]:
    if workers < 2:
        yield from map(train, runs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, run) for run in runs]):
            yield future.result()


def experiment(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Sweep, choose by validation loss, repeat with every seed. One row a method."""
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "runs.jsonl")
    first, methods = options.seeds[0], options.methods
    log.complete([Run(m, r, first, options.steps) for m in methods for r in options.rates], options.workers)
    best = {
        m: min(options.rates, key=lambda r: float(log.done[Run(m, r, first, options.steps)]["validation"]))
        for m in methods
    }
    log.complete([Run(m, best[m], s, options.steps) for m in methods for s in options.seeds], options.workers)
    rows = []
    for m in methods:
        found = [log.done[Run(m, best[m], s, options.steps)] for s in options.seeds]
        losses = [entry["test"] for entry in found]
        rows.append({
            "method": m, "parameters": found[0]["parameters"], "rate": best[m],
            "rate_at_the_edge": best[m] in {min(options.rates), max(options.rates)}, "mean": statistics.mean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 else 0.0, "losses": losses,
        })  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| method | parameters | learning rate | test loss, mean | standard deviation |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['method']} | {r['parameters']:,} | {r['rate']:g} | {r['mean']:.3f} | {r['spread']:.3f} |" for r in rows
    ]
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]]) -> str:
    """Dots for the seeds and a bar for the mean, one line a method, as SVG."""
    every: list[float] = [loss for r in rows for loss in r["losses"]]
    low, high = min(every), max(every)
    span = (high - low) or 1.0

    def x(loss: float) -> float:
        return 230 + 400 * (loss - low) / span

    height = 24 * len(rows) + 50
    size = f'width="660" height="{height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">']
    for i, r in enumerate(rows):
        y = 24 * i + 20
        parts.append(f'<text x="220" y="{y + 4}" text-anchor="end">{escape(r["method"])}</text>')
        parts += [f'<circle cx="{x(loss):.1f}" cy="{y}" r="4" fill="#36c" fill-opacity="0.5"/>' for loss in r["losses"]]
        mean = x(r["mean"])
        parts.append(
            f'<line x1="{mean:.1f}" x2="{mean:.1f}" y1="{y - 8}" y2="{y + 8}" stroke="#000" stroke-width="2"/>'
        )
    for loss in (low, high):
        parts.append(f'<text x="{x(loss):.1f}" y="{height - 20}" text-anchor="middle">{loss:.3f}</text>')
    parts.append(
        f'<text x="430" y="{height - 5}" text-anchor="middle">test loss, nats a token (lower is better)</text></svg>'
    )
    return "\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reproduction"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="two methods, two rates, one seed, a few steps")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.seeds, options.rates, options.workers = 4, [0], [1e-2, 3e-2], 1
        options.methods = ["LoRA r=2", "PRoLoRA (8,1,7)"]
    rows = experiment(options)
    text = windows()
    digest = hashlib.sha256(b"".join(text[p].numpy().tobytes() for p in sorted(text))).hexdigest()
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    report = {
        "base": BASE.name, "base_test_loss": loss_on(base, text["test"]), "steps": options.steps,
        "seeds": options.seeds, "rates": options.rates, "batch": BATCH, "window": WINDOW, "text_sha256": digest,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__},
        "rows": rows,
    }  # fmt: skip
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "table.md").write_text(table(rows))
    (options.out / "plot.svg").write_text(plot(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
