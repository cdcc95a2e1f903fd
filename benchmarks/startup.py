"""Startup of the command line against the import of click and rich, alternating, as ratios of one run.

python benchmarks/startup.py [--rounds 15] [--json FILE] [--page docs/benchmark-startup.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "demo/models/llama-tiny-py-r8"
PYTHON = sys.executable
REFERENCE = "python -c 'import click, rich'"
COMMANDS = {
    REFERENCE: [PYTHON, "-c", "import click, rich"],
    "prolora-tools --help": [PYTHON, "-m", "prolora_tools", "--help"],
    "prolora-tools --version": [PYTHON, "-m", "prolora_tools", "--version"],
    "prolora-tools stats ADAPTER": [PYTHON, "-m", "prolora_tools", "stats", str(ADAPTER)],
    "python -c 'import torch'": [PYTHON, "-c", "import torch"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def measure(rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for command in COMMANDS.values():
        seconds(command)  # the first run writes .pyc files and warms the page cache
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    rows = []
    for name, taken in times.items():
        ratios = [t / r for t, r in zip(taken, times[REFERENCE], strict=True)]
        rows.append(
            {
                "command": name,
                "seconds": statistics.median(taken),
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
            }
        )
    machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    return {"benchmark": "startup", "rounds": rounds, "machine": machine, "rows": rows}


def page(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "# Startup",
        "",
        f"Made by `python benchmarks/startup.py`: {result['rounds']} alternating rounds, medians, ratios within a",
        (
            f"round to the import of click and rich. Python {machine['python']}, {machine['cores']} cores, load "
            f"{machine['load']:.1f}. The limit for `--help` is 2."
        ),
        "",
        "| command | seconds | ratio | min | max |",
        "|---|---|---|---|---|",
    ]
    lines.extend(
        f"| `{row['command']}` | {row['seconds']:.3f} | {row['ratio']:.2f} | {row['ratio_min']:.2f} "
        f"| {row['ratio_max']:.2f} |"
        for row in result["rows"]
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    result = measure(options.rounds)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.page:
        options.page.write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
