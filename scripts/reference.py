"""Write the reference pages from the code, or with --check fail where one is not current."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import click

import prolora_tools
from prolora_tools.cli import cli

DOCS = Path(__file__).parents[1] / "docs/reference"


def command_line() -> str:
    """The help of the program and of every command, as a user sees it."""
    parts = [
        "# Command line",
        "",
        "Made by `make docs` from the commands themselves; a check in `make test` holds it to them.",
    ]
    root = click.Context(cli, info_name="prolora-tools", terminal_width=100, max_content_width=100)
    parts += ["", "## prolora-tools", "", "```text", cli.get_help(root), "```"]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, terminal_width=100, max_content_width=100)
        parts += ["", f"## prolora-tools {name}", "", "```text", command.get_help(context), "```"]
    return "\n".join(parts) + "\n"


def python_api() -> str:
    """Signature and docstring of every public name."""
    parts = [
        "# Python API",
        "",
        "Made by `make docs` from the docstrings; a check in `make test` holds it to them. Every operation returns a",
        "frozen report (`prolora_tools.reports`) with `to_json()` and `ok`.",
    ]
    for name in prolora_tools.__all__:
        value = getattr(prolora_tools, name)
        doc = inspect.getdoc(value) or ""
        parts += ["", f"## {name}", "", "```python", signature(name, value), "```", "", "```text", doc, "```"]
    return "\n".join(parts) + "\n"


def signature(name: str, value: Any) -> str:
    """`name(parameters) -> result`, a parameter a line; annotations without the quotes inspect puts around them."""
    lines, keyword_only = [], False
    found = inspect.signature(value)
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            lines.append("*")
            keyword_only = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        if " at 0x" in default:
            default = " = ..."
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    result = "" if inspect.isclass(value) else f" -> {found.return_annotation}"
    return f"{name}(\n    " + ",\n    ".join(lines) + f",\n){result}"


def main() -> None:
    """Write or check."""
    for file, page in (("cli.md", command_line()), ("api.md", python_api())):
        path = DOCS / file
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(page)
        elif not path.is_file() or path.read_text() != page:
            sys.exit(f"{path} is not current: run `make docs`")


if __name__ == "__main__":
    main()
