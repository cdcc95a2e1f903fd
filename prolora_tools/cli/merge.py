"""`prolora-tools merge`."""

from __future__ import annotations

import time

import click

from prolora_tools.cli.options import DTYPES, shown, size, written


@click.command("merge")
@click.argument("adapter")
@click.option("--base", required=True, metavar="BASE", help="The base model, a folder or a Hub name.")
@written
@click.option("--adapter", "more", multiple=True, metavar="ADAPTER", help="A further adapter; may be repeated.")
@click.option(
    "--weight", "weights", multiple=True, type=float, help="Of each adapter in turn, ADAPTER's first; or none."
)
@click.option("--scale", type=float, default=1.0, show_default=True, help="Multiplies every adapter's delta.")
@click.option(
    "--dtype", type=DTYPES, help="Store floats in this dtype instead of the base's (quantised: its config's)."
)
@click.option("--max-shard-size", type=size, metavar="SIZE", help="Split anew, such as 5GB; without it, as the base.")
@click.option("--copy-code", is_flag=True, help="Carry the base's custom code (.py) along.")
@click.option("--allow-nonfinite", is_flag=True, help="Write inf and nan that the base holds or the sum gives.")
@click.option("--manifest", is_flag=True, help="Write merge_manifest.json: size and sha256 of every file.")
@click.option("--resume", is_flag=True, help="Keep finished shards of an interrupted run; implies --manifest.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; one a core without it.")
@shown
def command(
    adapter: str,
    base: str,
    out: str,
    more: tuple[str, ...],
    weights: tuple[float, ...],
    scale: float,
    dtype: str | None,
    max_shard_size: int | None,
    threads: int | None,
    *,
    copy_code: bool,
    overwrite: bool,
    dry_run: bool,
    allow_nonfinite: bool,
    manifest: bool,
    resume: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Merge a LoRA or PRoLoRA ADAPTER into its base model, shard by shard, into a folder transformers loads.

    Each merged number is scaling * (B A) + W in float32, rounded once. Memory does not grow with the model.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.merge import merge  # noqa: PLC0415

    with sources.inputs(headers_only=dry_run, quiet=quiet) as inputs:
        adapter = inputs.folder(adapter)
        base = inputs.folder(base)
        begin = time.perf_counter()
        with output.progress(quiet=quiet) as progress:
            report = merge(
                adapter,
                out,
                base=base,
                more=[inputs.folder(other) for other in more],
                weights=weights,
                scale=scale,
                dtype=dtype,
                max_shard_size=max_shard_size,
                copy_code=copy_code,
                overwrite=overwrite,
                dry_run=dry_run,
                allow_nonfinite=allow_nonfinite,
                manifest=manifest,
                resume=resume,
                threads=threads,
                finish=inputs.finish,
                progress=progress,
            )
        report = inputs.named(report)
    if not dry_run:
        seconds = time.perf_counter() - begin
        output.told(
            f"{tables.size(report.bytes)} in {seconds:.1f} s ({tables.size(round(report.bytes / seconds))}/s): "
            f"{report.merged_tensors:,} tensors merged, {report.copied_tensors + report.converted_tensors:,} copied",
            quiet=quiet,
        )
    return output.emit(report, tables.merged, as_json=as_json, quiet=quiet)
