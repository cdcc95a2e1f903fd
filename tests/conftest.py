"""Set before anything imports huggingface_hub: no test may ask a real hub. tests/hub/ runs its own, in subprocesses."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@pytest.fixture
def plain_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No colours, no tracebacks, and the signal handler that the command line sets put back."""
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PROLORA_TOOLS_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
