"""Xet storage without a storage server: hf-xet (pinned) writes a `local://` folder itself; we read files out of it.

`local://` is a hook of xet-core's own tests, so the LFS mode stays the safety net.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import hf_xet  # type: ignore[import-untyped] # compiled, without stubs

if TYPE_CHECKING:
    from collections.abc import Iterator

_END = b"\xff" * 32
_VERIFICATION, _METADATA = 1 << 31, 1 << 30


def _hex(raw: bytes) -> str:
    return b"".join(raw[i : i + 8][::-1] for i in range(0, 32, 8)).hex()


def _entries(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """(sha256, xet hash, size) of every file a shard describes."""
    at = 48
    while at + 48 <= len(shard) and shard[at : at + 32] != _END:
        xet_hash, flags, n = shard[at : at + 32], *struct.unpack_from("<II", shard, at + 32)
        size = sum(struct.unpack_from("<I", shard, at + 48 * (i + 1) + 36)[0] for i in range(n))
        at += 48 * (1 + n + (n if flags & _VERIFICATION else 0))
        if flags & _METADATA:
            yield _hex(shard[at : at + 32]), _hex(xet_hash), size
            at += 48


class Xet:
    """The storages handed out, one folder per token: a local storage is locked by its writer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.published = folder / "published"
        folder.mkdir(parents=True, exist_ok=True)
        self.written: list[Path] = []

    def new_storage(self) -> Path:
        """For one write token."""
        self.written.append(self._new())
        return self.written[-1]

    def _new(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def take(self, sha256: str, target: Path) -> None:
        """Write an uploaded file to `target`, if some storage has it."""
        for storage in self.written:
            for shard in (storage / "xet" / "xorbs" / "shards").glob("*.mdb"):
                for found, xet_hash, size in _entries(shard.read_bytes()):
                    if found == sha256:
                        self._read(storage, xet_hash, size, target)
                        return

    def clone(self, storage: Path) -> Path:
        """A copy that another process may open."""
        copy = self._new()
        for source in (storage / "xet" / "xorbs").rglob("*"):
            if source.is_file():
                place = copy / "xet" / "xorbs" / source.relative_to(storage / "xet" / "xorbs")
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place) if source.suffix == ".redb" else os.link(source, place)
        return copy

    def _read(self, storage: Path, xet_hash: str, size: int, target: Path) -> None:
        group = hf_xet.XetSession().new_file_download_group(
            endpoint=f"local://{self.clone(storage)}", token="x", token_expiry_unix_secs=int(time.time()) + 3600
        )
        with group:
            group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))

    def publish(self, file: Path, sha256: str) -> str:
        """Offer a file for Xet downloads; gives its Xet hash."""
        commit = hf_xet.XetSession().new_upload_commit(
            endpoint=f"local://{self.published}", token="x", token_expiry_unix_secs=int(time.time()) + 3600
        )
        with commit:
            handle = commit.start_upload_file(str(file), sha256=sha256)
        return str(handle.result().xet_info.hash)
