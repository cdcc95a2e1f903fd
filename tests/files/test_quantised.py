"""Quantised weights as floats: every bit as bitsandbytes and transformers have it, in whole and by any rows."""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from prolora_tools.errors import InputError, ProloraError, UnsupportedError
from prolora_tools.files.quantised import QuantisedTensor, open_base
from prolora_tools.files.stream import Files

with warnings.catch_warnings():  # what it says on import about kernels that are not installed
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

NAME = "model.layers.0.self_attn.q_proj.weight"
SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
BNB = {"quant_method": "bitsandbytes"}
FP8 = {"quant_method": "fp8"}
HALF = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _no_compiler() -> Any:
    """bitsandbytes compiles its kernel for odd rows where it can; the plain one gives the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def folder_of(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config, **more}))
    return folder


def weight_of(folder: Path, name: str = NAME) -> QuantisedTensor:
    base = open_base(folder)
    assert list(base.tensors) == [name]
    found = base.tensors[name]
    assert isinstance(found, QuantisedTensor)
    return found


def equal(found: Any, expected: torch.Tensor) -> bool:
    """Whether all bits are, except that a zero has no sign."""
    return torch.equal(torch.from_numpy(np.array(found)), expected.float())


def rows(tensor: QuantisedTensor, start: int, stop: int, dtype: Any = np.float32) -> Any:
    """Rows of the weight taken as a matrix with all dims but the last as rows."""
    columns = tensor.shape[-1]
    out = np.full((stop - start) * columns, 7, dtype=dtype)
    with Files() as files:
        tensor.read_items(files, start * columns, out)
    return out.reshape(-1, columns)


def four_bit(weight: torch.Tensor, **how: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight as transformers stores it, and bitsandbytes' dequantisation of it.

    The weight is dequantised as one long row: with AVX-512, bitsandbytes 0.50 gives wrong numbers for rows that are no
    multiple of the block size, since it begins a new block with each row there, and quantises without.
    """
    packed, state = bnb.quantize_4bit(weight, **how)
    tensors = {NAME: packed, **{f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}}
    shape, state.shape = state.shape, torch.Size((weight.numel(),))
    flat = bnb.dequantize_4bit(packed, state)
    state.shape = shape
    if weight.shape[-1] % state.blocksize == 0:
        assert torch.equal(flat.reshape(shape), bnb.dequantize_4bit(packed, state))
    return tensors, flat.reshape(shape)


@SETTINGS
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 200)),
    block=st.sampled_from([32, 64, 128, 2048]),
    kind=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
    dtype=st.sampled_from(HALF),
    seed=st.integers(0, 2**31),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_four_bits_are_those_of_bitsandbytes(
    shape: tuple[int, int], block: int, kind: str, nested: bool, dtype: torch.dtype, seed: int,
    span: tuple[float, float], tmp_path: Path,
) -> None:  # fmt: skip
    """Odd sizes, blocks that end anywhere in rows, rows that begin inside a byte."""
    draw = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=draw) * torch.rand(shape[0], 1, generator=draw) * 3).to(dtype)
    tensors, expected = four_bit(weight, blocksize=block, quant_type=kind, compress_statistics=nested)
    found = weight_of(folder_of(tmp_path / "base", tensors, BNB))
    assert (found.shape, found.dtype) == (shape, "BF16")
    assert equal(found.read(), expected)
    start = int(span[0] * (shape[0] - 1))
    stop = start + 1 + int(span[1] * (shape[0] - start - 1))
    assert equal(rows(found, start, stop), expected[start:stop])


def test_four_bits_with_many_blocks_of_scales(tmp_path: Path) -> None:
    """Double quantisation has blocks of 256 scales: this weight has 300."""
    tensors, expected = four_bit(torch.randn(300, 64).bfloat16(), quant_type="nf4", compress_statistics=True)
    assert tensors[f"{NAME}.nested_absmax"].numel() == 2
    found = weight_of(folder_of(tmp_path / "base", tensors, BNB))
    assert equal(found.read(), expected)
    assert equal(rows(found, 250, 290), expected[250:290])
    assert equal(rows(found, 250, 290, np.float64), expected[250:290])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_four_bits_may_be_stored_as_another_dtype(storage: torch.dtype, tmp_path: Path) -> None:
    """quant_storage, which FSDP asks for: the same bytes under the name of a float dtype."""
    tensors, expected = four_bit(torch.randn(6, 64).bfloat16(), quant_type="nf4", quant_storage=storage)
    assert equal(weight_of(folder_of(tmp_path / "base", tensors, BNB)).read(), expected)


@SETTINGS
@given(shape=st.tuples(st.integers(1, 20), st.integers(1, 40)), seed=st.integers(0, 2**31), start=st.floats(0, 1))
def test_int8_is_that_of_bitsandbytes(shape: tuple[int, int], seed: int, start: float, tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
    scales = torch.rand(shape[0], generator=draw) * 3
    path = NAME.removesuffix(".weight")
    tensors = {NAME: packed, f"{path}.SCB": scales, f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8)}
    found = weight_of(folder_of(tmp_path / "base", tensors, BNB, dtype="float16"))
    expected = bnb.int8_vectorwise_dequant(packed, scales)
    assert (found.shape, found.dtype) == (shape, "F16")
    assert equal(found.read(), expected)
    first = int(start * (shape[0] - 1))
    assert equal(rows(found, first, shape[0]), expected[first:])


def fp8(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Any finite numbers of the dtype."""
    draw = torch.Generator().manual_seed(seed)
    byte = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    values = byte.view(dtype)
    return torch.where(values.float().isfinite(), byte, 0).view(dtype)


def spread(scales: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """A scale for each number, blocks cut off at the edges."""
    wide = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


@SETTINGS
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    block=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    experts=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    scale=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
    span=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_fp8_blocks(
    shape: tuple[int, int], block: tuple[int, int], experts: int, dtype: torch.dtype, scale: torch.dtype, seed: int,
    span: tuple[float, float], tmp_path: Path,
) -> None:  # fmt: skip
    """Blocks that the sides are no multiples of, experts stacked in one tensor, any span of rows."""
    above = (experts,) if experts else ()
    grid = tuple(-(-side // b) for side, b in zip(shape, block, strict=True))
    weight = fp8(*above, *shape, seed=seed, dtype=dtype)
    scales = (torch.rand(*above, *grid, generator=torch.Generator().manual_seed(seed)) + 0.1).to(scale)
    tensors = {NAME: weight, f"{NAME}_scale_inv": scales}
    found = weight_of(folder_of(tmp_path / "base", tensors, {**FP8, "weight_block_size": list(block)}))
    expected = weight.float() * spread(scales, shape, block)
    assert found.shape == (*above, *shape)
    assert equal(found.read(), expected)
    flat = expected.reshape(-1, shape[1])
    start = int(span[0] * (len(flat) - 1))
    stop = start + 1 + int(span[1] * (len(flat) - start - 1))
    assert equal(rows(found, start, stop), flat[start:stop])


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu, torch.uint8])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_fp8_is_that_of_transformers(
    out: torch.dtype, kind: torch.dtype, experts: tuple[int, ...], tmp_path: Path
) -> None:
    """Its own Fp8Dequantize, which rounds to the output's dtype."""
    weight, draw = fp8(*experts, 256, 384), torch.Generator().manual_seed(1)
    exponents = torch.randint(110, 135, (*experts, 2, 3), generator=draw, dtype=torch.uint8)
    powers = exponents if kind is torch.uint8 else exponents.view(torch.float8_e8m0fnu)
    small = not kind.is_floating_point or kind.itemsize == 1
    scales = powers if small else torch.rand(*experts, 2, 3, generator=draw).to(kind)
    tensors = {NAME: weight, f"{NAME}_scale_inv": scales}
    found = weight_of(folder_of(tmp_path / "base", tensors, {**FP8, "weight_block_size": [128, 128]}))
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=out)
    assert torch.equal(torch.from_numpy(found.read()).to(out), expected)


def test_blocks_at_the_edge_have_the_size_that_the_config_says(tmp_path: Path) -> None:
    """200 rows in 2 blocks are 128 and 72 for the kernels, not 100 and 100."""
    weight, scales = fp8(200, 130), torch.rand(2, 2) + 0.5
    tensors = {NAME: weight, f"{NAME}_scale_inv": scales}
    for config in ({**FP8, "weight_block_size": [128, 128]}, FP8):
        found = weight_of(folder_of(tmp_path / "base", tensors, config))
        assert equal(found.read(), weight.float() * spread(scales, (200, 130), (128, 128)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (130,), (130, 1), (1, 140)])
@pytest.mark.parametrize("method", ["fp8", "fbgemm_fp8", "compressed-tensors"])
def test_one_scale_for_all_or_for_a_row_or_a_column(shape: tuple[int, ...], method: str, tmp_path: Path) -> None:
    weight, scales = fp8(130, 140), torch.rand(shape) + 0.5
    form = {"format": "float-quantized"} if method == "compressed-tensors" else {}
    scaled = {NAME: weight, f"{NAME}_scale": scales, NAME.replace("weight", "input_scale"): torch.rand(1)}
    found = weight_of(folder_of(tmp_path / "base", scaled, {"quant_method": method, **form}))
    expected = weight.float() * (scales[:, None] if shape == (130,) else scales)
    assert equal(found.read(), expected)
    assert equal(rows(found, 3, 130), expected[3:])


def test_fp8_without_a_scale_stays(tmp_path: Path) -> None:
    plain = fp8(4, 4)
    tensors = {NAME: plain, f"{NAME}_scale_inv": torch.ones(1, 1), "other.weight": plain.clone()}
    base = open_base(folder_of(tmp_path / "base", tensors, FP8))
    assert base.tensors["other.weight"].dtype == "F8_E4M3"
    assert not isinstance(base.tensors["other.weight"], QuantisedTensor)
    assert not isinstance(
        open_base(folder_of(tmp_path / "plain", {NAME: plain}, {}, dtype="bfloat16")).tensors[NAME], QuantisedTensor
    )


def test_without_a_quantisation_in_the_config_nothing_is_taken_for_quantised(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", {NAME: fp8(4, 4), f"{NAME}_scale_inv": torch.ones(1, 1)}, {})
    assert sorted(open_base(folder).tensors) == [NAME, f"{NAME}_scale_inv"]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, "BF16"),
        ({"dtype": "float16"}, "F16"),
        ({"torch_dtype": "float32"}, "F32"),
        ({"text_config": {"dtype": "float16"}}, "F16"),
        ({"dtype": "auto"}, "BF16"),
        ({"dtype": None, "torch_dtype": "float16"}, "F16"),
    ],
)
def test_the_config_gives_the_dtype(more: dict[str, Any], expected: str, tmp_path: Path) -> None:
    tensors, _ = four_bit(torch.randn(4, 64).bfloat16(), quant_type="nf4")
    assert weight_of(folder_of(tmp_path / "base", tensors, BNB, **more)).dtype == expected


def test_the_quantisation_may_stand_in_the_text_config(tmp_path: Path) -> None:
    tensors, expected = four_bit(torch.randn(4, 64).bfloat16(), quant_type="nf4")
    folder = folder_of(tmp_path / "base", tensors, {}, text_config={"quantization_config": BNB})
    assert equal(weight_of(folder).read(), expected)


def broken(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A double-quantised weight of 300 rows with one of its tensors replaced, or left out."""
    tensors, _ = four_bit(torch.ones(300, 64).bfloat16(), quant_type="nf4", compress_statistics=True)
    others = {k: v for k, v in tensors.items() if k != name}
    return others if value is None else {**others, name: value}


STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (STATE, None),
        (STATE, torch.zeros(40, dtype=torch.uint8)),
        (STATE, torch.tensor(list(b'{"shape": [300, 64]}'), dtype=torch.uint8)),
        (f"{NAME}.absmax", None),
        (f"{NAME}.absmax", torch.zeros(299, dtype=torch.uint8)),
        (f"{NAME}.absmax", torch.zeros(300)),
        (f"{NAME}.quant_map", torch.zeros(15)),
        (f"{NAME}.nested_absmax", None),
        (f"{NAME}.nested_absmax", torch.zeros(1)),
        (f"{NAME}.nested_quant_map", torch.zeros(16)),
        (NAME, None),
        (NAME, torch.zeros(9601, 1, dtype=torch.uint8)),
    ],
)
def test_parts_that_do_not_fit_are_named(name: str, value: torch.Tensor | None, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_base(folder_of(tmp_path / "base", broken(name, value), BNB))
    assert caught.value.code == "base-quantised-tensor"


@pytest.mark.parametrize(
    "told",
    [
        {"shape": None}, {"shape": [-300, -64]}, {"shape": [300.0, 64]}, {"blocksize": 0}, {"blocksize": "64"},
        {"blocksize": 63}, {"dtype": "float8"}, {"quant_type": "int4"}, {"nested_blocksize": 0},
        {"nested_offset": None},
    ],
)  # fmt: skip
def test_a_quant_state_that_makes_no_sense(told: dict[str, Any], tmp_path: Path) -> None:
    tensors = broken("", torch.ones(1))
    state = {**json.loads(bytes(tensors[STATE].tolist())), **told}
    tensors = {**tensors, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}
    with pytest.raises(InputError) as caught:
        open_base(folder_of(tmp_path / "base", tensors, BNB))
    assert caught.value.code == "base-quantised-tensor"


def test_other_layouts_of_int8_are_refused(tmp_path: Path) -> None:
    path = NAME.removesuffix(".weight")
    good = {NAME: torch.ones(4, 8, dtype=torch.int8), f"{path}.SCB": torch.ones(4)}
    weight_of(folder_of(tmp_path / "base", good, BNB))
    for other in (
        {**good, f"{path}.weight_format": torch.tensor(2, dtype=torch.uint8)},
        {**good, f"{path}.SCB": torch.ones(8)},
        {**good, NAME: torch.ones(4, 8)},
        {NAME: good[NAME]},
        {f"{path}.SCB": torch.ones(4)},
    ):
        with pytest.raises(InputError) as caught:
            open_base(folder_of(tmp_path / "base", other, BNB))
        assert caught.value.code == "base-quantised-tensor"


@pytest.mark.parametrize(
    "scales",
    [torch.ones(3), torch.ones(2, 3), torch.ones(201, 2), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int32)],
)
def test_scales_that_do_not_fit_are_refused(scales: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_base(folder_of(tmp_path / "base", {NAME: fp8(200, 130), f"{NAME}_scale_inv": scales}, FP8))
    assert caught.value.code == "base-quantised-tensor"


def test_scales_of_what_is_not_fp8_are_refused(tmp_path: Path) -> None:
    for tensors in (
        {NAME: torch.ones(4, 4, dtype=torch.int8), f"{NAME}_scale_inv": torch.ones(1)},
        {NAME: torch.ones(4, 4, dtype=torch.int8), f"{NAME}_scale": torch.ones(1)},
        {f"{NAME}_packed": torch.ones(4, 4, dtype=torch.int8)},
    ):
        with pytest.raises(InputError) as caught:
            open_base(folder_of(tmp_path / "base", tensors, FP8))
        assert caught.value.code == "base-quantised-tensor"


@pytest.mark.parametrize(
    "config",
    [
        *(
            {"quant_method": m}
            for m in ("gptq", "awq", "hqq", "aqlm", "eetq", "quanto", "torchao", "mxfp4", "modelopt")
        ),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": ["bitsandbytes"]},
        {"bits": 4},
        "int8",
    ],
)
def test_other_kinds_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", {NAME: torch.ones(4, 4)}, config)
    with pytest.raises(UnsupportedError) as caught:
        open_base(folder)
    assert caught.value.code == "base-quantised"
    told = config if isinstance(config, str) else config.get("format") or config.get("quant_method", "unknown")
    assert str(told) in caught.value.message


@SETTINGS
@given(data=st.data())
def test_damaged_quant_states_are_typed_errors(data: st.DataObject, tmp_path: Path) -> None:
    """Any byte of a quant_state changed: another state that fits, or a typed error, nothing else."""
    tensors, _ = four_bit(torch.linspace(-1, 2, 192).reshape(3, 64), quant_type="nf4", compress_statistics=True)
    state = tensors[STATE].clone()
    state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    folder = folder_of(tmp_path / "base", {**tensors, STATE: state}, BNB)
    try:
        found = weight_of(folder)
    except ProloraError as error:
        assert error.code == "base-quantised-tensor"  # noqa: PT017 - both outcomes are right
    else:
        assert math.prod(found.shape) == found.read().size
