"""`prolora-tools pull`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from prolora_tools.cli.options import shown, written

if TYPE_CHECKING:
    from rich.console import Console

    from prolora_tools.hub.reports import PullReport


def _pairs(_context: click.Context, _parameter: click.Parameter, values: tuple[Any, ...]) -> dict[str, str]:
    """FILE=HEX options as a dictionary."""
    if wrong := [v for v in values if not all(v.partition("="))]:
        raise click.BadParameter(f"{wrong[0]!r} is not FILE=HEX")
    return {file: digest for file, _, digest in (v.rpartition("=") for v in values)}


@click.command("pull")
@click.argument("repo")
@written
@click.option("--revision", metavar="REV", help="Branch, tag or commit; REPO@REV says the same.")
@click.option("--expect-revision", metavar="SHA", help="Stop unless the revision resolves to this commit.")
@click.option(
    "--sha256", multiple=True, callback=_pairs, metavar="FILE=HEX", help="Stop unless FILE has this sha256. Repeatable."
)
@click.option("--allow-pickle", is_flag=True, help="Take adapter_model.bin; it is read without running code.")
@shown
def command(
    repo: str,
    out: str,
    revision: str | None,
    expect_revision: str | None,
    sha256: dict[str, str],
    *,
    allow_pickle: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Download the adapter or model REPO (owner/name[@revision]) from the Hub, every byte checked."""
    from prolora_tools.cli import output  # noqa: PLC0415 - keeps --help light
    from prolora_tools.hub.pull import pull  # noqa: PLC0415

    with output.progress(quiet=quiet) as progress:
        report = pull(
            repo,
            out,
            revision=revision,
            overwrite=overwrite,
            dry_run=dry_run,
            allow_pickle=allow_pickle,
            sha256=sha256,
            expect_revision=expect_revision,
            progress=progress,
        )
    return output.emit(report, _show, as_json=as_json, quiet=quiet)


def _show(report: PullReport, console: Console) -> None:
    """The commit and the path; in a dry run the files too."""
    for file in report.files if report.output is None else ():
        console.print(f"{file.bytes:>15,}  {file.name}", soft_wrap=True)
    for name in report.skipped if report.output is None else ():
        console.print(f"{'left out':>15}  {name}", soft_wrap=True)
    console.print(report.commit, report.output or "", soft_wrap=True)
