"""The integers of PRoLoRA: which stored rank row each copy's row comes from, and the shapes that follow.

Source: Wang et al., ACL 2024, arXiv 2402.16902, sections 3.1-3.3; the rolling direction and the order of the
ranks are those of the official code. numpy and torch code both read the rule from here, so they cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from prolora_tools.errors import RequestError


def ceil_div(numerator: int, denominator: int) -> int:
    """The smallest integer that is at least numerator / denominator."""
    return -(-numerator // denominator)


@dataclass(frozen=True)
class Sharing:
    """How one factor's shared ranks are laid out along its hidden dim: chunk 0, rolled once per copy.

    Copy i holds in its rank row k the chunk's row (k + i * stride) mod ranks.

    Attributes:
        ranks: shared rank r_s, rows of the chunk.
        chunks: m or n, the number of pieces the hidden dim is cut into.
        stride: rank steps from one copy to the next; 0 switches rotation off.
    """

    ranks: int
    chunks: int
    stride: int

    def width(self, dim: int) -> int:
        """Columns of the stored chunk for a hidden dim of `dim`: ceil(dim / chunks)."""
        return ceil_div(dim, self.chunks)

    def copies(self, dim: int) -> int:
        """Copies that `dim` really holds: fewer than `chunks` where ceil widths fill it earlier."""
        return ceil_div(dim, self.width(dim)) if dim else 0

    def source_row(self, copy: int, row: int) -> int:
        """The chunk's row that row `row` of copy number `copy` shows. Needs ranks > 0."""
        return (row + copy * self.stride) % self.ranks

    def source_rows(self, copies: int) -> list[list[int]]:
        """source_row for every copy and row: copies x ranks."""
        return [[self.source_row(i, k) for k in range(self.ranks)] for i in range(copies)]


def default_stride(shared_rank: int, chunks: int) -> int:
    """The official rule: max(floor(r_s / chunks), 1)."""
    return max(shared_rank // chunks, 1)


@dataclass(frozen=True)
class Geometry:
    """Shape of one PRoLoRA module, whatever its hidden dims.

    Attributes:
        rank: total rank r.
        unshared: u, ranks kept whole (0 <= u <= r).
        chunks_a: m, chunks of A along the input dim.
        chunks_b: n, chunks of B along the output dim.
        stride_a: rank steps between copies of A; None takes the official rule, 0 is no rotation.
        stride_b: the same for B.

    Raises:
        RequestError: a number is out of its range.
    """

    rank: int
    unshared: int
    chunks_a: int
    chunks_b: int
    stride_a: int | None = None
    stride_b: int | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(
                "geometry-rank", f"rank is {self.rank}, expected at least 1", hint="give a rank of 1 or more"
            )
        if not 0 <= self.unshared <= self.rank:
            raise RequestError(
                "geometry-unshared",
                f"unshared rank is {self.unshared}, expected 0 to the rank, {self.rank}",
                hint=f"give --unshared a number from 0 to {self.rank}",
            )
        for name, chunks in (("A", self.chunks_a), ("B", self.chunks_b)):
            if chunks < 1:
                raise RequestError(
                    "geometry-chunks",
                    f"chunks of {name} is {chunks}, expected at least 1",
                    hint="give --chunks M,N with both at least 1",
                )
        for name, stride in (("A", self.stride_a), ("B", self.stride_b)):
            if stride is not None and stride < 0:
                raise RequestError(
                    "geometry-stride",
                    f"stride of {name} is {stride}, expected at least 0",
                    hint="a stride counts rank rows; rolling the other way is stride r_s - s",
                )

    @classmethod
    def lora(cls, rank: int) -> Geometry:
        """The geometry under which PRoLoRA is plain LoRA: all ranks unshared."""
        return cls(rank, rank, 1, 1)

    @property
    def shared(self) -> int:
        """r_s = rank - unshared."""
        return self.rank - self.unshared

    @cached_property
    def a(self) -> Sharing:
        """The map of A, along the input dim."""
        stride = default_stride(self.shared, self.chunks_a) if self.stride_a is None else self.stride_a
        return Sharing(self.shared, self.chunks_a, stride)

    @cached_property
    def b(self) -> Sharing:
        """The map of B, along the output dim."""
        stride = default_stride(self.shared, self.chunks_b) if self.stride_b is None else self.stride_b
        return Sharing(self.shared, self.chunks_b, stride)

    @property
    def is_lora(self) -> bool:
        """Whether this shape shares nothing, so that the module is plain LoRA."""
        return self.shared == 0 or (self.chunks_a == 1 and self.chunks_b == 1)

    def parameters(self, in_features: int, out_features: int) -> int:
        """Stored numbers: u (in + out) + r_s (ceil(in / m) + ceil(out / n))."""
        shared = self.a.width(in_features) + self.b.width(out_features)
        return self.unshared * (in_features + out_features) + self.shared * shared

    def distinct_blocks(self, in_features: int, out_features: int) -> int:
        """Distinct blocks among the m x n of the shared part of B A.

        Block (j, i) depends on (i * stride_a - j * stride_b) mod r_s only, so there are at most r_s of them.
        """
        if self.shared == 0:
            return 0
        turns_a = {i * self.a.stride % self.shared for i in range(min(self.a.copies(in_features), self.shared))}
        turns_b = {j * self.b.stride % self.shared for j in range(min(self.b.copies(out_features), self.shared))}
        found: set[int] = set()
        for turn in turns_b:
            found |= {(other - turn) % self.shared for other in turns_a}
            if len(found) == self.shared:  # all there can be
                break
        return len(found)

    def __str__(self) -> str:
        text = f"r={self.rank} u={self.unshared} m={self.chunks_a} n={self.chunks_b}"
        if self.stride_a is not None or self.stride_b is not None:
            text += f" strides={self.a.stride},{self.b.stride}"
        return text
