from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.core.geometry import Geometry, Sharing, default_stride
from prolora_tools.errors import RequestError
from tests.oracles import prolora

geometries = st.integers(1, 9).flatmap(
    lambda rank: st.builds(
        Geometry,
        st.just(rank),
        st.integers(0, rank),
        st.integers(1, 12),
        st.integers(1, 12),
        st.none() | st.integers(0, 11),
        st.none() | st.integers(0, 11),
    )
)


def distinct_blocks_by_looking(geometry: Geometry, in_features: int, out_features: int) -> int:
    """Lay labels of the chunks' ranks out, copy by copy, and count the pairings that differ."""
    a = [
        tuple(geometry.a.source_row(i, k) for k in range(geometry.shared))
        for i in range(geometry.a.copies(in_features))
    ]
    b = [
        tuple(geometry.b.source_row(j, k) for k in range(geometry.shared))
        for j in range(geometry.b.copies(out_features))
    ]
    return len({frozenset(zip(x, y, strict=True)) for x in a for y in b})


@given(geometries, st.integers(1, 40), st.integers(1, 40))
def test_distinct_blocks_are_those_one_can_count(geometry: Geometry, in_features: int, out_features: int) -> None:
    expected = distinct_blocks_by_looking(geometry, in_features, out_features) if geometry.shared else 0
    assert geometry.distinct_blocks(in_features, out_features) == expected


def test_the_papers_geometry_has_seven_distinct_blocks_of_49() -> None:
    assert Geometry(8, 1, 7, 7).distinct_blocks(4096, 4096) == 7


@given(geometries, st.integers(1, 40), st.integers(1, 40))
def test_parameters_are_what_the_arrays_hold(geometry: Geometry, in_features: int, out_features: int) -> None:
    stored = geometry.shared * (geometry.a.width(in_features) + geometry.b.width(out_features))
    assert geometry.parameters(in_features, out_features) == stored + geometry.unshared * (in_features + out_features)


@given(st.integers(1, 64), st.integers(1, 64))
def test_default_stride_is_the_official_rule(ranks: int, chunks: int) -> None:
    assert default_stride(ranks, chunks) == prolora.stride(ranks, chunks)
    assert Geometry(ranks, 0, chunks, 1).a.stride == prolora.stride(ranks, chunks)


def test_copies_fill_the_dim_and_no_more() -> None:
    assert Sharing(1, 4, 1).width(5) == 2
    assert Sharing(1, 4, 1).copies(5) == 3  # two columns each: the fourth copy would start past the end
    assert Sharing(1, 7, 1).copies(3) == 3


def test_lora_is_the_special_case() -> None:
    assert Geometry.lora(4).is_lora
    assert Geometry(4, 4, 3, 2).is_lora
    assert Geometry(4, 0, 1, 1).is_lora
    assert not Geometry(4, 0, 1, 2).is_lora
    assert Geometry.lora(4).parameters(10, 6) == 4 * 16


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((0, 0, 1, 1), "geometry-rank"),
        ((2, 3, 1, 1), "geometry-unshared"),
        ((2, -1, 1, 1), "geometry-unshared"),
        ((2, 0, 0, 1), "geometry-chunks"),
        ((2, 0, 1, 0), "geometry-chunks"),
        ((2, 0, 1, 1, -1), "geometry-stride"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: tuple[int, ...], code: str) -> None:
    with pytest.raises(RequestError) as caught:
        Geometry(*arguments)
    assert caught.value.code == code


def test_text_names_the_strides_only_where_they_were_given() -> None:
    assert str(Geometry(8, 1, 7, 7)) == "r=8 u=1 m=7 n=7"
    assert str(Geometry(8, 1, 7, 7, 1, 3)) == "r=8 u=1 m=7 n=7 strides=1,3"
