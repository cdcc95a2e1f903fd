"""From the Hub to a folder: everything is checked before it is kept, and nothing half-done is ever visible."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from prolora_tools.errors import InputError, MismatchError, OutputError, ProloraError, RequestError
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import INDEX, Checkpoint
from prolora_tools.files.tensors import read_header, read_json
from prolora_tools.files.writer import check_target, staged, writing
from prolora_tools.hub.listing import Download, Listing, RemoteFile, list_repo
from prolora_tools.hub.names import ADAPTER_PICKLE, SHA256, RepoName
from prolora_tools.hub.reports import HubFile, PullReport
from prolora_tools.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HEADER = 25_000_000
"""Bytes accepted of a safetensors header that comes from the Hub: the largest models have some 15,000 tensors a file,
at some 150 bytes each."""
MAX_TENSORS = 200_000
_THREADS = 4


def pull(
    repo: str,
    out: str | Path,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_pickle: bool = False,
    sha256: Mapping[str, str] | None = None,
    expect_revision: str | None = None,
    progress: Progress = SILENT,
) -> PullReport:
    """Download an adapter or a model.

    Args:
        repo: `owner/name[@revision]` or `hf://owner/name[@revision]`.
        out: the folder to make.
        revision: branch, tag or commit; the main branch if neither this nor `repo` says one.
        overwrite: replace `out` if it is a model folder.
        dry_run: list and check, download nothing.
        allow_pickle: take adapter_model.bin where there is no adapter_model.safetensors; it is read without
            running code.
        sha256: file name -> the sha256 it must have.
        expect_revision: the commit the revision must resolve to, or its first 7 digits or more.
        progress: told of downloaded bytes.

    Raises:
        RequestError: an argument is malformed.
        InputError: the repository cannot be had or is not safe, or a file is not what the Hub lists.
        MismatchError: it is not what `sha256` or `expect_revision` say.
        OutputError: `out` is refused or cannot be written.
    """
    name = RepoName.parse(repo)
    if revision and name.revision:
        raise RequestError("hub-revision-twice", f"{repo} and {revision!r} both name a revision", hint="give one")
    name = RepoName(name.id, revision or name.revision)
    expected = _expected(sha256 or {})
    if expect_revision is not None and not re.fullmatch("[0-9a-f]{7,40}", expect_revision.lower()):
        raise RequestError(
            "expect-revision-invalid",
            f"{expect_revision!r} is no commit: expected 7 to 40 hexadecimal digits",
            hint="give the commit that an earlier pull printed",
        )
    target = Path(out)
    with writing(target):
        check_target(target, [], overwrite=overwrite)
    listing = list_repo(name, allow_pickle=allow_pickle)
    _compare(listing, expected, expect_revision)
    _require_space(listing, target)
    hashes: dict[str, str] = {}
    if not dry_run:
        progress.start("pull", listing.n_bytes, "bytes")
        with staged(target, [], overwrite=overwrite) as stage:
            hashes = _download(listing, stage, progress)
            _compare_hashes(listing, hashes, expected)
            check_contents(listing, stage)
    return PullReport(
        repo=name.id,
        revision=name.revision,
        commit=listing.commit,
        output=None if dry_run else str(out),
        bytes=listing.n_bytes,
        files=tuple(HubFile(f.path, f.size, hashes.get(f.path, f.sha256), "downloaded") for f in listing.files),
        skipped=listing.skipped,
        notes=tuple(f"{n} was not downloaded" for n in listing.skipped if n.endswith("(code)")),
    )


def _expected(sha256: Mapping[str, str]) -> dict[str, str]:
    for file, digest in sha256.items():
        if not SHA256.fullmatch(digest.lower()):
            raise RequestError(
                "sha256-invalid",
                f"the sha256 given for {file} is {digest!r}, expected 64 hexadecimal digits",
                hint="--sha256 adapter_model.safetensors=HEX",
            )
    return {file: digest.lower() for file, digest in sha256.items()}


def _compare(listing: Listing, expected: Mapping[str, str], expect_revision: str | None) -> None:
    """What can be known before the download."""
    if not listing.commit.startswith((expect_revision or "").lower()):
        raise MismatchError(
            "pull-revision",
            f"{listing.name} is at commit {listing.commit}, expected {expect_revision}",
            hint=f"the repository has changed; for the expected commit: {listing.name.id}@{expect_revision}",
        )
    if missing := sorted(set(expected) - {f.path for f in listing.files}):
        raise MismatchError(
            "pull-sha256-file",
            f"{listing.name} has no file {missing[0]!r} to compare the sha256 of",
            hint="see its files with --dry-run",
        )
    _compare_hashes(listing, {f.path: f.sha256 for f in listing.files if f.sha256}, expected)


def _compare_hashes(listing: Listing, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    for file, digest in expected.items():
        if found.get(file, digest) != digest:
            raise MismatchError(
                "pull-sha256",
                f"{listing.name}: {file} has sha256 {found[file]}, expected {digest}",
                hint="this is not the file you expect; nothing was written",
            )


def _require_space(listing: Listing, target: Path) -> None:
    parent = next(p for p in target.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < listing.n_bytes:
        raise OutputError(
            "pull-disk-space",
            f"{listing.name} needs {listing.n_bytes:,} bytes, {parent} has {free:,} free",
            hint="free space there, or choose another disk with -o OUT",
        )


def _download(listing: Listing, stage: Path, progress: Progress) -> dict[str, str]:
    """All files, some at a time. Returns their sha256."""
    download = Download(listing, progress)

    def fetch(file: RemoteFile) -> str:
        path = stage.joinpath(*file.path.split("/"))
        path.parent.mkdir(exist_ok=True)
        return download.fetch(file, path)

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = {f.path: pool.submit(fetch, f) for f in listing.files}
        try:
            return {path: future.result() for path, future in futures.items()}
        except BaseException:
            download.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def check_contents(listing: Listing, folder: Path) -> None:
    """Refuse header bombs, code and incomplete models; nothing of the folder has been read before.

    Raises:
        InputError: a safetensors header is too large or not valid, a config asks for code, or shards are missing.
    """
    try:
        _check_contents(listing, folder)
    except ProloraError as error:  # the folder is a stage or a cache, which tells the user nothing
        error.message = error.message.replace(str(folder), str(listing.name))
        error.args = (error.message,)
        raise


def _check_contents(listing: Listing, folder: Path) -> None:
    for file in listing.files:
        path = folder.joinpath(*file.path.split("/"))
        if path.suffix == ".safetensors":
            _check_header(path)
        elif path.name.endswith("config.json") and read_json(path).get("auto_map"):
            raise InputError(
                "hub-auto-map",
                f"{listing.name}: {file.path} has an auto_map, so the model runs code from its repository",
                hint="this package handles models that transformers knows itself",
            )
    names = {f.path for f in listing.files}
    if INDEX in names:
        Checkpoint.open(folder)
    if ADAPTER_PICKLE in names:
        Adapter.open(folder)


def _check_header(path: Path) -> None:
    """A header may be small and still hold more entries than memory; they are counted before they are parsed."""
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        n = f.read(min(length, MAX_HEADER)).count(b'"dtype"')
    if length > MAX_HEADER or n > MAX_TENSORS:
        raise InputError(
            "hub-header-large",
            f"{path.name}: the header has {length:,} bytes and names {n:,} tensors, "
            f"at most {MAX_HEADER:,} and {MAX_TENSORS:,} are accepted",
            hint="do not trust this repository",
        )
    read_header(path)
