"""The one output layer: a report becomes a table or JSON on stdout; notes, progress and errors go to stderr."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from prolora_tools.errors import OutputError
from prolora_tools.progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TextIO

    from rich.progress import Progress as Bar
    from rich.progress import ProgressColumn

    from prolora_tools.progress import Progress
    from prolora_tools.reports import Report

WIDTH = 120
"""Columns of a table that does not go to a terminal."""


def console(file: TextIO) -> Console:
    """A rich console for stdout or stderr; colours and NO_COLOR are rich's business, terminal width too."""
    return Console(file=file, highlight=False, markup=False, width=None if file.isatty() else WIDTH, emoji=False)


def emit(report: Report, render: Callable[[Any, Console], None], *, as_json: bool, quiet: bool) -> int:
    """Print a report's result to stdout and its notes to stderr.

    Returns:
        The exit code: 0, or 3 where the result is outside the tolerance asked for.
    """
    try:
        if as_json:
            sys.stdout.write(json.dumps(report.to_json(), indent=2) + "\n")
        else:
            render(report, console(sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more when it exits
        raise OutputError(
            "stdout-unwritable",
            f"the report cannot be written to stdout: {error.strerror}",
            hint="free space where stdout is redirected to; the command's own output folder is complete",
        ) from error
    for note in () if quiet else getattr(report, "notes", ()):
        console(sys.stderr).print(f"Note: {note}", style="yellow")
    return 0 if report.ok else 3


def print_error(message: str, hint: str) -> None:
    """An error and its hint, on stderr, not wrapped: paths stay whole to be copied."""
    err = console(sys.stderr)
    err.print("Error:", style="bold red", end=" ")
    err.print(_one_line(message), soft_wrap=True)
    err.print("Hint:", style="bold", end=" ")
    err.print(_one_line(hint), soft_wrap=True)


def _one_line(text: str) -> str:
    """Text with what a terminal would obey written as escapes: names in a file are whatever its maker put there."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class _Rich:
    """Progress on a terminal; safe to advance from several threads."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.bar: Bar | None = None

    def start(self, description: str, total: int, unit: str) -> None:
        """Show a bar: bytes with their rate, modules as a count."""
        from rich import progress as rich_progress  # noqa: PLC0415 - only on a terminal

        units: list[ProgressColumn] = (
            [rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn()]
            if unit == "bytes"
            else [rich_progress.MofNCompleteColumn()]
        )
        self.bar = self.stack.enter_context(
            rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"),
                rich_progress.BarColumn(),
                *units,
                rich_progress.TimeRemainingColumn(),
                console=console(sys.stderr),
                transient=True,
            )
        )
        self.bar.add_task(description, total=total)

    def advance(self, amount: int) -> None:
        """Move the bar on."""
        if self.bar is not None:
            self.bar.advance(self.bar.task_ids[0], amount)

    def milestone(self, message: str) -> None:
        """The bar tells enough."""


class _Lines:
    """Progress in a log: a line for each part that is done, as merge's shards are."""

    def start(self, description: str, total: int, unit: str) -> None:
        """Nothing yet is done."""

    def advance(self, amount: int) -> None:
        """Too little for a line."""

    def milestone(self, message: str) -> None:
        """Print it; one write, so that lines of several threads stay whole."""
        sys.stderr.write(f"{_one_line(message)}\n")
        sys.stderr.flush()


def told(message: str, *, quiet: bool) -> None:
    """A line on stderr about work that is done."""
    if not quiet:
        _Lines().milestone(message)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """A progress bar on stderr where that is a terminal, and lines elsewhere."""
    with ExitStack() as stack:
        yield SILENT if quiet else _Rich(stack) if sys.stderr.isatty() else _Lines()
