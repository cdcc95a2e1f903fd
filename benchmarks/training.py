"""Forward and backward of the PRoLoRA tuner against PEFT's LoRA of equal rank: time and memory, as ratios of one run.

Prints JSON. Methods take turns, and each figure is the median of the per-round ratios. `chunks` is the form that
was not chosen: products with the stored chunk, and rolled partial sums, without ever laying out A and B.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import peft
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prolora_tools.core.geometry import Geometry
from prolora_tools.core.sharing import copy_rows
from prolora_tools.peft import ProLoraConfig, ProLoraLinear

if TYPE_CHECKING:
    from collections.abc import Callable

RANK = 8
SHAPE: dict[str, Any] = {"r": RANK, "unshared_r": 1, "chunks_A": 7, "chunks_B": 7}
LAYERS = [(2048, 2048), (2048, 5504), (5504, 2048)]
TOKENS = [1, 64, 1024]


class Chunks(nn.Module):
    """The alternative: x is cut into m pieces, each meets the chunk, and the results are rolled and summed."""

    def __init__(self, layer: ProLoraLinear) -> None:
        super().__init__()
        self.layer = layer
        g, a, b = layer.geometry["default"], layer.in_features, layer.out_features
        copies_a, copies_b = g.a.copies(a), g.b.copies(b)
        offsets = torch.arange(copies_a)[:, None] * g.shared
        self.gather = (torch.from_numpy(copy_rows(g.a, copies_a)) + offsets).reshape(-1)
        self.scatter = torch.from_numpy(copy_rows(g.b, copies_b)).argsort(1).reshape(-1)
        self.copies = copies_a

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        chunk, ranks = layer.prolora_A["default"], layer.geometry["default"].shared
        width, whole = chunk.shape[1], layer.in_features // chunk.shape[1]
        pieces = x[:, : whole * width].view(-1, whole, width).transpose(0, 1)
        parts = torch.matmul(pieces, chunk.t())
        if whole < self.copies:
            parts = torch.cat(
                [parts, F.linear(x[:, whole * width :], chunk[:, : layer.in_features - whole * width])[None]]
            )
        rolled = parts.transpose(0, 1).flatten(1).index_select(1, self.gather)
        h = rolled.view(-1, self.copies, ranks).sum(1)
        laid = F.linear(h.index_select(1, self.scatter).view(len(h), -1, ranks), layer.prolora_B["default"])
        rest = F.linear(F.linear(x, layer.prolora_A_unshared["default"]), layer.prolora_B_unshared["default"])
        delta = (laid.flatten(1)[:, : layer.out_features] + rest) * layer.scaling["default"]
        base: torch.Tensor = layer.get_base_layer()(x)
        return base + delta


def adapted(base: nn.Module, method: str, target: str | list[str]) -> Any:
    config = (
        LoraConfig(r=RANK, target_modules=target) if method == "lora" else ProLoraConfig(**SHAPE, target_modules=target)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 with transformers 5.23
        return get_peft_model(base, config)


def step(run: Callable[[], torch.Tensor]) -> float:
    begin = time.perf_counter()
    run().sum().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    return time.perf_counter() - begin


def ratios(runs: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, float]:
    """Median over rounds of each method's time by LoRA's of the same round, and LoRA's milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        step(run)
    for i in range(rounds):
        names = list(runs)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(step(runs[name]))
    found = {
        name: round(statistics.median(t / base for t, base in zip(times[name], times["lora"], strict=True)), 3)
        for name in runs
        if name != "lora"
    }
    return {"lora_ms": round(statistics.median(times["lora"]) * 1e3, 3), **found}


def saved_bytes(run: Callable[[], torch.Tensor], parameters: list[nn.Parameter]) -> int:
    """Bytes kept for the backward pass, each storage once, parameters left out."""
    skip = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    del out
    return sum(seen.values())


def layer_rows(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for in_features, out_features in LAYERS:
        base = nn.Sequential(nn.Linear(in_features, out_features)).requires_grad_(requires_grad=False)
        geometry = Geometry(RANK, 1, 7, 7)
        ours = ProLoraLinear(base[0], "default", geometry=geometry, alpha=8, config=ProLoraConfig(**SHAPE))
        lora = adapted(base, "lora", ["0"])
        chunks = Chunks(ours)
        for tokens in TOKENS:
            x = torch.randn(tokens, in_features, requires_grad=True)
            modules = {"lora": lora, "prolora": ours, "chunks": chunks}
            runs: dict[str, Callable[[], torch.Tensor]] = {n: partial(m, x) for n, m in modules.items()}
            assert torch.allclose(runs["prolora"](), runs["chunks"](), atol=1e-4)
            kept = {n: saved_bytes(run, [*lora.parameters(), *ours.parameters()]) for n, run in runs.items()}
            rows.append(
                {
                    "in": in_features,
                    "out": out_features,
                    "tokens": tokens,
                    **ratios(runs, rounds if tokens < 1024 else rounds // 4),
                    "saved_bytes": {n: round(k / kept["lora"], 3) for n, k in kept.items() if n != "lora"},
                }
            )
    return rows


def small_llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=1024, intermediate_size=2752, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train_steps(method: str, steps: int) -> tuple[Callable[[], torch.Tensor], Any]:
    model = adapted(small_llama(), method, "all-linear").train()
    tokens = torch.randint(0, 2048, (2, 256))

    def run() -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for _ in range(steps):
        step(run)
        optimizer.step()
        optimizer.zero_grad()
    return run, optimizer


def peak_kib(method: str) -> int:
    """Peak resident memory of two training steps, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--child", method], check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def model_row(rounds: int) -> dict[str, Any]:
    runs, state = {}, {}
    for method in ("lora", "prolora"):
        runs[method], optimizer = train_steps(method, 1)
        state[method] = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values())
    peaks = {method: peak_kib(method) for method in runs}
    return {
        "model": "Llama, 4 layers, hidden 1024, 512 tokens, all linear layers",
        **ratios(runs, rounds),
        "peak_resident": round(peaks["prolora"] / peaks["lora"], 3),
        "optimizer_state": round(state["prolora"] / state["lora"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--child", choices=["lora", "prolora"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        train_steps(options.child, 2)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    report = {
        "geometry": SHAPE,
        "rounds": options.rounds,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "layers": layer_rows(options.rounds),
        "model": model_row(max(options.rounds // 4, 3)),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
