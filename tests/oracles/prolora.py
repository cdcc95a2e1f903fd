"""PRoLoRA by plain loops, after section 1 of METHOD.md; shares nothing with prolora_tools.

Factors are anything that is indexed as `x[row][column]`: lists of numbers, or tensors, through which autograd then
runs. Slow on purpose.
"""

from __future__ import annotations

import math
from typing import Any


def stride(shared: int, chunks: int) -> int:
    """The official stride: the floor of r_s / chunks, and at least 1."""
    return max(math.floor(shared / chunks), 1)


def full_a(chunk: Any, unshared: Any, *, ranks: int, rank_unshared: int, dim: int, chunks: int, step: int) -> list[Any]:
    """A as r rows of `dim` entries, shared ranks first; chunk (r_s, ceil(dim / chunks)), unshared (u, dim)."""
    width = math.ceil(dim / chunks)
    rows = []
    for k in range(ranks):
        row = []
        for column in range(dim):
            copy = column // width
            row.append(chunk[(k + copy * step) % ranks][column - copy * width])
        rows.append(row)
    return rows + [[unshared[k][column] for column in range(dim)] for k in range(rank_unshared)]


def full_b(chunk: Any, unshared: Any, *, ranks: int, rank_unshared: int, dim: int, chunks: int, step: int) -> list[Any]:
    """B as `dim` rows of r entries, shared ranks first; chunk (ceil(dim / chunks), r_s), unshared (dim, u)."""
    width = math.ceil(dim / chunks)
    rows = []
    for out in range(dim):
        copy = out // width
        row = [chunk[out - copy * width][(k + copy * step) % ranks] for k in range(ranks)]
        row += [unshared[out][k] for k in range(rank_unshared)]
        rows.append(row)
    return rows


def delta_weight(a: list[Any], b: list[Any], scaling: float) -> list[list[Any]]:
    """scaling * B A, entry by entry: (out, in)."""
    return [
        [scaling * sum(b_row[k] * a[k][column] for k in range(len(a))) for column in range(len(a[0]))] for b_row in b
    ]
