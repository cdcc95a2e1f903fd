"""`prolora-tools verify`."""

from __future__ import annotations

import click

from prolora_tools.cli.options import shown


@click.command("verify")
@click.argument("merged")
@click.option("--base", metavar="BASE", help="The base model, a folder or a Hub name.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ADAPTER",
    help="The adapter, a folder or a Hub name; may be repeated.",
)
@click.option("--weight", "weights", multiple=True, type=float, help="Of each adapter in turn, as merge was given it.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="As merge was given it.")
@click.option("--manifest", is_flag=True, help="Check the files against MERGED/merge_manifest.json instead.")
@click.option("--ulps", type=click.IntRange(min=0), default=1, show_default=True, help="Tolerance in half precision.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; one a core without it.")
@shown
def command(
    merged: str,
    base: str | None,
    adapters: tuple[str, ...],
    weights: tuple[float, ...],
    scale: float,
    ulps: int,
    threads: int | None,
    *,
    manifest: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Check that MERGED is base + adapters: every tensor recomputed, or the base's bit for bit.

    Or, with --manifest, that its files are still those that were written. Exits with 3 when it is not so.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.manifest import check_manifest  # noqa: PLC0415
    from prolora_tools.operations.verify import verify  # noqa: PLC0415

    if manifest == bool(base or adapters) or bool(base) != bool(adapters):
        raise click.UsageError("give --base and --adapter, or --manifest")
    with sources.inputs(quiet=quiet) as inputs:
        merged = inputs.folder(merged)
        if base:
            base, (adapter, *more) = inputs.folder(base), [inputs.folder(a) for a in adapters]
            with output.progress(quiet=quiet) as progress:
                report = verify(
                    merged,
                    base=base,
                    adapter=adapter,
                    more=more,
                    weights=weights,
                    scale=scale,
                    ulps=ulps,
                    threads=threads,
                    progress=progress,
                )
            return output.emit(inputs.named(report), tables.verified, as_json=as_json, quiet=quiet)
        with output.progress(quiet=quiet) as progress:
            files = check_manifest(merged, progress=progress)
        return output.emit(inputs.named(files), tables.manifest, as_json=as_json, quiet=quiet)
