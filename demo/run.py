"""Compress, expand, merge, verify and measure a really trained adapter, and print the held-out losses.

Run by `make demo`. Everything it needs lies beside this file; what it makes goes to demo/out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

HERE = Path(__file__).parent
BASE, ADAPTER = "demo/models/llama-tiny-en", "demo/models/llama-tiny-py-r8"
OUT = "demo/out"
SHAPE = ["--unshared", "2", "--chunks", "4"]
WINDOW = 256


def command(*arguments: str) -> None:
    """Show and run one prolora-tools command, as a user would."""
    print(f"\n$ prolora-tools {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "prolora_tools", *arguments], check=True, cwd=HERE.parent)


def quietly(*arguments: str) -> None:
    """Run one command for the table's sake."""
    subprocess.run(
        [sys.executable, "-m", "prolora_tools", *arguments, "--quiet"],
        check=True,
        cwd=HERE.parent,
        stdout=subprocess.DEVNULL,
    )


def held_out_loss(model_folder: str, tokens: Any) -> float:
    """Mean cross-entropy in nats per token over non-overlapping windows, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(HERE.parent / model_folder, dtype=torch.float32).eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    with torch.no_grad():
        losses = [float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in windows.split(16)]
    return sum(losses) / len(windows)


def main() -> None:
    """The whole demo."""
    started = time.monotonic()
    shutil.rmtree(HERE.parent / OUT, ignore_errors=True)
    command("compress", ADAPTER, "-o", f"{OUT}/prolora", *SHAPE)
    command("stats", f"{OUT}/prolora", "--base", BASE)
    command("expand", f"{OUT}/prolora", "-o", f"{OUT}/lora")
    command("diff", ADAPTER, f"{OUT}/lora")
    command("merge", f"{OUT}/prolora", "--base", BASE, "-o", f"{OUT}/merged")
    command("verify", f"{OUT}/merged", "--base", BASE, "--adapter", f"{OUT}/prolora")

    print("\nMerging the variants and measuring held-out losses ...", flush=True)
    variants = [("LoRA, as trained", ADAPTER)]
    for method in ("average", "align", "fit"):
        quietly("compress", ADAPTER, "-o", f"{OUT}/{method}", *SHAPE, "--method", method)
        variants.append((f"PRoLoRA, {method}", f"{OUT}/{method}"))
    print("Calibrating on other Python code: what do the layers see, and what moves the loss? ...", flush=True)
    text = ["--calibrate", "demo/text/python_calibration.txt", "--calibrate-outputs", "--calibrate-tokens", "16384"]
    quietly("compress", ADAPTER, "-o", f"{OUT}/calibrated", *SHAPE, *text, "--base", BASE)
    variants.append(("PRoLoRA, fit, calibrated", f"{OUT}/calibrated"))
    models = [("base, no adapter", BASE, "-")]
    for i, (name, adapter) in enumerate(variants):
        quietly("merge", adapter, "--base", BASE, "-o", f"{OUT}/model-{i}", "--dtype", "float32")
        models.append((name, f"{OUT}/model-{i}", adapter))
    models.append(("PRoLoRA, merged in bfloat16", f"{OUT}/merged", f"{OUT}/prolora"))
    table(models)
    print(f"\nDone in {time.monotonic() - started:.0f} s. What was made lies in {OUT}.")


def table(models: list[tuple[str, str, str]]) -> None:
    """Measure every model and print the losses."""
    import torch
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from prolora_tools import stats

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the text is longer than the context: it is cut into windows below
    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / BASE)
    text = (HERE / "text/python_eval.txt").read_text()
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    shown = Table(title=f"Held-out loss on Python code, {len(tokens) // WINDOW} windows of {WINDOW} tokens", box=None)
    for column, side in (("model", "left"), ("parameters", "right"), ("nats/token", "right"), ("gain kept", "right")):
        shown.add_column(column, justify=side)  # type: ignore[arg-type] # rich wants literals
    losses = [held_out_loss(folder, tokens) for _, folder, _ in models]
    for (name, _, adapter), loss in zip(models, losses, strict=True):
        parameters = "-" if adapter == "-" else f"{stats(HERE.parent / adapter).parameters:,}"
        shown.add_row(name, parameters, f"{loss:.4f}", f"{(losses[0] - loss) / (losses[0] - losses[1]):.1%}")
    console = Console()
    console.print()
    console.print(shown)


if __name__ == "__main__":
    main()
