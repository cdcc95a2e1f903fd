"""How long work tells how far it is, without knowing whether anybody looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives progress of one operation. Units are said once, by `start`."""

    def start(self, description: str, total: int, unit: str) -> None:
        """Work of `total` units begins; unit is `bytes` or `modules`."""

    def advance(self, amount: int) -> None:
        """That many more units are done. May be called from any thread."""

    def milestone(self, message: str) -> None:
        """A part is done that is worth a line. May be called from any thread."""


class Silent:
    """Tells nobody."""

    def start(self, description: str, total: int, unit: str) -> None:
        """Nothing."""

    def advance(self, amount: int) -> None:
        """Nothing."""

    def milestone(self, message: str) -> None:
        """Nothing."""


SILENT = Silent()
