"""Hub names where a folder may stand: as a snapshot in the client's cache, or as headers only.

Headers only means a temporary folder with the small files whole, and for each safetensors file its header followed by
a hole of the right size. Every reader of headers works on it unchanged; tensor values read from it would be zeros,
so it is for `stats`, `plan` and dry runs.
"""

from __future__ import annotations

import glob
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from prolora_tools.errors import InputError
from prolora_tools.files.checkpoint import INDEX, SINGLE
from prolora_tools.files.tensors import read_json
from prolora_tools.hub import client
from prolora_tools.hub.listing import Download, Listing, RemoteFile, list_repo, read_digest, read_range
from prolora_tools.hub.names import FILES, SHA1, RepoName, on_hub
from prolora_tools.hub.pull import MAX_HEADER, check_contents
from prolora_tools.progress import SILENT

if TYPE_CHECKING:
    from collections.abc import Iterator

_FIRST = 32 << 10
"""Bytes of the first request for a header; one shard of a 7B model has some 10,000."""
_CONFIGS = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class Source:
    """An input as a folder on this machine.

    Attributes:
        folder: the folder.
        given: what the user gave.
        commit: the commit it was read at, None for a local folder.
    """

    folder: Path
    given: str
    commit: str | None = None

    @property
    def label(self) -> str:
        """The name for reports: `owner/name@commit`, or the path."""
        return f"{RepoName.parse(self.given).id}@{self.commit}" if self.commit else self.given


def resolve(given: str | Path, *, progress_bars: bool = False) -> Source:
    """An adapter or model as a folder, downloaded into the client's cache if it is on the Hub.

    What is new in the cache is compared with the Hub's hashes once. With HF_HUB_OFFLINE the cache is used as it is.

    Args:
        given: a folder, `owner/name[@revision]` or `hf://owner/name[@revision]`.
        progress_bars: let the client show its downloads.

    Raises:
        RequestError: `hf://` is followed by no repository's name.
        InputError: the repository cannot be had or is not safe.
    """
    name = on_hub(given)
    if name is None:
        return Source(Path(given), str(given))
    hub = client.api(progress_bars=progress_bars)
    if client.offline():
        return _cached(name, str(given))
    listing = list_repo(name)
    cached = {f.path for f in listing.files if _in_cache(listing, f)}
    with client.talking(name):
        _remember_revision(hub, listing)
        patterns = [glob.escape(f.path) for f in listing.files]
        folder = Path(hub.snapshot_download(name.id, revision=listing.commit, allow_patterns=patterns))
    for file in listing.files:
        if file.path not in cached:
            _check(listing, file, folder / file.path)
    check_contents(listing, folder)
    return Source(folder, str(given), listing.commit)


def _in_cache(listing: Listing, file: RemoteFile) -> bool:
    found = huggingface_hub.try_to_load_from_cache(listing.name.id, file.path, revision=listing.commit)
    return isinstance(found, str)


def _remember_revision(hub: huggingface_hub.HfApi, listing: Listing) -> None:
    """Have the client note what the branch or tag points to, which it does not when it is asked for a commit."""
    smallest = min(listing.files, key=lambda f: f.size)
    path = Path(hub.hf_hub_download(listing.name.id, smallest.path, revision=listing.name.revision))
    if listing.commit not in path.parts:
        raise InputError(
            "hub-moved",
            f"{listing.name} moved on from commit {listing.commit} while it was read",
            hint="run the command again",
        )


def _check(listing: Listing, file: RemoteFile, path: Path) -> None:
    """Compare a fresh file in the cache with the Hub's hash; a wrong one is taken out of the cache."""
    if read_digest(path, SILENT).is_of(file):
        return
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    raise InputError(
        "hub-cache-corrupt",
        f"{listing.name}: {file.path} came with other bytes than the Hub lists for it",
        hint="run the command again; if it stays so, the file on the Hub is damaged",
    )


def _cached(name: RepoName, given: str) -> Source:
    with client.talking(name):
        folder = Path(
            huggingface_hub.snapshot_download(
                name.id, revision=name.revision, allow_patterns=list(FILES), local_files_only=True
            )
        )
    return Source(folder, given, folder.name if SHA1.fullmatch(folder.name) else None)


@contextmanager
def headers(given: str | Path, *, configs_only: bool = False) -> Iterator[Source]:
    """An adapter or model for reading its headers only: at most two ranges of each safetensors file are downloaded.

    Args:
        given: a folder, or a name on the Hub.
        configs_only: leave the weights out altogether; a repository without any will do.

    Raises:
        RequestError: `hf://` is followed by no repository's name.
        InputError: the repository cannot be had or is not safe.
    """
    name = on_hub(given)
    if name is None or client.offline():
        yield Source(Path(given), str(given)) if name is None else _cached(name, str(given))
        return
    listing = list_repo(name, need_weights=not configs_only)
    files = {f.path: f for f in listing.files}
    with tempfile.TemporaryDirectory(prefix="prolora-tools-") as folder:
        download = Download(listing, SILENT)
        for small in (*_CONFIGS, INDEX):
            if small in files:
                download.fetch(files[small], Path(folder, small))
        for weights in () if configs_only else _weights(files, Path(folder)):
            _write_header(listing, files[weights], Path(folder, weights))
        for other in files.values():
            _write_hole(other, Path(folder, other.path))
        yield Source(Path(folder), str(given), listing.commit)


def _write_hole(file: RemoteFile, path: Path) -> None:
    """A stand-in of the right size for a file that is carried along or left alone, never read."""
    path.parent.mkdir(exist_ok=True)
    if not path.exists() and path.suffix != ".safetensors":
        with path.open("xb") as f:
            f.truncate(file.size)


def _weights(files: dict[str, RemoteFile], folder: Path) -> list[str]:
    """The safetensors files that the adapter or model consists of."""
    if "adapter_config.json" in files:
        names = {"adapter_model.safetensors"}
    elif INDEX in files:
        weight_map = read_json(folder / INDEX).get("weight_map")
        names = {v for v in weight_map.values() if isinstance(v, str)} if isinstance(weight_map, dict) else set()
    else:
        names = {SINGLE}
    return sorted(names & set(files))


def _write_header(listing: Listing, file: RemoteFile, path: Path) -> None:
    """Write a file's header, and a hole for its data."""
    head = read_range(listing, file.path, 0, min(_FIRST, file.size))
    length = 8 + int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        raise InputError(
            "hub-header-bomb",
            f"{listing.name}: the header of {file.path} says it has {length - 8:,} bytes, at most {MAX_HEADER:,} are "
            "accepted",
            hint="do not trust this repository",
        )
    if length > len(head):
        head += read_range(listing, file.path, len(head), min(length, file.size))
    with path.open("xb") as f:
        f.write(head[:length])
        f.truncate(file.size)
