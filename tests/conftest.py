"""Set before anything imports huggingface_hub: no test may ask a real hub. tests/hub/ runs its own, in subprocesses."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
