"""`prolora-tools compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from prolora_tools.cli import options
from prolora_tools.cli.options import DTYPES, shown, written

if TYPE_CHECKING:
    from prolora_tools.core.fitting import Lengthen, Method
    from prolora_tools.operations.calibrate import Statistics
    from prolora_tools.operations.compress import Strides


@click.command("compress")
@click.argument("adapter")
@written
@click.option("--unshared", type=int, metavar="U", help="Ranks kept whole.")
@click.option("--chunks", type=options.chunks, metavar="M[,N]", help="Chunks of A, and of B where it differs.")
@click.option("--budget", type=options.count, metavar="N", help="Choose the shapes: at most N parameters, such as 5M.")
@click.option("--ratio", type=float, metavar="X", help="Choose the shapes: the adapter's parameters over X.")
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
@click.option("--calibrate", "text", metavar="TEXT", help="Fit to what the layers see on this text (.txt or .jsonl).")
@click.option("--base", metavar="BASE", help="The base model, a folder or a Hub name, for --calibrate.")
@click.option("--calibrate-outputs", "outputs", is_flag=True, help="Weigh outputs by their gradients too; slower.")
@click.option("--calibrate-tokens", "tokens", type=int, default=49152, show_default=True, metavar="N")
@click.option("--calibrate-length", "length", type=int, default=256, show_default=True, metavar="N")
@click.option("--calibrate-batch", "batch", type=int, default=8, show_default=True, metavar="N")
@click.option("--device", default="cpu", show_default=True, help="Where --calibrate runs, such as cuda.")
@click.option(
    "--statistics", metavar="FILE", help="Save what --calibrate collects; without --calibrate, use what was saved."
)
@click.option(
    "--lengthen",
    type=click.Choice(["whole", "directions"]),
    default="whole",
    show_default=True,
    help="What of a calibrated fit gets back the length that least squares takes: dW as a whole, or every singular "
    "direction of it. directions may keep more of the gain or less: evaluate both.",
)
@click.option(
    "--max-error",
    type=click.FloatRange(min=0),
    metavar="E",
    help="Exit with 3 if the error is above E. With no shape and no budget, choose the smallest shapes within E.",
)
@click.option("--dtype", type=DTYPES, help="Store factors in this dtype, instead of each module's own.")
@shown
def command(
    adapter: str,
    out: str,
    unshared: int | None,
    chunks: tuple[int, int] | None,
    budget: int | None,
    ratio: float | None,
    method: Method | None,
    strides: Strides | None,
    text: str | None,
    base: str | None,
    tokens: int,
    length: int,
    batch: int,
    device: str,
    statistics: str | None,
    lengthen: Lengthen,
    max_error: float | None,
    dtype: str | None,
    *,
    outputs: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Compress a trained LoRA ADAPTER into a PRoLoRA adapter, and tell the error.

    The shape is said by --unshared and --chunks, or chosen module by module by --budget, --ratio or --max-error. With
    none of these the adapter has to be an expanded PRoLoRA, and is taken back to it without loss.

    The error is |dW - dW'| / |dW| in the Frobenius norm, beside that of the truncated SVD of the same size.
    """
    if text is not None and base is None:
        raise click.UsageError("--calibrate needs --base: the text runs through the model")
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.compress import compress  # noqa: PLC0415

    with sources.inputs(headers_only=dry_run, quiet=quiet) as inputs:
        adapter = inputs.folder(adapter)

        def collected() -> Statistics:
            from prolora_tools.operations.calibrate import calibrate  # noqa: PLC0415 - torch, for these only

            assert text is not None
            assert base is not None
            with output.progress(quiet=quiet) as progress:
                found = calibrate(
                    adapter,
                    base=inputs.folder(base),
                    text=text,
                    outputs=outputs,
                    tokens=tokens,
                    batch=batch,
                    length=length,
                    device=device,
                    progress=progress,
                )
            if statistics is not None:
                found.save(Path(statistics))
            return found

        with output.progress(quiet=quiet) as progress:
            report = compress(
                adapter,
                out,
                unshared=unshared,
                chunks=chunks,
                budget=budget,
                ratio=ratio,
                method=method,
                strides=strides,
                statistics=None if dry_run else statistics if text is None else collected,
                lengthen=lengthen,
                max_error=max_error,
                dtype=dtype,
                overwrite=overwrite,
                dry_run=dry_run,
                finish=inputs.finish,
                progress=progress,
            )
        report = inputs.named(report)
    return output.emit(report, tables.compression, as_json=as_json, quiet=quiet)
