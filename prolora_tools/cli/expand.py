"""`prolora-tools expand`."""

from __future__ import annotations

import click

from prolora_tools.cli.options import DTYPES, shown, written


@click.command("expand")
@click.argument("adapter")
@written
@click.option("--uniform", is_flag=True, help="Write one rank and one alpha, for engines that read no patterns.")
@click.option("--dtype", type=DTYPES, help="Store factors in this dtype, instead of each module's own.")
@shown
def command(
    adapter: str,
    out: str,
    dtype: str | None,
    *,
    uniform: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Expand a PRoLoRA ADAPTER into a standard LoRA that PEFT, vLLM, SGLang and llama.cpp load.

    Exact: stored numbers are copied to where they belong. Only --dtype and --uniform may round.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.expand import expand  # noqa: PLC0415

    with sources.inputs(headers_only=dry_run, quiet=quiet) as inputs:
        adapter = inputs.folder(adapter)
        with output.progress(quiet=quiet) as progress:
            report = expand(
                adapter,
                out,
                uniform=uniform,
                dtype=dtype,
                overwrite=overwrite,
                dry_run=dry_run,
                finish=inputs.finish,
                progress=progress,
            )
        report = inputs.named(report)
    return output.emit(report, tables.expansion, as_json=as_json, quiet=quiet)
