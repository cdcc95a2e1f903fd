from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.core.budget import (
    LinearShape,
    candidates,
    lora_parameters,
    prolora_parameters,
    tied_lora_parameters,
    vera_parameters,
)
from prolora_tools.core.geometry import Geometry

if TYPE_CHECKING:
    from collections.abc import Sequence


def llama(hidden: int, ff: int, layers: int, kv: int) -> list[LinearShape]:
    dims = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden), (hidden, ff), (hidden, ff), (ff, hidden)]
    return [LinearShape(f"{i}.{j}", *pair) for i in range(layers) for j, pair in enumerate(dims)]


SEVEN = llama(4096, 11008, 32, 4096)
THIRTEEN = llama(5120, 13824, 40, 5120)
SEVENTY = llama(8192, 28672, 80, 1024)


@pytest.mark.parametrize(("rank", "expected"), [(2, 4_997_120), (8, 19_988_480), (16, 39_976_960), (64, 159_907_840)])
def test_lora_on_7b(rank: int, expected: int) -> None:
    assert lora_parameters(SEVEN, rank) == expected
    assert prolora_parameters(SEVEN, Geometry.lora(rank)) == expected


def test_the_papers_geometry_on_7b_counts_the_ceil() -> None:
    assert prolora_parameters(SEVEN, Geometry(8, 1, 7, 7)) == 4_999_520


@pytest.mark.parametrize(
    ("shapes", "millions"), [(THIRTEEN, (7.82, 62.59, 250.35)), (SEVENTY, (25.89, 207.09, 828.38))], ids=["13B", "70B"]
)
def test_true_counts_of_the_larger_models(shapes: list[LinearShape], millions: Sequence[float]) -> None:
    counts = [lora_parameters(shapes, rank) / 1e6 for rank in (2, 16, 64)]
    assert counts == pytest.approx(millions, abs=0.005)


def test_rivals() -> None:
    assert vera_parameters(SEVEN, 256) == 1_417_216
    assert tied_lora_parameters(4096, 280, 32) == 4_989_696


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=3),
    st.integers(1, 2000),
    st.sampled_from([0.0, 0.01]),
)
def test_candidates_are_exactly_those_that_meet_the_budget(
    dims: list[tuple[int, int]], budget: int, slack: float
) -> None:
    shapes = [LinearShape(str(i), *pair) for i, pair in enumerate(dims)]
    found = candidates(shapes, budget, max_rank=6, max_chunks=5, slack=slack)
    expected = set()
    for rank in range(1, 7):
        for unshared in range(rank + 1):
            chunks = range(2, 6) if unshared < rank else [1]
            fitting = [
                m for m in chunks if prolora_parameters(shapes, Geometry(rank, unshared, m, m)) <= budget * (1 + slack)
            ]
            if fitting and prolora_parameters(shapes, Geometry(rank, unshared, fitting[0], fitting[0])) >= 0.9 * budget:
                expected.add((rank, unshared, fitting[0]))
    assert {(c.geometry.rank, c.geometry.unshared, c.geometry.chunks_a) for c in found} == expected
    assert all(c.parameters == prolora_parameters(shapes, c.geometry) for c in found)
    distances = [abs(c.parameters - budget) for c in found]
    assert distances == sorted(distances)


def test_the_papers_equivalents_of_lora_2_are_among_the_candidates() -> None:
    found = {c.geometry for c in candidates(SEVEN, lora_parameters(SEVEN, 2), slack=0.005)}
    assert {Geometry(8, 1, 7, 7), Geometry(4, 1, 3, 3), Geometry(2, 2, 1, 1)} <= found
