"""What push and pull return."""

from __future__ import annotations

from dataclasses import dataclass

from prolora_tools.reports import Report


@dataclass(frozen=True)
class HubFile:
    """One file that moved, or would in a dry run.

    Attributes:
        name: its path in the repository.
        bytes: its size.
        sha256: of its content; None before it was downloaded, where the Hub does not know it.
        change: `added`, `changed`, `unchanged` or `removed` by a push; `downloaded` by a pull.
    """

    name: str
    bytes: int
    sha256: str | None
    change: str


@dataclass(frozen=True)
class PushReport(Report):
    """`push`: what the Hub holds now.

    Attributes:
        folder: the folder that was read.
        repo: its repository.
        revision: the branch, or the pull request's reference.
        commit: the commit that holds the folder; None in a dry run that would make one.
        url: where to look: the commit, or the pull request.
        created: whether the repository was missing before.
        private: whether it is private.
        unchanged: whether the Hub held all of it already, so that no commit was made.
        files: every file of the folder, and those that a commit removed because they are weights it replaces.
        skipped: files of the folder that were not sent, with the reason.
    """

    folder: str
    repo: str
    revision: str
    commit: str | None
    url: str
    created: bool
    private: bool
    unchanged: bool
    dry_run: bool
    bytes: int
    files: tuple[HubFile, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PullReport(Report):
    """`pull`: the folder that was written.

    Attributes:
        repo: the repository.
        revision: what was asked for, None for its main branch.
        commit: what it resolved to.
        output: the folder, None in a dry run.
        bytes: of all files.
        skipped: files of the repository that were not downloaded, with the reason.
    """

    repo: str
    revision: str | None
    commit: str
    output: str | None
    bytes: int
    files: tuple[HubFile, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...] = ()
