"""Run a command in a real terminal and draw its last screen as an SVG.

    python scripts/terminal_picture.py docs/images/demo.svg --columns 96 --lines 44 -- make demo

Needs tmux. The colours are those the program printed; the picture loads nothing from anywhere.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text


def last_screen(command: list[str], columns: int, lines: int) -> str:
    """What the terminal shows when the command has ended, with its escape codes."""
    name = f"picture-{time.monotonic_ns()}"
    shell = f"{shlex.join(command)}; tmux wait-for -S {name}; sleep 60"
    size = ["-x", str(columns), "-y", str(lines)]
    subprocess.run(["tmux", "new-session", "-d", "-s", name, *size, shell], check=True)
    try:
        subprocess.run(["tmux", "wait-for", name], check=True)
        time.sleep(0.3)  # the last lines may still be on their way to the screen
        capture = ["tmux", "capture-pane", "-e", "-p", "-t", name]
        return subprocess.run(capture, check=True, capture_output=True, text=True).stdout.rstrip()
    finally:
        subprocess.run(["tmux", "kill-session", "-t", name], check=True)


def drawn(screen: str, columns: int, title: str) -> str:
    """The screen as an SVG without rich's web fonts."""
    console = Console(record=True, width=columns, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen), soft_wrap=True)
    svg = console.export_svg(title=title, unique_id="terminal")
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, DejaVu Sans Mono, Menlo, Consolas").replace("\n    \n", "\n")


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--columns", type=int, default=96)
    parser.add_argument("--lines", type=int, default=40)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    screen = last_screen(options.command, options.columns, options.lines)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    options.picture.write_text(drawn(screen, options.columns, " ".join(options.command)))


if __name__ == "__main__":
    main()
