"""`prolora-tools push`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from prolora_tools.cli.options import shown

if TYPE_CHECKING:
    from rich.console import Console

    from prolora_tools.hub.reports import PushReport


@click.command("push")
@click.argument("folder")
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private; refused for one that is public.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch, made from main if it is missing.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--commit-message", metavar="TITLE", help="Title of the commit or pull request.")
@click.option("--commit-description", metavar="TEXT", help="Its text.")
@click.option("--license", metavar="ID", help="License for the model card, as the Hub spells it, such as apache-2.0.")
@click.option("--dry-run", is_flag=True, help="Compare and report, send nothing.")
@shown
def command(
    folder: str,
    repo: str,
    revision: str | None,
    commit_message: str | None,
    commit_description: str | None,
    license: str | None,  # noqa: A002 - the option's name
    *,
    private: bool,
    create_pr: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Upload a LoRA, PRoLoRA or merged-model FOLDER to the Hub as REPO (owner/name), with a model card.

    One commit holds all of it. Interrupted, run it again. The token is that of `hf auth login` or HF_TOKEN.
    """
    from prolora_tools.cli import output  # noqa: PLC0415 - keeps --help light
    from prolora_tools.hub.push import push  # noqa: PLC0415

    report = push(
        folder,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        commit_description=commit_description,
        license=license,
        dry_run=dry_run,
        progress_bars=not quiet and sys.stderr.isatty(),  # the client's own; ours cannot see into its uploads
    )
    return output.emit(report, _show, as_json=as_json, quiet=quiet)


def _show(report: PushReport, console: Console) -> None:
    """One URL; in a dry run what would be sent."""
    if report.dry_run:
        for file in report.files:
            console.print(f"{file.change:<9}  {file.bytes:>15,}  {file.name}", soft_wrap=True)
        for name in report.skipped:
            console.print(f"left out   {'':>15}  {name}", soft_wrap=True)
        return
    console.print(f"{report.url} (unchanged)" if report.unchanged else report.url, soft_wrap=True)
