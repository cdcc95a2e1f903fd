"""Shapes under a budget: against every choice there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.core.allocation import Point, allocate, allocate_ranks, candidates
from prolora_tools.core.geometry import Geometry


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 4), st.integers(0, 12))
def test_ranks_of_one_size_are_the_best_there_are(seed: int, modules: int, rank: int, budget: int) -> None:
    """Where every rank costs the same, greedy is optimal."""
    rng = np.random.default_rng(seed)
    values = -np.sort(-rng.uniform(0.1, 1, (modules, rank)), axis=1)
    chosen = allocate_ranks(values.tolist(), [3] * modules, 3 * budget)

    def error(ranks: tuple[int, ...]) -> float:
        return sum(float(np.sum(own[k:] ** 2)) for own, k in zip(values, ranks, strict=True))

    every = [r for r in itertools.product(range(rank + 1), repeat=modules) if sum(r) <= budget]
    assert sum(chosen) <= budget
    assert error(tuple(chosen)) == pytest.approx(min(map(error, every)), abs=1e-12)


def test_a_rank_is_worth_what_it_takes_away_per_parameter() -> None:
    assert allocate_ranks([[2.0], [1.9, 1.0]], [10, 4], 10) == [0, 2]
    assert allocate_ranks([[2.0], [0.5]], [10, 4], 10) == [1, 0]
    assert allocate_ranks([[3.0, 2.0], [1.0]], [5, 5], 4) == [0, 0]


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(2, 4))
def test_no_choice_that_costs_as_much_is_better(seed: int, modules: int, points: int) -> None:
    """At the totals that the walk along the hulls passes through it is the best of all choices of that size."""
    rng = np.random.default_rng(seed)
    curves = [
        [Point(Geometry.lora(1), int(size), float(e)) for size, e in zip(rng.integers(1, 30, points), own, strict=True)]
        for own in rng.uniform(0, 1, (modules, points))
    ]
    for budget in range(3 * modules, 90, 7):
        chosen = allocate(curves, budget=budget)
        if chosen is None:
            assert sum(min(p.parameters for p in c) for c in curves) > budget
            continue
        size, error = sum(p.parameters for p in chosen), sum(p.error for p in chosen)
        assert size <= budget
        # The steps it could not afford are all that parts it from the optimum.
        best = min(sum(p.error for p in c) for c in itertools.product(*curves) if sum(p.parameters for p in c) <= size)
        exact = allocate(curves, error=error)
        assert exact is not None
        if sum(p.parameters for p in exact) == size:
            assert error == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize(("rank", "dims"), [(8, (256, 704)), (8, (704, 256)), (16, (64, 64)), (1, (5, 3)), (3, (2, 9))])
def test_shapes_to_try(rank: int, dims: tuple[int, int]) -> None:
    shapes = candidates(rank, *dims)
    sizes = [shape.parameters(*dims) for shape in shapes]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= rank * sum(dims)
    assert all(s.is_lora or (s.chunks_a <= dims[0] and s.chunks_b <= dims[1]) for s in shapes)
    assert min(sizes) == sizes[0]
    if rank == 8:
        assert any(s.rank == 16 for s in shapes)
        assert {(4, 2), (2, 4), (7, 4), (2, 1), (1, 2)} <= {(s.chunks_a, s.chunks_b) for s in shapes}
