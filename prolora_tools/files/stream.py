"""Reading and writing spans of large files: by position, from any thread, at the speed of a copy."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Self

from prolora_tools.errors import InputError
from prolora_tools.files.tensors import LoadedTensor, StoredTensor, reading

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

PIECE = 8 << 20
"""Bytes moved by one call of the portable copy, and between two looks at the stop flag."""


_NOT_SUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY}
"""What copy_file_range and posix_fallocate answer where the file system cannot."""


class Files:
    """Open files by path, each opened once and closed together. Safe to use from several threads."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Nothing is open yet."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close everything."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def handle(self, path: Path) -> int:
        """A descriptor to read `path` with.

        Raises:
            InputError: it cannot be opened.
        """
        with self._lock:
            if path not in self._handles:
                with reading(path):
                    self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]

    def read_into(self, tensor: StoredTensor, offset: int, buffer: npt.NDArray[np.uint8]) -> None:
        """Fill `buffer` with the tensor's bytes from `offset` on.

        Raises:
            InputError: the file ends early or cannot be read.
        """
        if isinstance(tensor, LoadedTensor):
            buffer.data[:] = tensor.data[offset : offset + buffer.nbytes]
            return
        handle, view, done = self.handle(tensor.file), buffer.data, 0
        while done < buffer.nbytes:
            with reading(tensor.file):
                got = os.preadv(handle, [view[done:]], tensor.begin + offset + done)
            if not got:
                raise InputError(
                    "file-shrunk",
                    f"{tensor.file} ends inside {tensor.name!r}, at byte {offset + done:,} of {tensor.n_bytes:,}",
                    hint="the file changed while it was read; run the command again",
                )
            done += got


def write_at(handle: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def copy_span(source: int, source_offset: int, target: int, target_offset: int, n_bytes: int) -> int:
    """Copy up to PIECE bytes from file to file, in the kernel where it can.

    Returns:
        Bytes copied; 0 when the source has ended.
    """
    count = min(n_bytes, PIECE)
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target, count, source_offset, target_offset)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    data = os.pread(source, count, source_offset)
    write_at(target, data, target_offset)
    return len(data)


def reserve(handle: int, n_bytes: int) -> None:
    """Allocate a new file's blocks: fails at once where the disk is too full, and writes are faster after."""
    if n_bytes and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(handle, 0, n_bytes)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
    os.ftruncate(handle, n_bytes)


def start_writeback(handle: int, offset: int, n_bytes: int) -> None:
    """Let the kernel begin to write a finished span, so that the final sync has little left to do."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, offset, n_bytes, os.POSIX_FADV_DONTNEED)
