"""What a Hub holds: objects on disk, and repositories of commits over them. No network here."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

LFS_GLOBS = ("*.safetensors", "*.bin", "*.model", "*.gguf", "*.pt", "*.zip", "tokenizer.json")
LFS_SIZE = 10 << 20
_COUNTER = itertools.count(1)


class Refusal(Exception):  # noqa: N818 - it is an answer, not a bug
    """An HTTP error answer."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **headers}
        if code:
            self.headers["X-Error-Code"] = code


def blob_sha1(data: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `sha256` is set when it is in LFS, `oid` is the git blob's name (of the pointer, then)."""

    size: int
    oid: str
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def key(self) -> str:
        """Its name in the object store, and what preupload tells of it."""
        return self.sha256 or self.oid

    def info(self, path: str) -> dict[str, object]:
        """The entry in tree and paths-info."""
        info: dict[str, object] = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            info["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(_pointer(self.sha256, self.size))}
        if self.xet_hash:
            info["xetHash"] = self.xet_hash
        return info


def _pointer(sha256: str, size: int) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (sha256.encode(), size)


def lfs_entry(sha256: str, size: int, xet_hash: str | None = None) -> Entry:
    """An LFS file."""
    return Entry(size, blob_sha1(_pointer(sha256, size)), sha256, xet_hash)


@dataclass(frozen=True)
class Commit:
    """One commit; `files` is its whole tree."""

    oid: str
    parent: str | None
    title: str
    message: str
    user: str
    files: dict[str, Entry]


@dataclass
class Repo:
    """One model repository."""

    id: str
    private: bool = False
    gated: bool = False
    granted: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, dict[str, str]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def owner(self) -> str:
        """Its namespace: only this user may write."""
        return self.id.split("/", maxsplit=1)[0]

    def ref(self, revision: str) -> str:
        """The full name of a branch, tag or pull request."""
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return name
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, revision: str) -> Commit:
        """A branch, tag, pull request, sha, or a unique prefix of at least 7 digits."""
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [c for oid, c in self.commits.items() if oid.startswith(revision)]
            if len(found) == 1:
                return found[0]
        return self.commits[self.refs[self.ref(revision)]]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commits = [self.commit(revision)]
        while parent := commits[-1].parent:
            commits.append(self.commits[parent])
        return commits

    def add_commit(self, ref: str, files: dict[str, Entry], title: str, message: str, user: str) -> Commit:
        """Put a commit on top of `ref`."""
        with self.lock:
            parent = self.refs.get(ref)
            listing = {p: e.oid for p, e in files.items()}
            oid = hashlib.sha1(json.dumps([next(_COUNTER), parent, title, listing]).encode()).hexdigest()
            commit = self.commits[oid] = Commit(oid, parent, title, message, user, files)
            self.refs[ref] = oid
            return commit

    def open_pull(self, title: str, user: str, at: str) -> int:
        """A new pull request whose branch starts at a commit."""
        with self.lock:
            number = len(self.pulls) + 1
            self.pulls[number] = {"title": title, "user": user, "status": "draft"}
            self.refs[f"refs/pr/{number}"] = at
            return number


class Objects:
    """Files by their hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        """Where an object lies, or would."""
        return self.folder / key

    def has(self, key: str) -> bool:
        """Whether it is stored."""
        return self.path(key).is_file()

    def put(self, data: bytes, key: str) -> None:
        """Store bytes under their hash."""
        self.path(key).write_bytes(data)

    def receive(self, pieces: Iterable[bytes], sha256: str) -> None:
        """Store a body if it has the hash its sender promised."""
        digest = hashlib.sha256()
        temporary = self.folder / f".{sha256}-{next(_COUNTER)}"
        with temporary.open("wb") as out:
            for piece in pieces:
                digest.update(piece)
                out.write(piece)
        if digest.hexdigest() != sha256:
            temporary.unlink()
            raise Refusal(400, f"the body's sha256 is {digest.hexdigest()}, the oid says {sha256}")
        temporary.rename(self.path(sha256))

    def add(self, path: str, data: bytes) -> Entry:
        """Store a file as the Hub would: LFS or git blob by name, size and content."""
        if is_lfs(path, data[:512], len(data)):
            entry = lfs_entry(hashlib.sha256(data).hexdigest(), len(data))
        else:
            entry = Entry(len(data), blob_sha1(data))
        self.put(data, entry.key)
        return entry

    def add_sparse(self, head: bytes, size: int) -> Entry:
        """A huge LFS file that holds `head` and then nothing, under a made-up hash."""
        key = hashlib.sha256(head + b"%d" % size).hexdigest()
        with self.path(key).open("wb") as f:
            f.write(head)
            f.truncate(size)
        return lfs_entry(key, size)


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """The Hub's rule for what goes to LFS."""
    try:
        text = b"\0" not in sample
        sample[:-4].decode() if len(sample) == 512 else sample.decode()  # a cut character at the end is no binary
    except UnicodeDecodeError:
        text = False
    return size > 0 and (any(fnmatch(Path(path).name, g) for g in LFS_GLOBS) or size >= LFS_SIZE or not text)


def apply_operations(files: dict[str, Entry], operations: list[tuple[str, dict[str, str]]], objects: Objects) -> None:
    """Change a tree by the lines of a commit; contents are given or stored already."""
    for kind, value in operations:
        path = value["path"]
        if path.startswith("/") or {"..", ".git"} & set(path.split("/")):
            raise Refusal(400, f"Invalid path: {path}")
        if kind == "file":
            data = base64.b64decode(value["content"])
            files[path] = Entry(len(data), blob_sha1(data))
            objects.put(data, files[path].oid)
        elif kind == "lfsFile":
            if not objects.has(value["oid"]):
                why = "an LFS pointer pointed to a file that does not exist"
                raise Refusal(400, f"Your push was rejected because {why}. Offending file: - {path}")
            files[path] = lfs_entry(value["oid"], objects.path(value["oid"]).stat().st_size)
        else:
            gone = [p for p in files if p == path or (kind == "deletedFolder" and p.startswith(path.rstrip("/") + "/"))]
            if not gone:
                raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]


def with_xet(entry: Entry, xet_hash: str) -> Entry:
    """The same file, offered over Xet too."""
    return replace(entry, xet_hash=xet_hash)
