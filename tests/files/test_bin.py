"""Pickled adapters: what torch.save makes of every kind of state dict, and nothing that is not one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from prolora_tools.errors import InputError
from prolora_tools.files.adapter import Adapter
from tests.failing import build

if TYPE_CHECKING:
    from pathlib import Path

A, B = (f"base_model.model.{name}" for name in build.factors())


def opened(folder: Path, state: object, *, zipped: bool = True) -> Adapter:
    build.write(folder, build.with_bin(b""))
    torch.save(state, folder / "adapter/adapter_model.bin", _use_new_zipfile_serialization=zipped)
    return Adapter.open(folder / "adapter")


def pair() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {A: torch.randn(2, 4, generator=generator), B: torch.randn(4, 2, generator=generator)}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_those_that_were_saved(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    state = {k: t.to(dtype) for k, t in pair().items()}
    a, b = opened(tmp_path, state, zipped=zipped).modules[build.Q].factors()
    assert torch.equal(torch.from_numpy(a.copy()).to(dtype), state[A])
    assert torch.equal(torch.from_numpy(b.copy()).to(dtype), state[B])


def test_parameters_and_views_are_read(tmp_path: Path) -> None:
    """Parameters that require a gradient, a transposed view, and a slice of a larger storage."""
    plain = pair()
    state = {A: nn.Parameter(plain[A]), B: plain[B].T.contiguous().T}
    a, b = opened(tmp_path, state).modules[build.Q].factors()
    assert torch.equal(torch.from_numpy(a.copy()), plain[A])
    assert torch.equal(torch.from_numpy(b.copy()), plain[B])
    large = torch.arange(64.0).reshape(8, 8)
    a, _ = opened(tmp_path, {**plain, A: large[2:4, 1:5]}).modules[build.Q].factors()
    assert a.tolist() == large[2:4, 1:5].tolist()


def test_a_scalar_is_an_error_of_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, {**pair(), A: torch.tensor(1.0)})
    assert caught.value.code == "adapter-shape"


@pytest.mark.parametrize(
    "odd",
    [
        torch.ones(2, 4, dtype=torch.int64),
        torch.ones(2, 4).to_sparse(),
        torch.ones(2, 4, dtype=torch.complex64),
        [1.0],
        None,
        "text",
    ],
)
def test_other_entries_are_refused(odd: object, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, {**pair(), A: odd})
    assert caught.value.code == "bin-content"


def test_other_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, {0: torch.ones(2, 4)})
    assert caught.value.code == "bin-content"


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        opened(tmp_path, nn.Linear(2, 2))
    assert caught.value.code == "bin-unreadable"
    assert "arbitrary code" not in caught.value.message  # torch's advice to load it all the same


def test_safetensors_wins_and_says_so(tmp_path: Path) -> None:
    build.write(tmp_path, {**build.adapter(), **build.with_bin(b"not read")})
    adapter = Adapter.open(tmp_path / "adapter")
    assert adapter.file.name == "adapter_model.safetensors"
    assert adapter.notes == ("adapter_model.bin is there too and was not read; adapter_model.safetensors was",)
