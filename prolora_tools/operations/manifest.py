"""merge_manifest.json: size and sha256 of every file of a merged folder, and the journal that a resumed merge reads."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prolora_tools.errors import InputError
from prolora_tools.files.config import dump
from prolora_tools.files.tensors import read_json, reading
from prolora_tools.files.writer import write_file
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import ManifestReport, TensorProblem

if TYPE_CHECKING:
    from threading import Event

MANIFEST = "merge_manifest.json"
JOURNAL = ".merge-journal"
_PIECE = 1 << 20


def digest(handle: int, stop: Event | None = None) -> str:
    """The sha256 of an open file, as hex."""
    found, at = hashlib.sha256(), 0
    while piece := os.pread(handle, _PIECE, at):
        if stop is not None and stop.is_set():
            break
        found.update(piece)
        at += len(piece)
    return found.hexdigest()


def digest_of(path: Path) -> str:
    """The sha256 of a file, as hex.

    Raises:
        InputError: it cannot be read.
    """
    with reading(path), path.open("rb", buffering=0) as f:
        return digest(f.fileno())


class Journal:
    """Tells which shards of a stage are finished; one synced line each, so that a kill loses at most the last.

    A stage that another request began, and shards whose bytes have changed, are emptied first.

    Args:
        stage: the staged folder.
        request: digest of everything that the shards depend on.

    Attributes:
        finished: file name -> {"bytes", "sha256"} of the shards that may stay.
    """

    def __init__(self, stage: Path, request: str) -> None:
        self.stage, self.finished, self._lock = stage, self._read(stage, request), threading.Lock()
        for path in stage.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in self.finished:
                path.unlink()
        lines = [{"request": request}, *({"name": n, **entry} for n, entry in self.finished.items())]
        write_file(stage / JOURNAL, b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    @staticmethod
    def _read(stage: Path, request: str) -> dict[str, dict[str, Any]]:
        try:
            first, *lines = (stage / JOURNAL).read_bytes().splitlines()
            if json.loads(first) != {"request": request}:
                return {}
        except (OSError, ValueError):
            return {}
        found = {}
        for line in lines:
            try:
                entry = json.loads(line)
                path = stage / str(entry.pop("name"))
            except ValueError:
                break  # the last line of a killed process may be torn
            if path.is_file() and path.stat().st_size == entry["bytes"] and digest_of(path) == entry["sha256"]:
                found[path.name] = entry
        return found

    def add(self, name: str, n_bytes: int, sha256: str) -> None:
        """A shard is finished and synced."""
        with self._lock, (self.stage / JOURNAL).open("ab") as f:
            self.finished[name] = {"bytes": n_bytes, "sha256": sha256}
            f.write(json.dumps({"name": name, **self.finished[name]}).encode() + b"\n")
            f.flush()
            os.fsync(f.fileno())

    def finish(self) -> None:
        """Turn the journal of a complete stage into its manifest."""
        (self.stage / JOURNAL).unlink()
        files = {
            name: self.finished.get(name)
            or {"bytes": (self.stage / name).stat().st_size, "sha256": digest_of(self.stage / name)}
            for name in files_of(self.stage)
        }
        write_file(self.stage / MANIFEST, dump({"schema_version": 1, "files": files}))


def files_of(folder: Path) -> list[str]:
    """The paths of all files in a folder, its manifest and its model card left out: people edit cards."""
    found = (str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    return sorted(name for name in found if name not in {MANIFEST, "README.md"})


def check_manifest(folder: str | Path, *, progress: Progress = SILENT) -> ManifestReport:
    """Check the files of a merged folder against its manifest.

    Args:
        folder: a folder that `merge(manifest=True)` wrote.
        progress: told of bytes read.

    Raises:
        InputError: the manifest is missing or not one.
    """
    root = Path(folder)
    path = root / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise InputError(
            "manifest-invalid",
            f"{path}: files is not an object of file names with bytes and sha256",
            hint="copy the file again, or merge again with --manifest",
        )
    problems = [TensorProblem(name, "is not in the manifest") for name in files_of(root) if name not in files]
    progress.start("verify", sum(entry["bytes"] for entry in files.values()), "bytes")
    for name, entry in files.items():
        if not (root / name).is_file():
            problems.append(TensorProblem(name, "is missing"))
        elif (size := (root / name).stat().st_size) != entry["bytes"]:
            problems.append(TensorProblem(name, f"has {size:,} bytes, expected {entry['bytes']:,}"))
        elif (found := digest_of(root / name)) != entry["sha256"]:
            problems.append(TensorProblem(name, f"has the sha256 {found}, expected {entry['sha256']}"))
        progress.advance(entry["bytes"])
    return ManifestReport(str(folder), len(files), sum(e["bytes"] for e in files.values()), tuple(problems))


def _is_entry(name: str, entry: object) -> bool:
    inside = not Path(name).is_absolute() and ".." not in Path(name).parts
    return (
        inside
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and isinstance(entry.get("sha256"), str)
        and set(entry) == {"bytes", "sha256"}
    )
