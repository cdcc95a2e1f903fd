"""Tiny random models, and PEFT's own warning under transformers 5.23 kept out of warnings-as-errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent
# tests/oracles is imported as tests.oracles; appended, so that tests/peft cannot shadow the peft package.
sys.path.append(str(HERE.parents[1]))

from tests.peft import models  # noqa: E402 - only after the path is set


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PEFT asks transformers for a property that transformers 5.23 deprecates."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
            )


@pytest.fixture
def tokens() -> torch.Tensor:
    """A batch of two samples."""
    return torch.randint(0, models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["llama", "gpt2", "bert"])
def make_base(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A maker of the same tiny model, for each architecture."""
    maker: Callable[[], Any] = models.MAKERS[request.param]
    return maker
