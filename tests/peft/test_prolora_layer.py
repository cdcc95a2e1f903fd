"""The layer against the loop oracle: values, gradients, initialisation, merging."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.pytorch_utils import Conv1D

from prolora_tools.core.budget import LinearShape, prolora_parameters
from prolora_tools.core.geometry import Geometry
from prolora_tools.core.sharing import expand
from prolora_tools.errors import InputError, RequestError, UnsupportedError
from prolora_tools.peft import ProLoraConfig, ProLoraLinear
from prolora_tools.peft.layer import gather_rows, lay_out, layer_class
from tests.oracles import prolora as oracle
from tests.peft.models import backward

if TYPE_CHECKING:
    from collections.abc import Callable

FACTORS = ("prolora_A", "prolora_B", "prolora_A_unshared", "prolora_B_unshared")


def build(
    geometry: Geometry, in_features: int, out_features: int, *, base: nn.Module | None = None, **options: Any
) -> ProLoraLinear:
    options.setdefault("init_prolora_weights", False)
    base = base or nn.Linear(in_features, out_features)
    config = ProLoraConfig(r=geometry.rank, **options)
    return ProLoraLinear(base, "default", geometry=geometry, alpha=config.lora_alpha, config=config).eval()


def stored(layer: ProLoraLinear, adapter: str = "default") -> list[nn.Parameter]:
    return [getattr(layer, name)[adapter] for name in FACTORS]


def weight(layer: ProLoraLinear) -> torch.Tensor:
    found: torch.Tensor = layer.get_base_layer().weight
    return found


def oracle_factors(layer: ProLoraLinear, parts: list[Any]) -> tuple[list[Any], list[Any]]:
    """A and B by loops; strides by the official rule, written out again in the oracle."""
    g = layer.geometry["default"]
    a, b, a_unshared, b_unshared = parts
    strides = [
        oracle.stride(g.shared, m) if s is None else s for m, s in ((g.chunks_a, g.stride_a), (g.chunks_b, g.stride_b))
    ]
    full_a = oracle.full_a(
        a,
        a_unshared,
        ranks=g.shared,
        rank_unshared=g.unshared,
        dim=layer.in_features,
        chunks=g.chunks_a,
        step=strides[0],
    )
    full_b = oracle.full_b(
        b,
        b_unshared,
        ranks=g.shared,
        rank_unshared=g.unshared,
        dim=layer.out_features,
        chunks=g.chunks_b,
        step=strides[1],
    )
    return full_a, full_b


class Case(NamedTuple):
    geometry: Geometry
    in_features: int
    out_features: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 5))
    stride = st.none() | st.integers(0, 6)
    geometry = Geometry(
        rank, draw(st.integers(0, rank)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(stride), draw(stride)
    )
    return Case(geometry, draw(st.integers(1, 13)), draw(st.integers(1, 13)))


@given(cases())
@settings(max_examples=60, deadline=None)
def test_delta_and_forward_equal_the_loops(case: Case) -> None:
    layer = build(*case)
    full_a, full_b = oracle_factors(layer, [p.tolist() for p in stored(layer)])
    expected = torch.tensor(oracle.delta_weight(full_a, full_b, 8 / case.geometry.rank))
    torch.testing.assert_close(layer.get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)
    x = torch.randn(2, 3, case.in_features)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ expected.T, rtol=1e-5, atol=1e-5)


@given(cases())
@settings(max_examples=30, deadline=None)
def test_gradients_equal_autograd_through_the_loops(case: Case) -> None:
    layer = build(*case).double()
    x = torch.randn(3, case.in_features, dtype=torch.float64)
    weights = torch.randn(3, case.out_features, dtype=torch.float64)
    backward((layer(x) * weights).sum())
    copies = [p.detach().clone().requires_grad_() for p in stored(layer)]
    full_a, full_b = oracle_factors(layer, copies)
    delta = torch.stack([torch.stack(list(row)) for row in oracle.delta_weight(full_a, full_b, 8 / case.geometry.rank)])
    backward(((x @ delta.T) * weights).sum())
    for found, expected in zip(stored(layer), copies, strict=True):
        if expected.numel():
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_float32_gradients_are_within_1e_6_of_float64() -> None:
    """The issue's bound, at a size like that of a model's layer."""
    torch.manual_seed(0)
    layer = build(Geometry(8, 1, 7, 7), 96, 80)
    x, weights = torch.randn(16, 96), torch.randn(16, 80)
    backward((layer(x) * weights).sum())
    copies = [p.detach().double().requires_grad_() for p in stored(layer)]
    full_a, full_b = oracle_factors(layer, copies)
    a = torch.stack([torch.stack(list(row)) for row in full_a])
    b = torch.stack([torch.stack(list(row)) for row in full_b])
    backward(((x.double() @ a.T @ b.T) * weights.double()).sum())
    for found, expected in zip(stored(layer), copies, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert (found.grad - expected.grad).norm() <= 1e-6 * expected.grad.norm()


@given(cases())
@settings(max_examples=60, deadline=None)
def test_lay_out_is_expand(case: Case) -> None:
    side = case.geometry.a
    chunk = torch.randn(side.ranks, side.width(case.in_features))
    found = lay_out(chunk, gather_rows(side, case.in_features), case.in_features)
    assert np.array_equal(found.numpy(), expand(chunk.numpy(), side, case.in_features))


@pytest.mark.parametrize("unshared", [0, 1, 3])
def test_initial_values(unshared: int) -> None:
    """B is 0, so dW is 0; both parts of A are within, and fill, the bound of the WHOLE input dim."""
    layer = build(Geometry(3, unshared, 8, 8), 4096, 64, init_prolora_weights="rectified")
    assert not layer.get_delta_weight("default").any()
    for part in (layer.prolora_A["default"], layer.prolora_A_unshared["default"]):
        if part.numel():
            assert 0.95 / 64 < part.abs().max() <= 1 / 64
    assert not any(p.any() for p in (layer.prolora_B["default"], layer.prolora_B_unshared["default"]))


def test_the_unrectified_chunk_has_the_bound_of_its_own_width() -> None:
    layer = build(Geometry(3, 1, 16, 1), 4096, 64, init_prolora_weights="unrectified")
    assert 0.95 / 16 < layer.prolora_A["default"].abs().max() <= 1 / 16
    assert layer.prolora_A_unshared["default"].abs().max() <= 1 / 64
    assert not layer.get_delta_weight("default").any()


@given(cases())
@settings(max_examples=30, deadline=None)
def test_parameter_count_is_the_budgets(case: Case) -> None:
    layer = build(*case)
    shape = LinearShape("layer", case.in_features, case.out_features)
    assert sum(p.numel() for p in stored(layer)) == prolora_parameters([shape], case.geometry)


@pytest.mark.parametrize(
    "geometry", [Geometry(4, 4, 3, 3), Geometry(4, 0, 1, 1), Geometry(4, 1, 1, 1), Geometry(8, 1, 7, 7)]
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_gradients_are_bit_equal_to_peft_lora_on_the_expanded_factors(
    geometry: Geometry, dropout: float
) -> None:
    torch.manual_seed(0)
    base = nn.Linear(50, 40)
    ours = build(geometry, 50, 40, base=base, lora_dropout=dropout).train()
    theirs = LoraLinear(
        base, "default", config=LoraConfig(r=geometry.rank, lora_dropout=dropout), r=geometry.rank, lora_alpha=8
    )
    a, b = ours.factors("default")
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = a.detach().clone(), b.detach().clone()
    x, outputs = torch.randn(5, 7, 50), []
    for layer in (ours, theirs):
        torch.manual_seed(1)
        outputs.append(layer(x))
        backward(outputs[-1].square().sum())
    assert torch.equal(*outputs)
    assert torch.equal(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    if geometry.shared == 0:
        assert torch.equal(ours.prolora_A_unshared["default"].grad, theirs.lora_A["default"].weight.grad)
        assert torch.equal(ours.prolora_B_unshared["default"].grad, theirs.lora_B["default"].weight.grad)


def test_rslora_scales_with_the_root_of_the_total_rank() -> None:
    assert build(Geometry(4, 1, 2, 2), 8, 8, use_rslora=True).scaling["default"] == 8 / math.sqrt(4)
    assert build(Geometry(4, 1, 2, 2), 8, 8).scaling["default"] == 8 / 4


@pytest.mark.parametrize("make", [lambda: nn.Linear(10, 6), lambda: Conv1D(6, 10)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_merge_and_unmerge(make: Callable[[], nn.Module], *, safe: bool, bias: bool) -> None:
    layer = build(Geometry(4, 1, 3, 5), 10, 6, base=make(), lora_bias=bias)
    before = weight(layer).clone()
    x = torch.randn(3, 10)
    with torch.no_grad():
        expected = layer(x)
        assert not torch.allclose(expected, layer.base_layer(x), atol=1e-3)
        layer.merge(safe_merge=safe)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
        layer.unmerge()
        torch.testing.assert_close(weight(layer), before, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("safe", [True, False])
def test_merging_into_bfloat16_rounds_once(*, safe: bool) -> None:
    layer = build(Geometry(4, 1, 3, 5), 64, 48, base=nn.Linear(64, 48, dtype=torch.bfloat16))
    for name in FACTORS:
        getattr(layer, name)["default"] = getattr(layer, name)["default"].float()  # as PEFT does on load
    delta = layer.get_delta_weight("default")
    once = (weight(layer).float() + delta).bfloat16()
    assert not torch.equal(once, weight(layer) + delta.bfloat16())  # what rounding twice gives
    layer.merge(safe_merge=safe)
    assert torch.equal(weight(layer), once)


def test_safe_merge_leaves_the_base_alone_when_it_would_break() -> None:
    layer = build(Geometry(4, 1, 2, 2), 10, 6)
    layer.prolora_B["default"].data[0, 0] = torch.nan
    before = weight(layer).clone()
    with pytest.raises(InputError) as caught:
        layer.merge(safe_merge=True)
    assert caught.value.code == "peft-merge-not-finite"
    assert torch.equal(weight(layer), before)
    assert not layer.merged


def test_a_bias_needs_a_base_bias_to_merge_into() -> None:
    layer = build(Geometry(4, 1, 2, 2), 10, 6, base=nn.Linear(10, 6, bias=False), lora_bias=True)
    before = weight(layer).clone()
    for safe in (False, True):
        with pytest.raises(RequestError) as caught:
            layer.merge(safe_merge=safe)
        assert caught.value.code == "peft-merge-bias"
        assert torch.equal(weight(layer), before)


def test_unmerging_what_is_not_merged_warns() -> None:
    with pytest.warns(UserWarning, match="Already unmerged"):
        build(Geometry(4, 1, 2, 2), 10, 6).unmerge()


def test_other_layers_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError) as caught:
        layer_class(nn.Embedding(4, 4), "model.embed")
    assert caught.value.code == "peft-target-layer"
    assert "model.embed" in caught.value.message


OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, foreach=True),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True),
    lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
]


@pytest.mark.parametrize("geometry", [Geometry(4, 0, 3, 3), Geometry(4, 4, 3, 3), Geometry(4, 1, 3, 3)])
def test_factors_without_elements_are_saved_and_never_trained(geometry: Geometry) -> None:
    """When u is 0 or r, two factors are empty; torch's Adafactor, for one, divides by the number of elements."""
    layer = build(geometry, 10, 6).train().to(torch.float64)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert all(p.numel() for p in parameters)
    assert {f"{name}.default" for name in FACTORS} <= set(layer.state_dict())
    for make in OPTIMIZERS:
        optimizer = make(parameters)
        before = [p.detach().clone() for p in parameters]
        backward(layer(torch.randn(4, 10, dtype=torch.float64)).square().sum())
        assert torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        assert all(p.grad is not None for p in parameters)  # DistributedDataParallel waits for all
        optimizer.step()
        optimizer.zero_grad()
        assert all(torch.isfinite(p).all() for p in parameters)
        assert not any(torch.equal(p, q) for p, q in zip(parameters, before, strict=True))
