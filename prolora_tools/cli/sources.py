"""Inputs of commands: folders, or names on the Hub, which a report then shows as `owner/name@commit`."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeVar

from prolora_tools.errors import ProloraError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prolora_tools.hub.remote import Source
    from prolora_tools.reports import Report

    R = TypeVar("R", bound=Report)


class Inputs:
    """The inputs of one command, as folders on this machine."""

    def __init__(self, *, headers_only: bool, configs_only: bool, bars: bool, stack: ExitStack) -> None:
        self._headers_only, self._configs_only, self._bars, self._stack = headers_only, configs_only, bars, stack
        self.sources: dict[str, Source] = {}

    def folder(self, given: str) -> str:
        """The folder that `given` is or names: a path is given back as it is, what is on the Hub is fetched."""
        from prolora_tools.hub.names import SCHEME, on_hub  # noqa: PLC0415 - keeps --help light

        if on_hub(given) is None:
            return given
        from prolora_tools.hub import remote  # noqa: PLC0415 - the client is not needed for local folders

        if given not in self.sources:
            try:
                self.sources[given] = (
                    self._stack.enter_context(remote.headers(given, configs_only=self._configs_only))
                    if self._headers_only or self._configs_only
                    else remote.resolve(given, progress_bars=self._bars)
                )
            except ProloraError as error:
                if not given.startswith(SCHEME):
                    error.hint += f" (a folder {given} does not exist here)"
                raise
        return str(self.sources[given].folder)

    def shown(self, text: str) -> str:
        """A text with the names of repositories instead of the folders they were read from."""
        for source in self.sources.values():
            text = text.replace(str(source.folder), source.label)
        return text

    def finish(self, stage: Path, report: Report) -> None:
        """The last file of an output: its card, which names inputs as the user did."""
        write_card(stage, self.named(report))

    def named(self, report: R) -> R:
        """A report that names its inputs as the user did, with the commit that was read."""
        changed: dict[str, object] = {}
        for field in dataclasses.fields(report):  # type: ignore[arg-type] # every Report is a dataclass
            value = getattr(report, field.name)
            if isinstance(value, str):
                changed[field.name] = self.shown(value)
            elif field.name == "notes":
                changed[field.name] = tuple(self.shown(note) for note in value)
        return dataclasses.replace(report, **changed) if self.sources else report  # type: ignore[type-var] # the same


@contextmanager
def inputs(*, headers_only: bool = False, configs_only: bool = False, quiet: bool) -> Iterator[Inputs]:
    """Inputs that last as long as the block; errors in it name repositories instead of temporary folders.

    Args:
        headers_only: values are not going to be read.
        configs_only: nothing but configs is going to be read.
        quiet: do not let the client show its downloads.
    """
    bars = not quiet and sys.stderr.isatty()
    with ExitStack() as stack:
        given = Inputs(headers_only=headers_only, configs_only=configs_only, bars=bars, stack=stack)
        try:
            yield given
        except ProloraError as error:
            error.message = given.shown(error.message)
            error.args = (error.message,)
            error.hint = given.shown(error.hint)
            raise


def write_card(folder: Path, report: Report) -> None:
    """Put a model card, rendered from the report, into a folder that has none."""
    from prolora_tools.files.tensors import read_json  # noqa: PLC0415 - keeps --help light
    from prolora_tools.files.writer import write_file  # noqa: PLC0415
    from prolora_tools.hub import card  # noqa: PLC0415

    adapter = (folder / "adapter_config.json").is_file()
    config = read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    if not (folder / "README.md").exists():
        write_file(folder / "README.md", card.render(report.to_json(), config).encode())
