"""Merge against a copy: wall time until the bytes are on the disk, and memory the process owns.

Makes a random Llama checkpoint with a LoRA on every linear layer, compresses the LoRA, and runs each way in turn:
cp, a copy through safetensors, PEFT, other tools if they are given, and this package with its variants. Prints JSON
with ratios to cp (median, least, most over the rounds) and peak anonymous memory, at one size and at `--grow` times as
many layers; and compress, expand and verify against what they are to be measured by.

    python benchmarks/merge.py WORK --rounds 5 > merge.json
    python benchmarks/merge.py WORK --mergekit VENV/bin/mergekit-yaml --peer "mine=./merge {base} {adapter} {out}"
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from prolora_tools.files.dtypes import NAMES, encode
from prolora_tools.files.writer import write_safetensors

HIDDEN, INNER, HEADS, KV_HEADS, VOCAB, RANK = 2048, 8192, 32, 8, 32000, 16
KV = HIDDEN // HEADS * KV_HEADS
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KV, HIDDEN), "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
PYTHON = sys.executable

SAFETENSORS_COPY = """
import pathlib, shutil, sys
from safetensors.torch import load_file, save_file
source, out = map(pathlib.Path, sys.argv[1:])
out.mkdir()
for path in source.iterdir():
    if path.suffix != ".safetensors":
        shutil.copy(path, out)
        continue
    save_file(load_file(path), out / path.name, metadata={"format": "pt"})
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="1GB")
"""

MERGEKIT = """
printf 'models: [{model: "%s+%s"}]\\nmerge_method: passthrough\\ndtype: %s\\n' "$1" "$2" "$3" > "$4.yml"
rm -rf "$4.cache"
exec "$0" "$4.yml" "$4" --lora-merge-cache "$4.cache"
"""


def make(folder: Path, layers: int, dtype: str) -> int:
    """A base in shards of about 1 GB and its adapter, unless they are there. Returns the base's bytes."""
    base, adapter = folder / "base", folder / "adapter"
    if (adapter / "adapter_config.json").is_file():
        return sum(f.stat().st_size for f in base.iterdir())
    stored = NAMES[dtype]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in LINEAR.items()}
        shapes |= {f"model.layers.{layer}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    noise = np.random.default_rng(0).standard_normal(1 << 24).astype(np.float32) * np.float32(0.02)

    def numbers(name: str) -> bytes:
        items = int(np.prod((shapes | factors)[name]))
        start = sum(name.encode()) * 7919 % len(noise)
        return encode(np.resize(np.roll(noise, start), items), "F32" if name in factors else stored).tobytes()

    factors: dict[str, tuple[int, ...]] = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEAR.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            factors |= {f"{path}.lora_A.weight": (RANK, columns), f"{path}.lora_B.weight": (rows, RANK)}
    base.mkdir(parents=True)
    adapter.mkdir()
    groups: list[list[str]] = [[]]
    size = 0
    item = {"F32": 4}.get(stored, 2)
    for name, shape in shapes.items():
        n_bytes = item * int(np.prod(shape))
        if size + n_bytes > 1_000_000_000:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += n_bytes
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(groups, 1):
        file = f"model-{i:05}-of-{len(groups):05}.safetensors"
        total += write_safetensors(base / file, [(n, stored, shapes[n]) for n in names], numbers)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": VOCAB,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "tie_word_embeddings": False, "dtype": dtype,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    write_safetensors(adapter / "adapter_model.safetensors", [(n, "F32", s) for n, s in factors.items()], numbers)
    targets = sorted(name.rpartition(".")[2] for name in LINEAR)
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    return sum(f.stat().st_size for f in base.iterdir())


def measured(command: list[str], out: Path, *, read_only: bool = False) -> dict[str, float]:
    """Run a command, sync, and remove its output; `read_only` commands write none and read another's.

    Returns:
        `wall` s, `durable` s with the sync, `anonymous` MB at its peak (sampled), `others` CPU s of the machine.
    """
    if not read_only:
        shutil.rmtree(out, ignore_errors=True)
    os.sync()
    busy, begin = busy_seconds(), time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak, over = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.02):
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])

    sampler = threading.Thread(target=sample)
    sampler.start()
    error = child.stderr.read() if child.stderr else b""
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - begin
    over.set()
    sampler.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command}: {error.decode()}")
    os.sync()
    durable = time.perf_counter() - begin
    own = usage.ru_utime + usage.ru_stime
    return {
        "wall": wall, "durable": durable, "anonymous": peak * 1024 / 1e6, "cpu": own,
        "others": max(0.0, busy_seconds() - busy - own),
    }  # fmt: skip


def busy_seconds() -> float:
    """CPU seconds that the machine has spent, idle and waiting left out."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def ways(folder: Path, peers: dict[str, list[str]]) -> dict[str, list[str]]:
    """The commands to compare, by name; each writes folder/out."""
    base, lora, prolora, out = (str(folder / n) for n in ("base", "adapter", "prolora", "out"))

    def ours(adapter: str, *options: str) -> list[str]:
        return [PYTHON, "-m", "prolora_tools", "merge", adapter, "--base", base, "-o", out, "-q", *options]

    found = {
        "cp -r": ["cp", "-r", base, out],
        "merge LoRA": ours(lora),
        "verify": [PYTHON, "-m", "prolora_tools", "verify", out, "--base", base, "--adapter", lora, "-q"],
        "merge PRoLoRA": ours(prolora),
        "merge LoRA --resume": ours(lora, "--resume"),
        "merge LoRA --dtype float16": ours(lora, "--dtype", "float16"),
        "merge LoRA --max-shard-size 500MB": ours(lora, "--max-shard-size", "500MB"),
        "safetensors load and save": [PYTHON, "-c", SAFETENSORS_COPY, base, out],
    }
    given = {"{base}": base, "{adapter}": lora, "{out}": out}
    found |= {name: [given.get(part, part) for part in command] for name, command in peers.items()}
    return found


def conversions(folder: Path) -> dict[str, list[str]]:
    """Commands on adapters, and the same bytes read and written through safetensors, which stands first."""
    lora, prolora, out = (str(folder / n) for n in ("adapter", "prolora", "out"))
    command = [PYTHON, "-m", "prolora_tools"]
    shape = ["--unshared", "4", "--chunks", "2", "-q", "-o", out]
    return {
        "safetensors load and save": [PYTHON, "-c", SAFETENSORS_COPY.replace(".torch", ".numpy"), lora, out],
        "compress --method average": [*command, "compress", lora, "--method", "average", *shape],
        "compress": [*command, "compress", lora, *shape],
        "expand": [*command, "expand", prolora, "-o", out, "-q"],
    }


def compare(folder: Path, commands: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Every command in turn, round by round; each round's times over those of the round's first command."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            runs[name].append(measured(command, folder / "out", read_only=command[3:4] == ["verify"]))
            sys.stderr.write(f"{number + 1}/{rounds} {name}: {runs[name][-1]['durable']:.1f} s\n")
    result, first = {}, next(iter(commands))
    for name, found in runs.items():
        ratios = [r["durable"] / c["durable"] for r, c in zip(found, runs[first], strict=True)]
        result[name] = {
            "durable_s": [round(r["durable"], 2) for r in found],
            "cpu_s": round(statistics.median(r["cpu"] for r in found), 2),
            "others_cpu_s": round(statistics.median(r["others"] for r in found), 2),
            "anonymous_mb": round(max(r["anonymous"] for r in found), 1),
            "to_first": {
                "median": round(statistics.median(ratios), 2),
                "min": round(min(ratios), 2),
                "max": round(max(ratios), 2),
            },
        }  # fmt: skip
    return result


def tables(reports: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines: list[str] = []
    for report in reports:
        rounds = f"{report['rounds']} round{'s' * (report['rounds'] > 1)}"
        parts = [
            (f"{report['dtype']}, {size['bytes'] / 1e9:.2f} GB", "cp -r", size["ways"]) for size in report["sizes"]
        ]
        made = report["conversions"]
        parts.append((f"adapter of {made['bytes'] / 1e6:.0f} MB", "safetensors", made["ways"]))
        for title, first, found in parts:
            lines += [
                f"| {title} ({rounds}) | durable s | to {first}: median | min | max | CPU s | MB |",
                "|---|" + "---|" * 6,
            ]
            for name, row in found.items():
                times, ratio = ", ".join(f"{t:.2f}" for t in row["durable_s"]), row["to_first"]
                figures = f"{ratio['median']:.2f} | {ratio['min']:.2f} | {ratio['max']:.2f} | {row['cpu_s']:.1f}"
                lines.append(f"| {name} | {times} | {figures} | {row['anonymous_mb']:.0f} |")
            lines.append("")
    return "\n".join(lines)


def write_page(page: Path, json_files: list[Path]) -> None:
    """Put the tables of some runs between the marks of a Markdown page."""
    start, end = "<!-- figures -->\n", "<!-- end of figures -->"
    text = page.read_text()
    before, rest = text.split(start)
    after = rest.split(end)[1]
    found = tables([json.loads(file.read_text()) for file in json_files])
    page.write_text(f"{before}{start}\n{found}\n{end}{after}")


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--page", type=Path, help="run nothing: put the figures of the JSON files WORK/*.json here")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--grow", type=int, default=4, help="also merge so many times the layers; 1 for not")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--mergekit", help="its mergekit-yaml, from an environment of its own")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="{base} {adapter} {out}")
    given = parser.parse_args()
    if given.page:
        write_page(given.page, sorted(given.work.glob("*.json")))
        return
    peers = {} if given.no_peft else {"PEFT merge_and_unload": [PYTHON, "-c", PEFT, "{base}", "{adapter}", "{out}"]}
    if given.mergekit:
        mergekit = ["sh", "-c", MERGEKIT, given.mergekit, "{base}", "{adapter}", given.dtype, "{out}"]
        peers["mergekit-yaml"] = mergekit
    peers |= {name: shlex.split(command) for name, _, command in (peer.partition("=") for peer in given.peer)}
    report: dict[str, Any] = {"dtype": given.dtype, "rounds": given.rounds, "cores": os.cpu_count(), "sizes": []}
    for times in sorted({1, given.grow}):
        folder = given.work / f"{given.dtype}-{given.layers * times}"
        n_bytes = make(folder, given.layers * times, given.dtype)
        if not (folder / "prolora").is_dir():
            command = ["compress", str(folder / "adapter"), "-o", str(folder / "prolora"), "--unshared", "4"]
            subprocess.run(
                [PYTHON, "-m", "prolora_tools", *command, "--chunks", "2", "-q"], check=True, stdout=subprocess.DEVNULL
            )
        commands = ways(folder, peers)
        if times > 1:
            commands = {name: commands[name] for name in ("cp -r", "merge LoRA", "merge PRoLoRA")}
        rounds = given.rounds if times == 1 else 1
        report["sizes"].append({"bytes": n_bytes, "ways": compare(folder, commands, rounds)})
        if times == 1:
            size = sum(f.stat().st_size for f in (folder / "adapter").iterdir())
            report["conversions"] = {"bytes": size, "ways": compare(folder, conversions(folder), given.rounds)}
        shutil.rmtree(folder / "out", ignore_errors=True)
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
