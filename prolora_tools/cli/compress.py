"""`prolora-tools compress`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from prolora_tools.cli import options
from prolora_tools.cli.options import DTYPES, shown, written

if TYPE_CHECKING:
    from prolora_tools.core.fitting import Method
    from prolora_tools.operations.compress import Strides


@click.command("compress")
@click.argument("adapter")
@written
@click.option("--unshared", type=int, required=True, metavar="U", help="Ranks kept whole.")
@click.option(
    "--chunks", type=options.chunks, required=True, metavar="M[,N]", help="Chunks of A, and of B where it differs."
)
@click.option(
    "--method",
    type=click.Choice(["average", "align", "fit"]),
    help="average: chunk averaging as stored. align: in the SVD basis. fit: least squares, never worse than both. "
    "Without it, each module takes its best one.",
)
@click.option(
    "--strides",
    type=options.strides,
    metavar="S_A,S_B|official|free",
    help="Rank steps between copies of A and of B. free chooses those that fit best, and is the default but for "
    "average and align.",
)
@click.option("--max-error", type=click.FloatRange(min=0), metavar="E", help="Exit with 3 if the error is above E.")
@click.option("--dtype", type=DTYPES, help="Store factors in this dtype, instead of each module's own.")
@shown
def command(
    adapter: str,
    out: str,
    unshared: int,
    chunks: tuple[int, int],
    method: Method | None,
    strides: Strides | None,
    max_error: float | None,
    dtype: str | None,
    *,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compress a trained LoRA ADAPTER into a PRoLoRA adapter, and tell the error.

    The error is |dW - dW'| / |dW| in the Frobenius norm, beside that of the truncated SVD of the same size.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.compress import compress  # noqa: PLC0415

    with sources.inputs(headers_only=dry_run, quiet=quiet) as inputs:
        adapter = inputs.folder(adapter)
        with output.progress(quiet=quiet) as progress:
            report = compress(
                adapter,
                out,
                unshared=unshared,
                chunks=chunks,
                method=method,
                strides=strides,
                max_error=max_error,
                dtype=dtype,
                overwrite=overwrite,
                dry_run=dry_run,
                progress=progress,
            )
        report = inputs.named(report)
    if not dry_run:
        sources.write_card(out, report)
    return output.emit(report, tables.compression, as_json=as_json, quiet=quiet)
