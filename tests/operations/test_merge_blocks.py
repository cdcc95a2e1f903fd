"""The bits of a merge: the float32 formula, whatever the blocks and the threads."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prolora_tools import merge
from prolora_tools.core.merging import Delta, panel_rows
from prolora_tools.errors import InputError
from prolora_tools.files import dtypes
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import Checkpoint
from prolora_tools.files.stream import Files
from prolora_tools.files.tensors import StoredTensor
from prolora_tools.operations.merge_blocks import Blocks
from prolora_tools.operations.merge_plan import OutputTensor, plan_merge
from tests.support import tensors_of, write_adapter

ROWS, COLUMNS = 700, 1100  # three panels and a part of one
NAME = "model.layers.0.self_attn.q_proj"


def made(folder: Path, dtype: torch.dtype, *, alpha: float = 11) -> tuple[Path, Path]:
    """A base of one wide layer and one untouched tensor, and an adapter of rank 8 for the layer."""
    draw = torch.Generator().manual_seed(3)
    base = folder / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    weight = torch.randn(ROWS, COLUMNS, generator=draw)
    save_file(
        {f"{NAME}.weight": weight.to(dtype), "model.norm.weight": torch.ones(COLUMNS).to(dtype)},
        base / "model.safetensors",
    )
    factors = {
        f"base_model.model.{NAME}.lora_A.weight": torch.randn(8, COLUMNS, generator=draw),
        f"base_model.model.{NAME}.lora_B.weight": torch.randn(ROWS, 8, generator=draw),
    }
    return base, write_adapter(folder / "adapter", {"lora_alpha": alpha, "target_modules": ["q_proj"]}, factors)


def reference(base: Path, adapter: Path, dtype: torch.dtype) -> torch.Tensor:
    """The formula in whole matrices: (B A) * scaling + W in float32, rounded once."""
    factors = tensors_of(adapter)
    b, a = (factors[f"base_model.model.{NAME}.lora_{x}.weight"] for x in "BA")
    return ((b @ a) * (11 / 8) + tensors_of(base)[f"{NAME}.weight"].float()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out", [None, "float32", "float16", "bfloat16"])
def test_the_float32_formula_bit_for_bit(dtype: torch.dtype, out: str | None, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, dtype)
    merge(adapter, tmp_path / "out", base=base, dtype=out)
    found = tensors_of(tmp_path / "out")
    wanted = reference(base, adapter, getattr(torch, out) if out else dtype)
    assert torch.equal(found[f"{NAME}.weight"], wanted)
    assert torch.equal(found["model.norm.weight"], torch.ones(COLUMNS).to(wanted.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_block_size_changes_a_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base, adapter = made(tmp_path, dtype)
    opened = Checkpoint.open(base)
    tensor = plan_merge(Adapter.open(adapter), opened, None).tensors[f"{NAME}.weight"]
    results = []
    with Files() as files:
        for rows in (None, 1, 7, 64, 238, 239, ROWS):
            blocks = Blocks(files, rows)
            results.append(b"".join(c.tobytes() for _, c in blocks(tensor)))
            split = [c.tobytes() for a, b in ((0, 31), (31, 500), (500, ROWS)) for _, c in blocks(tensor, a, b)]
            results.append(b"".join(split))
    assert len(set(results)) == 1


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_no_number_of_threads_changes_a_bit(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prolora_tools.operations.merge.TASK_BYTES", 100_000)  # many tasks for one tensor
    base, adapter = made(tmp_path, torch.bfloat16)
    merge(adapter, tmp_path / "out", base=base, threads=threads)
    assert torch.equal(tensors_of(tmp_path / "out")[f"{NAME}.weight"], reference(base, adapter, torch.bfloat16))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.sampled_from([1, 3, 33, 1000, 20_000]),
    rank=st.sampled_from([1, 4, 8, 64, 300]),
    start=st.integers(0, 299),
    count=st.integers(1, 300),
    transposed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_delta_is_the_same_wherever_a_block_starts(
    rows: int, columns: int, rank: int, start: int, count: int, seed: int, *, transposed: bool
) -> None:
    """BLAS itself is not so: a product of one row takes another kernel than one of many."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rank, columns), (rows, rank)))
    delta = (
        Delta.of(b.T.copy(), a.T.copy(), 0.3, transposed=True) if transposed else Delta.of(a, b, 0.3, transposed=False)
    )
    scratch = np.empty((max(panel_rows(columns), rows), columns), dtype=np.float32)
    whole = np.zeros((rows, columns), dtype=np.float32)
    delta.add_to(whole, 0, scratch)
    start = min(start, rows - 1)
    part = np.zeros((min(count, rows - start), columns), dtype=np.float32)
    delta.add_to(part, start, scratch)
    assert np.array_equal(part, whole[start : start + len(part)])
    np.testing.assert_allclose(whole, (b.astype(float) @ a) * 0.3, rtol=1e-4, atol=1e-4)


@settings(max_examples=200, deadline=None)
@example(power=-20, sign=1, sizes=[100, -125], seed=0, wide=np.float32)
@example(power=20, sign=1, sizes=[-100, 118], seed=0, wide=np.float32)
@given(
    power=st.integers(-20, 20),
    sign=st.sampled_from([1, -1]),
    sizes=st.lists(st.integers(-140, 120), min_size=2, max_size=2),
    seed=st.integers(0, 9),
    wide=st.sampled_from([np.float32, np.float64]),
)
def test_a_scaling_of_a_power_of_two_changes_no_bit_of_the_formula(
    power: int, sign: int, sizes: list[int], seed: int, wide: Any
) -> None:
    """It is multiplied into one factor, unless that could be seen: products that underflow or overflow."""
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        a, b = (
            np.ldexp(rng.standard_normal(s), e).astype(wide) for s, e in zip(((5, 40), (30, 5)), sizes, strict=True)
        )
        b[rng.random(b.shape) < 0.2] = 0
        found = np.zeros((30, 40), dtype=wide)
        Delta.of(a, b, sign * 2.0**power, transposed=False).add_to(found, 0, np.empty((panel_rows(40), 40), wide))
        expected = (b @ a) * wide(sign * 2.0**power)
    assert np.array_equal(found, expected, equal_nan=True)


def test_a_scaling_of_a_power_of_two_is_multiplied_in_once() -> None:
    a, b = np.ones((2, 3), np.float32), np.ones((4, 2), np.float32)
    assert Delta.of(a, b, 2.0, transposed=False).scaling == 1
    assert Delta.of(a, b, 3.0, transposed=False).scaling == 3
    assert Delta.of(a * np.float32(1e-30), b * np.float32(1e-10), 2.0, transposed=False).scaling == 2


@settings(max_examples=200, deadline=None)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16"]),
    wide=st.sampled_from([np.float32, np.float64]),
)
def test_encoding_in_place_is_encoding(bits: list[int], dtype: str, wide: Any) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32).astype(wide)
    out = np.empty(values.size * 8, dtype=np.uint8)
    wanted = dtypes.encode(values.copy(), dtype)
    carrier, finite = dtypes.encode_into(values, dtype, out[: values.size * dtypes.ITEM_BITS[dtype] // 8])
    assert finite == dtypes.all_finite(wanted)
    if finite:
        assert carrier.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_decoding_in_place_is_decoding(dtype: str, wide: Any) -> None:
    raw = np.random.default_rng(0).standard_normal(64).astype(np.float32).view(np.uint8)
    with np.errstate(all="ignore"):
        wanted = dtypes.decode(raw.data, dtype)
        found = dtypes.decode_into(raw, dtype, np.empty(wanted.size, dtype=max(np.dtype(wide), wanted.dtype)))
    np.testing.assert_array_equal(found, wanted)


def test_nonfinite_results_pass_only_when_asked(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, torch.float32)
    tensors = tensors_of(base)
    tensors[f"{NAME}.weight"][400, 7] = float("inf")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match="first in row 400"):
        merge(adapter, tmp_path / "out", base=base)
    merge(adapter, tmp_path / "out", base=base, allow_nonfinite=True)
    found = tensors_of(tmp_path / "out")[f"{NAME}.weight"]
    assert torch.isinf(found).nonzero().tolist() == [[400, 7]]


def test_an_untouched_tensor_must_fit_its_new_dtype(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, torch.float32)
    tensors = tensors_of(base)
    tensors["model.norm.weight"][5] = 1e9
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.norm\.weight.*first in row 5"):
        merge(adapter, tmp_path / "out", base=base, dtype="float16")
    tensors["model.norm.weight"][5] = float("-inf")  # the base's own: a mask, say
    save_file(tensors, base / "model.safetensors")
    merge(adapter, tmp_path / "out", base=base, dtype="float16")


@settings(max_examples=100, deadline=None)
@given(
    at=st.integers(0, 120),
    height=st.integers(1, 60),
    total=st.integers(1, 150),
    cuts=st.lists(st.integers(0, 150), max_size=5),
    columns=st.sampled_from([1, 5, 20_000]),
)
def test_a_delta_of_some_rows_lands_there_and_nowhere_else(
    at: int, height: int, total: int, cuts: list[int], columns: int
) -> None:
    """A stack's experts, and the halves of a fused tensor, begin anywhere, and blocks cut them anywhere."""
    total = max(total, at + height)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, columns)).astype("f4"), rng.standard_normal((height, 3)).astype("f4")
    delta = Delta.of(a, b, 0.5, transposed=False, at=at)
    weight = rng.standard_normal((total, columns)).astype("f4")
    expected = weight.copy()
    Delta.of(a, b, 0.5, transposed=False).add_to(
        expected[at : at + height], 0, np.empty((panel_rows(columns), columns), "f4")
    )
    for start, stop in pairwise(sorted({0, total, *(c for c in cuts if c < total)})):
        delta.add_to(weight[start:stop], start, np.empty((panel_rows(columns), columns), "f4"))
    assert np.array_equal(weight, expected)


def test_a_stack_is_walked_in_rows_of_its_matrices() -> None:
    """A row of (experts, out, in) would be a whole expert, and a block 16 of them."""
    stored = StoredTensor("experts.down_proj", "BF16", (64, 2048, 768), Path("x"), 0, 64 * 2048 * 768 * 2)
    tensor = OutputTensor(stored.name, "F16", stored)
    assert tensor.matrix == (64 * 2048, 768)
    assert panel_rows(tensor.matrix[1]) * 768 * 4 <= 1 << 20
    assert replace(tensor, source=replace(stored, shape=(5,))).matrix == (5, 1)
    assert replace(tensor, source=replace(stored, shape=())).matrix == (1, 1)
    assert replace(tensor, source=replace(stored, shape=(3, 0))).matrix == (1, 1)
