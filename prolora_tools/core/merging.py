"""The arithmetic of a merge on a block of rows: W + scaling * (B A), in float32, rounded once by the caller.

The order is PEFT's default merge: (B @ A), then * scaling, then + W. DoRA follows (PEFT's DoraLinearVariant):
magnitude / |W + D| * (W + D), norms over the input dims.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    Floats = npt.NDArray[np.floating[Any]]

PANEL_BYTES = 1 << 20
"""float32 bytes of a panel. It stays in the cache with its scratch: 4 MB is 1.5x slower. And each step is long beside
the handing over of the interpreter's lock: on two threads 512 KB is 1.07x slower, 256 KB 1.2x (measured)."""


def panel_rows(columns: int) -> int:
    """Rows of B A that are multiplied at once, by the width of the matrix alone.

    BLAS sums in an order that depends on how many rows it is given (OpenBLAS takes other kernels for few rows and
    for edges). Panels at fixed places make the bits of a product independent of blocks and threads.
    """
    return max(16, PANEL_BYTES // (4 * max(columns, 1)))


@dataclass(frozen=True)
class Delta:
    """What one module adds to a weight stored as a (rows, columns) matrix.

    Attributes:
        left: (rows, r); B, or A transposed where the weight is stored (in, out).
        right: (r, columns); A, or B transposed.
        scaling: what the product is multiplied with.
        at: the weight's row at which the delta's first is added.
    """

    left: Floats
    right: Floats
    scaling: float
    at: int = 0

    @classmethod
    def of(cls, a: Floats, b: Floats, scaling: float, *, transposed: bool, at: int = 0) -> Delta:
        """From A (r, in) and B (out, r); `transposed` for Conv1D and Embedding weights, stored (in, out)."""
        left, right = (a.T, b.T) if transposed else (b, a)
        if math.frexp(scaling)[0] in {0.5, -0.5} and _far_from_limits(left, right, scaling):
            return cls(left * left.dtype.type(scaling), right, 1.0, at)
        return cls(left, right, scaling, at)

    def add_to(self, weight: Floats, start: int, scratch: Floats) -> None:
        """Add the delta's part in the rows from `start` on to `weight`, in place.

        Args:
            weight: (rows of the block, columns), float32 or float64.
            start: the block's first row.
            scratch: float32 or wider, at least (panel_rows, columns); overwritten.
        """
        step = panel_rows(weight.shape[1])
        scaling = np.asarray(self.scaling, dtype=scratch.dtype)
        begin, end = max(start, self.at), min(start + len(weight), self.at + len(self.left))
        for first in range((begin - self.at) // step * step, end - self.at, step) if begin < end else ():
            last = min(first + step, len(self.left))
            product = scratch[: last - first]
            np.matmul(self.left[first:last], self.right, out=product)
            if self.scaling != 1:
                np.multiply(product, scaling, out=product)
            top, bottom = max(first + self.at, begin), min(last + self.at, end)
            part = weight[top - start : bottom - start]
            np.add(part, product[top - self.at - first : bottom - self.at - first], out=part)


def _far_from_limits(left: Floats, right: Floats, scaling: float) -> bool:
    """Whether no product, sum or partial sum of them is rounded as a subnormal number or overflows, scaled or not.

    A power of two then commutes with every rounding, and may be multiplied into one factor: the same bits, and a
    pass over the weight less.
    """
    low, high = min(abs(scaling), 1.0), max(abs(scaling), 1.0)
    least, most = low, left.shape[1] * high
    for factor in (left, right):
        size = np.abs(factor)
        smallest, largest = float(size.min(where=size > 0, initial=1)), float(size.max(initial=1))
        if smallest * low < 2.0**-120 or largest * high > 2.0**120:
            return False
        least, most = least * smallest, most * largest
    return least > 2.0**-90 and most < 2.0**100


def row_norms(weight: Floats) -> Floats:
    """Euclidean norm of each row, summed in float64, in the weight's dtype."""
    norms: Floats = np.sqrt(np.einsum("ij,ij->i", weight, weight, dtype=np.float64)).astype(weight.dtype)
    return norms


def column_norms(blocks: Iterable[Floats], columns: int) -> Floats:
    """Euclidean norm of each column over blocks of rows, summed in float64, in float32."""
    total = np.zeros(columns)
    for block in blocks:
        total += np.einsum("ij,ij->j", block, block, dtype=np.float64)
    return np.sqrt(total).astype(np.float32)
