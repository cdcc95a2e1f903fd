"""A staged folder: everything is written, synced and checked beside the target, then renamed into place.

Nothing half-written is ever visible under its final name, and on any exception the stage goes.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prolora_tools.errors import OutputError
from prolora_tools.files.tensors import layout, reading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

TensorSpec = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor to write."""

STAGE = ".prolora-stage"
ASIDE = "-replaced"


def check_target(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """Refuse an OUT that is, holds or lies in an input, or that would destroy something.

    Raises:
        OutputError: with the reason; nothing has been written.
    """
    with writing(out):
        _check_target(out, inputs, overwrite=overwrite)


def _check_target(out: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    real = out.resolve()
    for source in inputs:
        other = source.resolve()
        if real == other or real in other.parents or other in real.parents:
            raise OutputError(
                "output-overlaps-input",
                f"the output {out} is, lies in, or contains the input {source}",
                hint="choose another folder: -o OUT",
            )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(
            "output-not-folder", f"the output {out} exists and is not a folder", hint="choose another: -o OUT"
        )
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            "output-exists",
            f"the output {out} exists",
            hint="choose another with -o OUT, or replace it with --overwrite",
        )
    if not any((out / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise OutputError(
            "output-not-model",
            f"the output {out} is no model folder (no config.json, no adapter_config.json), so it is not replaced",
            hint="choose another with -o OUT",
        )


@contextmanager
def staged(out: Path, inputs: Iterable[Path], *, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """A new folder to write into; it becomes `out` when the block ends well and goes when it does not.

    The folder stands beside `out`, on the same file system. An existing `out` is replaced only after the new
    folder is complete and synced; it is moved aside first, so it is back if the last rename fails. Stages that
    killed processes left beside `out` go first: a stage is locked while its process lives.

    Args:
        out: the folder to make.
        inputs: folders that `out` must not touch.
        overwrite: allow replacing an existing model folder.
        resume: begin with what a killed or failed process left, and leave what there is when this one fails.

    Raises:
        OutputError: the target is refused, or cannot be written.
    """
    recover(out)
    check_target(out, inputs, overwrite=overwrite)
    target = out.absolute()
    stage = target.parent / f".{out.resolve().name}{STAGE}-{os.getpid()}"
    new_parents: list[Path] = []
    lock: int | None = None
    done = False
    try:
        with writing(out):
            new_parents += [p for p in target.parents if not p.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = _settle(stage, target, resume=resume)
            yield stage
            sync_folder(stage)
            _replace(stage, target)
            sync_folder(target.parent)
            done = True
    finally:
        if done or not resume:
            shutil.rmtree(stage, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for parent in new_parents:  # innermost first; those that hold the finished folder are not empty
            with suppress(OSError):
                parent.rmdir()


def _settle(stage: Path, out: Path, *, resume: bool) -> int:
    """Make `stage`, locked; of the stages of dead processes one is taken over under `resume`, the others go."""
    found: int | None = None
    for other in _stages(out):
        lock = _lock(other)
        if lock is None:
            continue
        if resume and found is None:
            other.rename(stage)
            found = lock
        else:
            shutil.rmtree(other, ignore_errors=True)
            os.close(lock)
    if found is not None:
        return found
    stage.mkdir()
    return _lock(stage, own=True) or os.open(stage, os.O_RDONLY)


def _stages(out: Path, *, aside: bool = False) -> list[Path]:
    """The stages beside `out`, or the former outputs that were moved aside."""
    out = out.resolve()
    found = sorted(out.parent.glob(f"{glob.escape(f'.{out.name}{STAGE}-')}*"))
    return [path for path in found if path.name.endswith(ASIDE) == aside and path.is_dir()]


def _lock(folder: Path, *, own: bool = False) -> int | None:
    """A descriptor that holds a folder's lock; None while another process holds it, or where it cannot be known."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None  # it has just become its output, or gone
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), folder.stat()):
            return handle
    except OSError:  # a live process, or a file system without locks
        if own:
            return handle
    os.close(handle)
    return None


def abandoned_bytes(out: Path) -> int:
    """Bytes on disk of the stages of dead processes, which the next `staged` removes or takes over."""
    total = 0
    for stage in _stages(out):
        lock = _lock(stage)
        if lock is not None:
            total += sum(f.stat().st_blocks * 512 for f in stage.rglob("*") if f.is_file())
            os.close(lock)
    return total


def recover(out: Path) -> None:
    """Put back what a process that was killed between two renames had moved aside."""
    for aside in _stages(out, aside=True):
        lock = _lock(aside)
        if lock is None:
            continue
        with suppress(OSError):
            if out.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(out)
        os.close(lock)


def _replace(stage: Path, out: Path) -> None:
    if not out.exists() or not any(out.iterdir()):
        stage.rename(out)
        return
    aside = stage.with_name(f"{stage.name}{ASIDE}")
    lock = _lock(out, own=True)
    try:
        try:
            out.rename(aside)
            stage.rename(out)
        except BaseException:  # an interrupt between the two renames too
            if aside.exists() and not out.exists():
                aside.rename(out)
            raise
        shutil.rmtree(aside)
    finally:
        if lock is not None:
            os.close(lock)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn an OSError while `out` is written into an OutputError."""
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        raise OutputError(
            "output-disk-full" if full else "output-unwritable",
            f"{out} cannot be written: {error.strerror or error}"
            + (f" ({error.filename})" if error.filename and Path(error.filename) != out else ""),
            hint="free space there, or choose another disk with -o OUT"
            if full
            else "check the folder's permissions, or choose another with -o OUT",
        ) from error


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries, where the file system can."""
    with suppress(OSError):  # some network file systems refuse to
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def copy_file(source: Path, target: Path) -> None:
    """Copy and sync a file, mode 0666 & ~umask; tells a source that cannot be read from a target that is full."""
    with reading(source):
        handle = source.open("rb")
    with handle, target.open("xb") as f:
        while True:
            with reading(source):
                piece = handle.read(1 << 20)
            if not piece:
                break
            f.write(piece)
        f.flush()
        os.fsync(f.fileno())


def write_file(path: Path, data: bytes) -> None:
    """Write and sync a small file, mode 0666 & ~umask."""
    with path.open("xb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def write_safetensors(path: Path, tensors: Iterable[TensorSpec], data: Callable[[str], bytes | memoryview]) -> int:
    """Write and sync a safetensors file, one tensor in memory at a time.

    Args:
        path: the new file; mode 0666 & ~umask, unlike the library's 0600, which servers cannot read.
        tensors: (name, dtype, shape) of each.
        data: gives a tensor's bytes by its name; called in the file's order.

    Returns:
        Bytes written.
    """
    header, spans = layout(iter(tensors))
    with path.open("xb") as f:
        f.write(header)
        for name, (_, n_bytes) in spans.items():
            raw = data(name)
            assert len(raw) == n_bytes
            f.write(raw)
        f.flush()
        os.fsync(f.fileno())
        return f.tell()
