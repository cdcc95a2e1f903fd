"""`prolora-tools verify`."""

from __future__ import annotations

import click

from prolora_tools.cli.options import shown


@click.command("verify")
@click.argument("merged")
@click.option("--base", required=True, metavar="BASE", help="The base model's folder.")
@click.option("--adapter", required=True, metavar="ADAPTER", help="The adapter's folder.")
@click.option("--ulps", type=click.IntRange(min=0), default=1, show_default=True, help="Tolerance in half precision.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; one a core without it.")
@shown
def command(merged: str, base: str, adapter: str, ulps: int, threads: int | None, *, as_json: bool, quiet: bool) -> int:
    """Check that MERGED is base + adapter: every tensor recomputed, or the base's bit for bit.

    Exits with 3 when it is not.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.verify import verify  # noqa: PLC0415

    with sources.inputs(quiet=quiet) as inputs:
        merged = inputs.folder(merged)
        base = inputs.folder(base)
        adapter = inputs.folder(adapter)
        with output.progress(quiet=quiet) as progress:
            report = verify(merged, base=base, adapter=adapter, ulps=ulps, threads=threads, progress=progress)
        report = inputs.named(report)
    return output.emit(report, tables.verified, as_json=as_json, quiet=quiet)
