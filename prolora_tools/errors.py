"""Every failure this package foresees, with what to do about it and the exit code it ends a command with.

An error says what happened, where, what was expected and what was found; its hint says what to run or change.
`code` is a stable slug: programs match on it, and tests hold one failing input for each.
"""

from __future__ import annotations


class ProloraError(Exception):
    """Base of all foreseen failures.

    Args:
        code: stable slug of this failure, unique in the package, such as `adapter-missing-pair`.
        message: what happened, where, expected and found.
        hint: what to run or change.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by state: the hint is keyword-only, which the default protocol cannot replay."""
        return (self.__class__.__new__, (self.__class__,), {**self.__dict__, "args": self.args})

    def __setstate__(self, state: dict[str, object] | None) -> None:
        """Restore message, code and hint."""
        self.__dict__.update(state or {})
        self.args = (self.message,)


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line, or its class where it says nothing."""
    line, *more = [part.strip() for part in str(error).splitlines() if part.strip()] or [type(error).__name__]
    return f"{line} {more[0]}" if line.endswith(":") and more else line


class RequestError(ProloraError):
    """The request makes no sense whatever the files hold: wrong usage."""

    exit_code = 2


class InputError(ProloraError):
    """A file or folder is missing, unreadable, or not what its name says."""


class UnsupportedError(ProloraError):
    """The input is sound, and of a kind this package refuses by name rather than gets wrong."""


class MismatchError(ProloraError):
    """Two sound inputs do not belong together, such as an adapter and a base."""


class OutputError(ProloraError):
    """The output could not be written; nothing of it is left behind."""
