"""Second moments of what goes into a layer, or of the gradients that come back to it: the norm of a calibrated fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.floating[Any]]

SHRINKAGE = 1e-3
"""Share of the mean variance added to every direction: a sample of text does not show that a direction is unused."""


@dataclass(frozen=True, eq=False)
class Moments:
    """C = root^T root + diag(diagonal), or the dense matrix itself: symmetric and positive definite.

    Attributes:
        dense: (dim, dim), or None.
        root: (k, dim), rows of a sketch, or None.
        diagonal: (dim,), what is added to root^T root; zeros beside a dense matrix.
    """

    dense: Array | None
    root: Array | None
    diagonal: Array

    @classmethod
    def of_matrix(cls, matrix: Array, shrinkage: float = SHRINKAGE) -> Moments:
        """Of a dense sample moment, (dim, dim)."""
        dim = len(matrix)
        level = float(np.trace(matrix)) / max(dim, 1)
        if level <= 0:  # nothing was seen: the Frobenius norm
            return cls(np.eye(dim), None, np.zeros(dim))
        return cls((matrix + matrix.T) / 2 + shrinkage * level * np.eye(dim), None, np.zeros(dim))

    @classmethod
    def of_sketch(cls, rows: Array, diagonal: Array, shrinkage: float = SHRINKAGE) -> Moments:
        """Of a random sketch and the exact diagonal.

        The sketch's own diagonal is noisy; the rows are scaled column by column to nine tenths of the true one, and
        the rest is added.

        Args:
            rows: (k, dim), with the moment as the expectation of rows^T rows.
            diagonal: (dim,), the true diagonal of the moment.
            shrinkage: share of the mean variance that is added.
        """
        level = float(diagonal.mean()) if diagonal.size else 0.0
        if level <= 0:
            return cls(None, np.zeros((1, len(diagonal))), np.ones(len(diagonal)))
        seen = np.sum(rows**2, axis=0)
        scale = np.sqrt(np.divide(0.9 * diagonal, seen, where=seen > 0, out=np.zeros_like(seen)))
        root = rows * scale
        rest = diagonal - np.sum(root**2, axis=0)
        return cls(None, root, np.maximum(rest, 0.0) + shrinkage * level)

    @property
    def dim(self) -> int:
        """Features."""
        return len(self.diagonal)

    def apply(self, x: Array) -> Array:
        """X C for rows x, (k, dim)."""
        if self.dense is not None:
            return x @ self.dense
        assert self.root is not None
        out: Array = (x @ self.root.T) @ self.root + x * self.diagonal
        return out

    def block(self, rows: slice, columns: slice) -> Array:
        """A dense block of C."""
        if self.dense is not None:
            return self.dense[rows, columns]
        assert self.root is not None
        out = self.root[:, rows].T @ self.root[:, columns]
        width = min(out.shape)
        if rows.start == columns.start:
            out[np.arange(width), np.arange(width)] += self.diagonal[rows][:width]
        return out
