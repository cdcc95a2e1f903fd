"""The PRoLoRA maps, once: chunk -> factor (`expand`) and factor -> chunk (`project`).

Both work on rank-first matrices: A as it is, (rank, in), and B transposed, (rank, out). The index rule is
`Sharing.source_row`. `expand` takes torch tensors too, as it only indexes and reshapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from prolora_tools.core.geometry import Sharing


class _Array(Protocol):
    """What `expand` needs of an array, numpy's or torch's."""

    def __getitem__(self, index: Any, /) -> Any: ...


ArrayT = TypeVar("ArrayT", bound=_Array)


def copy_rows(sharing: Sharing, copies: int) -> npt.NDArray[np.int64]:
    """The chunk's row behind every row of every copy: (copies, r_s)."""
    return np.asarray(sharing.source_rows(copies), dtype=np.int64).reshape(copies, sharing.ranks)


def expand(chunk: ArrayT, sharing: Sharing, dim: int) -> ArrayT:
    """Lay copies of the chunk side by side, each rolled along the rank, and cut them at `dim`.

    Args:
        chunk: (r_s, ceil(dim / chunks)), any dtype.
        sharing: the side's map.
        dim: hidden dim, the in or out features.

    Returns:
        (r_s, dim), dtype of the chunk (arXiv 2402.16902, broadcast reduction and rotation enhancement).
    """
    copies = sharing.copies(dim)
    laid = chunk[copy_rows(sharing, copies)]  # (copies, r_s, width)
    full: ArrayT = laid.swapaxes(0, 1).reshape(sharing.ranks, copies * sharing.width(dim))[:, :dim]
    return full


def project(full: npt.NDArray[np.floating[Any]], sharing: Sharing) -> npt.NDArray[np.float64]:
    """Roll the copies back and average each element over the copies that hold it.

    This is the least-squares inverse of `expand`: of all chunks, the one whose expansion is nearest in the
    Frobenius norm. Equal float32 copies average to themselves exactly, as float64 holds their sum.

    Args:
        full: (r_s, dim), floating.
        sharing: the side's map.

    Returns:
        The chunk, (r_s, ceil(dim / chunks)) float64.
    """
    dim = full.shape[1]
    width, copies = sharing.width(dim), sharing.copies(dim)
    rows = copy_rows(sharing, copies)
    total = np.full((sharing.ranks, width), -0.0)  # -0.0 + x is x for every x, the sign of zero included
    for i in range(copies):
        part = full[:, i * width : (i + 1) * width]
        # Only the last copy can be cut short; rows[i] is a permutation, so += meets each row once.
        total[rows[i], : part.shape[1]] += part
    held = np.full(width, copies, dtype=np.float64)
    if copies:
        held[dim - (copies - 1) * width :] -= 1
    chunk: npt.NDArray[np.float64] = total / held
    return chunk
