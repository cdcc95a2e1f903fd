"""`prolora-tools convert-official`."""

from __future__ import annotations

import click

from prolora_tools.cli import options
from prolora_tools.cli.options import shown, written


@click.command("convert-official", short_help="Read a checkpoint of the official PRoLoRA code.")
@click.argument("folder")
@written
@click.option("--chunks", type=options.chunks, metavar="M[,N]", help="Chunks of A and B, where the dims do not tell.")
@click.option("--base", metavar="BASE", help="The base model, a folder or a Hub name, for the true dims where u is 0.")
@shown
def command(
    folder: str,
    out: str,
    chunks: tuple[int, int] | None,
    base: str | None,
    *,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Read FOLDER, a checkpoint of the official PRoLoRA code, into a PRoLoRA adapter, exactly.

    Raw training checkpoints do not hold u, m and n. They follow from the shapes; where several fit and mean
    different updates, the command asks for --chunks.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.convert_official import convert_official  # noqa: PLC0415

    with sources.inputs(headers_only=dry_run, quiet=quiet) as inputs:
        folder = inputs.folder(folder)
        base = None if base is None else inputs.folder(base)
        with output.progress(quiet=quiet) as progress:
            report = convert_official(
                folder, out, chunks=chunks, base=base, overwrite=overwrite, dry_run=dry_run, progress=progress
            )
        report = inputs.named(report)
    return output.emit(report, tables.conversion, as_json=as_json, quiet=quiet)
