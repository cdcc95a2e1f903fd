"""What a repository holds at one commit: resolved once, listed whole, and checked before anything is downloaded."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers  # public as huggingface_hub.utils.*, which mypy cannot see
from huggingface_hub.utils._http import hf_raise_for_status, http_stream_backoff  # the same

from prolora_tools.errors import InputError
from prolora_tools.hub import client
from prolora_tools.hub.names import ADAPTER_PICKLE, SHA1, SHA256, RepoName, check_paths, is_ours, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from prolora_tools.progress import Progress

MAX_ENTRIES = 20_000
"""Files and folders accepted in a listing."""
MAX_WEIGHTS = 64 << 30
"""Bytes accepted of one safetensors or pickle file; the Hub itself stores files up to 50 GB well."""
MAX_TEXT = 256 << 20
"""Bytes accepted of any other file; the largest tokenizers have some 30 MB."""

_TRIES = 5
_PIECE = 1 << 20


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        path: its name there.
        size: its bytes.
        oid: git's sha1 of the blob; for an LFS file that of its pointer.
        sha256: of its content when it is in LFS, else None.
    """

    path: str
    size: int
    oid: str
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """A repository at one commit.

    Attributes:
        name: the repository; its revision is the one that was asked for.
        commit: 40 hexadecimal digits.
        files: the files of an adapter or model, sorted by path.
        skipped: every other file, with the reason it is left.
    """

    name: RepoName
    commit: str
    files: tuple[RemoteFile, ...]
    skipped: tuple[str, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(f.size for f in self.files)


def list_repo(name: RepoName, *, allow_pickle: bool = False, need_weights: bool = True) -> Listing:
    """Resolve a revision to a commit and list what is there.

    Args:
        name: the repository.
        allow_pickle: take adapter_model.bin too when there is no adapter_model.safetensors.
        need_weights: refuse a repository without any.

    Raises:
        InputError: missing, not allowed, an unsafe or too large listing, or no weights in it.
    """
    hub = client.api()
    with client.talking(name):
        commit = hub.model_info(name.id, revision=name.revision).sha or ""
        if not SHA1.fullmatch(commit):
            raise InputError(
                "hub-commit-invalid", f"{name} resolves to {commit!r}, which is no commit", hint="check HF_ENDPOINT"
            )
        entries = []
        for entry in hub.list_repo_tree(name.id, revision=commit, recursive=True):
            entries.append(entry)
            if len(entries) > MAX_ENTRIES:
                raise InputError(
                    "hub-listing-long",
                    f"{name} lists more than {MAX_ENTRIES:,} files",
                    hint="this is no adapter or model repository",
                )
    files = [e for e in entries if isinstance(e, RepoFile)]
    check_paths((f.path for f in files), str(name))
    return _chosen(name, commit, files, allow_pickle=allow_pickle, need_weights=need_weights)


def _chosen(name: RepoName, commit: str, files: list[RepoFile], *, allow_pickle: bool, need_weights: bool) -> Listing:
    paths = {f.path for f in files}
    pickled = ADAPTER_PICKLE in paths and "adapter_model.safetensors" not in paths
    ours = [f for f in files if is_ours(f.path) or (pickled and allow_pickle and f.path == ADAPTER_PICKLE)]
    weights = any(f.path.endswith((".safetensors", ".bin")) for f in ours)
    if need_weights and not weights:
        pickles = sorted(p for p in paths if why_not(p) == "pickle")
        if pickles:
            raise InputError(
                "hub-pickle",
                f"{name} has its weights as {pickles[0]}, a pickle, which can hold code",
                hint=f"prolora-tools pull {name} -o OUT --allow-pickle reads it without running code"
                if pickled
                else "ask its owner for safetensors",
            )
        raise InputError(
            "hub-no-weights",
            f"{name} holds no adapter_model.safetensors and no model*.safetensors",
            hint="check the name and the revision",
        )
    taken = {f.path for f in ours}
    skipped = tuple(f"{p} ({why_not(p)})" for p in sorted(paths - taken) if p != ".gitattributes")
    return Listing(name, commit, tuple(sorted((_checked(name, f) for f in ours), key=lambda f: f.path)), skipped)


def _checked(name: RepoName, file: RepoFile) -> RemoteFile:
    sha256 = file.lfs.sha256 if file.lfs else None
    limit = MAX_WEIGHTS if file.path.endswith((".safetensors", ".bin")) else MAX_TEXT
    named = SHA1.fullmatch(str(file.blob_id)) and (sha256 is None or SHA256.fullmatch(str(sha256)))
    if not named or (file.lfs and file.lfs.size != file.size):
        raise InputError(
            "hub-entry-invalid",
            f"{name} lists {file.path} with hashes or sizes that no Hub gives",
            hint="check HF_ENDPOINT; nothing was downloaded",
        )
    if not 0 <= file.size <= limit:
        raise InputError(
            "hub-file-large",
            f"{name}: {file.path} has {file.size:,} bytes, at most {limit:,} are accepted",
            hint="do not trust this repository; nothing was downloaded",
        )
    return RemoteFile(file.path, file.size, file.blob_id, sha256)


class Digest:
    """The hashes a Hub knows a file by, and its sha256, from one reading."""

    def __init__(self, size: int) -> None:
        self.size = 0
        self._blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        self._sha256 = hashlib.sha256()

    def update(self, piece: bytes) -> None:
        """Add bytes."""
        self.size += len(piece)
        self._blob.update(piece)
        self._sha256.update(piece)

    @property
    def sha256(self) -> str:
        """Sha256 so far."""
        return self._sha256.hexdigest()

    def is_of(self, file: RemoteFile) -> bool:
        """Whether these are the bytes of `file`."""
        if file.size != self.size:
            return False
        return self.sha256 == file.sha256 if file.sha256 else self._blob.hexdigest() == file.oid


def read_digest(path: Path, progress: Progress) -> Digest:
    """Hash a local file."""
    digest = Digest(path.stat().st_size)
    with path.open("rb") as f:
        while piece := f.read(_PIECE):
            digest.update(piece)
            progress.advance(len(piece))
    return digest


class Download:
    """Downloads files of one listing, each checked against it while it comes in; safe to use from threads."""

    def __init__(self, listing: Listing, progress: Progress) -> None:
        self.listing, self.progress = listing, progress
        self.stopped = threading.Event()

    def fetch(self, file: RemoteFile, path: Path) -> str:
        """Download one file to a new `path`, resuming where a connection broke.

        Returns:
            Its sha256.

        Raises:
            InputError: it cannot be had, or other bytes came than were listed.
        """
        digest = Digest(file.size)
        with client.talking(self.listing.name), path.open("xb") as out:
            for attempt in range(1, _TRIES + 1):
                try:
                    self._receive(file, out, digest)
                    break
                except client.TransportError as error:
                    if attempt == _TRIES or hasattr(error, "response"):  # a response: the Hub has said no
                        raise
                    time.sleep(min(2 ** (attempt - 1), 8))
        if not digest.is_of(file):
            raise InputError(
                "hub-corrupt",
                f"{self.listing.name}: {file.path} came with other bytes than the Hub lists for it "
                f"({digest.size:,} bytes, sha256 {digest.sha256})",
                hint="run the command again; if it stays so, the file on the Hub is damaged",
            )
        return digest.sha256

    def _receive(self, file: RemoteFile, out: BinaryIO, digest: Digest) -> None:
        """Go on after what `digest` has; a server that ignores the range is read past it."""
        have = digest.size
        if have == file.size and have:
            return
        with _open(self.listing, file.path, f"bytes={have}-" if have else None) as response:
            skip = have if response.status_code != 206 else 0
            for piece in response.iter_raw():  # as it comes: what came before a cut counts
                if self.stopped.is_set():
                    return
                fresh = piece[skip:] if skip else piece
                skip -= len(piece) - len(fresh)
                if digest.size + len(fresh) > file.size:
                    raise InputError(
                        "hub-too-long",
                        f"{self.listing.name}: {file.path} is longer than the {file.size:,} bytes the Hub lists for it",
                        hint="run the command again; if it stays so, do not trust this repository",
                    )
                digest.update(fresh)
                out.write(fresh)
                self.progress.advance(len(fresh))


def read_range(listing: Listing, path: str, start: int, end: int) -> bytes:
    """Bytes start..end-1 of a remote file, fewer where it ends; more are never read, whatever the server sends."""
    parts: list[bytes] = []
    have = 0
    with client.talking(listing.name), _open(listing, path, f"bytes={start}-{end - 1}") as response:
        skip = start if response.status_code != 206 else 0
        for piece in response.iter_raw(1 << 14):
            fresh = piece[skip:] if skip else piece
            skip -= len(piece) - len(fresh)
            parts.append(fresh)
            have += len(fresh)
            if have >= end - start:
                break
    return b"".join(parts)[: end - start]


@contextmanager
def _open(listing: Listing, path: str, byte_range: str | None) -> Iterator[Any]:
    """A streamed GET of a file at the listing's commit, without content encoding; busy servers are asked again."""
    url = hf_hub_url(listing.name.id, path, revision=listing.commit)
    headers = {**build_hf_headers(library_name="prolora-tools"), "Accept-Encoding": "identity"}
    if byte_range:
        headers["Range"] = byte_range
    # no retry on exceptions: one from inside the body would come back here, and the body is the caller's to resume
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, retry_on_exceptions=(), timeout=timeout) as response:
        hf_raise_for_status(response)
        yield response
