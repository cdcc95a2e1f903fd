"""`prolora-tools plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from prolora_tools.cli import options
from prolora_tools.cli.options import DTYPES, count, grouped, shown

if TYPE_CHECKING:
    from prolora_tools.cli.tables import View


@click.command("plan")
@click.argument("base")
@click.option("--targets", default="all-linear", show_default=True, metavar="NAMES", help="Module names, by commas.")
@click.option("--rank", type=int, metavar="R", help="Count one geometry of this rank.")
@click.option("--unshared", type=int, default=0, show_default=True, metavar="U", help="Its ranks kept whole.")
@click.option(
    "--chunks", type=options.chunks, default="1", metavar="M[,N]", show_default=True, help="Its chunks of A, and of B."
)
@click.option("--budget", type=count, metavar="COUNT", help="List geometries of at most so many parameters, as in 5M.")
@click.option("--like-lora-rank", type=int, metavar="Q", help="List geometries that cost as much as LoRA of rank Q.")
@click.option("--dtype", type=DTYPES, default="float32", show_default=True, help="Count bytes in this dtype.")
@click.option("--limit", type=int, default=20, show_default=True, help="Most geometries to list.")
@grouped
@shown
def command(
    base: str,
    targets: str,
    rank: int | None,
    unshared: int,
    chunks: tuple[int, int],
    budget: int | None,
    like_lora_rank: int | None,
    dtype: str,
    limit: int,
    view: View,
    *,
    as_json: bool,
    quiet: bool,
) -> int:
    """Count what a geometry costs on BASE, or list the geometries that meet a budget.

    BASE may be a folder with nothing but a config.json. Give one of --rank, --budget and --like-lora-rank.
    """
    from prolora_tools.cli import output, sources, tables  # noqa: PLC0415 - keeps --help light
    from prolora_tools.operations.plan import ALL_LINEAR, plan  # noqa: PLC0415
    from prolora_tools.reports import BudgetReport  # noqa: PLC0415

    names: str | list[str] = targets if targets == ALL_LINEAR else [t.strip() for t in targets.split(",") if t.strip()]
    with sources.inputs(configs_only=True, quiet=quiet) as inputs:
        report = plan(
            inputs.folder(base),
            targets=names,
            rank=rank,
            unshared=unshared,
            chunks=chunks,
            budget=budget,
            like_lora_rank=like_lora_rank,
            dtype=dtype,
            limit=limit,
        )
        report = inputs.named(report)
    if isinstance(report, BudgetReport):
        return output.emit(report, tables.budget(view), as_json=as_json, quiet=quiet)
    return output.emit(report, tables.candidates, as_json=as_json, quiet=quiet)
