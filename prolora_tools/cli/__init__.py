"""The command line: click and rich live only here. One file a command, one output layer, one error boundary."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

import click

from prolora_tools import __version__
from prolora_tools.errors import ProloraError

if TYPE_CHECKING:
    from types import FrameType

COMMANDS = ("compress", "convert-official", "diff", "expand", "merge", "plan", "pull", "push", "stats", "verify")

EXIT_BUG, EXIT_INTERRUPTED = 70, 130


class _Commands(click.Group):
    """Loads a command's module when it is named, so that `--version` and completion stay fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the signature is click's
        """The names, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - the same
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prolora-tools")
def cli() -> None:
    """Compress trained LoRA adapters into PRoLoRA form, expand and merge them, and tell the error.

    An input may be a folder or the name of a repository on the Hugging Face Hub: owner/name, owner/name@revision, or
    hf://owner/name@revision, which no local folder can hide.

    Results go to stdout, everything else to stderr. Exit codes: 0 done; 1 a failure with its reason; 2 wrong
    usage; 3 done, but outside the tolerance asked for; 70 a bug of ours; 130 interrupted.
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: the one place where errors become messages and exit codes."""
    sys.exit(run(args))


def run(args: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code.
    """
    signal.signal(signal.SIGTERM, _interrupt)  # so that a kill cleans up as Ctrl-C does
    try:
        result = cli.main(args=args, prog_name="prolora-tools", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("PROLORA_TOOLS_DEBUG") == "1" and not isinstance(error, click.ClickException):
            raise
        return _explain(error)
    return result if isinstance(result, int) else 0


def _explain(error: BaseException) -> int:
    """Print an error as one message with a hint.

    Returns:
        Its exit code.
    """
    from prolora_tools.cli.output import print_error  # noqa: PLC0415 - rich is not needed where all is well

    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, ProloraError):
        print_error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.Abort):
        print_error("interrupted; no output was left behind", "run the same command again")
        return EXIT_INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of stdout has gone: say no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    hint = "run it again with PROLORA_TOOLS_DEBUG=1 and report the traceback"
    print_error(f"a bug of prolora-tools: {type(error).__name__}: {error}", hint)
    return EXIT_BUG


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001 - the signature of a handler
    raise KeyboardInterrupt
