from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.core.geometry import Sharing, default_stride
from prolora_tools.core.sharing import expand, project
from tests.oracles import prolora


@st.composite
def sharings(draw: st.DrawFn) -> tuple[Sharing, int]:
    """A map and a dim: odd sizes, ceil chunks, more chunks than ranks or columns, no rotation."""
    ranks, chunks, dim = draw(st.integers(0, 7)), draw(st.integers(1, 11)), draw(st.integers(1, 25))
    stride = draw(st.sampled_from([0, default_stride(ranks, chunks)]) | st.integers(0, 9))
    return Sharing(ranks, chunks, stride), dim


def chunk_of(sharing: Sharing, dim: int, seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal((sharing.ranks, sharing.width(dim))).astype(np.float32)


def by_loops(chunk: Any, sharing: Sharing, dim: int) -> list[Any]:
    rows: list[Any] = prolora.full_a(
        chunk, [], ranks=sharing.ranks, rank_unshared=0, dim=dim, chunks=sharing.chunks, step=sharing.stride
    )
    return rows


@given(sharings(), st.integers(0, 2**32 - 1))
def test_expand_is_the_loop(case: tuple[Sharing, int], seed: int) -> None:
    sharing, dim = case
    chunk = chunk_of(sharing, dim, seed)
    full = expand(chunk, sharing, dim)
    assert full.shape == (sharing.ranks, dim)
    assert full.dtype == np.float32
    np.testing.assert_array_equal(full, np.array(by_loops(chunk, sharing, dim)).reshape(sharing.ranks, dim))


@given(sharings(), st.integers(0, 2**32 - 1))
def test_torch_tensors_expand_alike(case: tuple[Sharing, int], seed: int) -> None:
    sharing, dim = case
    chunk = chunk_of(sharing, dim, seed)
    np.testing.assert_array_equal(expand(torch.from_numpy(chunk), sharing, dim).numpy(), expand(chunk, sharing, dim))


@given(sharings(), st.integers(0, 2**32 - 1))
def test_b_is_laid_out_by_the_same_rule(case: tuple[Sharing, int], seed: int) -> None:
    sharing, dim = case
    chunk = chunk_of(sharing, dim, seed)
    rows = prolora.full_b(
        chunk.T, [[]] * dim, ranks=sharing.ranks, rank_unshared=0, dim=dim, chunks=sharing.chunks, step=sharing.stride
    )
    np.testing.assert_array_equal(expand(chunk, sharing, dim).T, np.array(rows).reshape(dim, sharing.ranks))


def test_the_direction_is_the_official_codes() -> None:
    """torch.roll(A0, -i * s, dims=0): the other direction is the same class of dW and another format."""
    chunk = torch.arange(12.0).reshape(4, 3)
    full = expand(chunk, Sharing(4, 3, 1), 9)
    for i in range(3):
        torch.testing.assert_close(full[:, 3 * i : 3 * i + 3], torch.roll(chunk, -i, dims=0))


@given(sharings(), st.integers(0, 2**32 - 1))
def test_project_undoes_expand_bit_for_bit(case: tuple[Sharing, int], seed: int) -> None:
    sharing, dim = case
    chunk = chunk_of(sharing, dim, seed)
    chunk[chunk > 1] = -0.0  # the sign of zero comes back too
    back = project(expand(chunk, sharing, dim), sharing).astype(np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), chunk.view(np.uint32))


@given(sharings(), st.integers(0, 2**32 - 1))
def test_project_is_the_least_squares_inverse(case: tuple[Sharing, int], seed: int) -> None:
    """Against the normal equations of the explicit expansion matrix."""
    sharing, dim = case
    full = np.random.default_rng(seed).standard_normal((sharing.ranks, dim))
    size = sharing.ranks * sharing.width(dim)
    basis = [expand(e.reshape(sharing.ranks, -1), sharing, dim).reshape(-1) for e in np.eye(size)]
    if not basis:
        assert project(full, sharing).size == 0
        return
    solution = np.linalg.lstsq(np.array(basis).T, full.reshape(-1), rcond=None)[0]
    np.testing.assert_allclose(project(full, sharing).reshape(-1), solution, atol=1e-12)
