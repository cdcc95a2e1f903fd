"""`prolora-tools stats`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from prolora_tools.cli.options import grouped, shown

if TYPE_CHECKING:
    from prolora_tools.cli.tables import View


@click.command("stats")
@click.argument("adapter")
@click.option("--base", metavar="BASE", help="The base model, a folder or a Hub name, for the share of its parameters.")
@grouped
@shown
def command(adapter: str, base: str | None, view: View, *, as_json: bool, quiet: bool) -> int:
    """Show an ADAPTER's parameters and bytes, against LoRA and VeRA on the same modules. Reads headers only."""
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.stats import stats  # noqa: PLC0415

    with sources.inputs(headers_only=True, quiet=quiet) as inputs:
        folders = inputs.folder(adapter), None if base is None else inputs.folder(base)
        report = inputs.named(stats(folders[0], base=folders[1]))
    return output.emit(report, tables.budget(view), as_json=as_json, quiet=quiet)
