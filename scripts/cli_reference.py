"""Write docs/reference/cli.md from the click commands, or with --check fail where it is not current."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from prolora_tools.cli import cli

PAGE = Path(__file__).parents[1] / "docs/reference/cli.md"


def reference() -> str:
    """The page: the help of the program and of every command, as a user sees it."""
    parts = [
        "# Command line reference",
        "",
        "Made by `make docs` from the commands themselves; a check in `make test` holds it to them.",
    ]
    context = click.Context(cli, info_name="prolora-tools", terminal_width=100, max_content_width=100)
    parts += ["", "## prolora-tools", "", "```text", cli.get_help(context), "```"]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        child = click.Context(command, info_name=name, parent=context, terminal_width=100, max_content_width=100)
        parts += ["", f"## prolora-tools {name}", "", "```text", command.get_help(child), "```"]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Write or check."""
    page = reference()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != page:
            sys.exit(f"{PAGE} is not current: run `make docs`")
        return
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
