"""`prolora-tools diff`."""

from __future__ import annotations

import click

from prolora_tools.cli.options import shown


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--max-error", type=click.FloatRange(min=0), metavar="E", help="Exit with 3 if the error is above E.")
@shown
def command(a: str, b: str, max_error: float | None, *, as_json: bool, quiet: bool) -> int:
    """Tell how far adapter B's dW is from adapter A's, for any two adapters of one base."""
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.diff import diff  # noqa: PLC0415

    with sources.inputs(quiet=quiet) as inputs:
        a = inputs.folder(a)
        b = inputs.folder(b)
        with output.progress(quiet=quiet) as progress:
            report = diff(a, b, max_error=max_error, progress=progress)
        report = inputs.named(report)
    return output.emit(report, tables.difference, as_json=as_json, quiet=quiet)
