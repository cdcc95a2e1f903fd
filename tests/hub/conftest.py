"""A loopback Hub for every test here, and real folders to push."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from .server import Hub

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as running:
        yield running
    assert not [r for r in running.requests if r.origin == "cdn" and r.authorization], "a token reached the CDN"
