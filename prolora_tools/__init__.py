"""Compress trained LoRA adapters into PRoLoRA form, expand and merge them, and tell the error.

Importing the package costs nothing: every name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prolora_tools.core.geometry import Geometry
    from prolora_tools.errors import ProloraError
    from prolora_tools.files.adapter import Adapter
    from prolora_tools.operations.calibrate import Statistics, calibrate
    from prolora_tools.operations.compress import compress
    from prolora_tools.operations.convert_official import convert_official
    from prolora_tools.operations.diff import diff
    from prolora_tools.operations.expand import expand
    from prolora_tools.operations.merge import merge
    from prolora_tools.operations.plan import plan
    from prolora_tools.operations.stats import stats
    from prolora_tools.operations.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "files.adapter",
    "Geometry": "core.geometry",
    "ProloraError": "errors",
    "Statistics": "operations.calibrate",
    "calibrate": "operations.calibrate",
    "compress": "operations.compress",
    "convert_official": "operations.convert_official",
    "diff": "operations.diff",
    "expand": "operations.expand",
    "merge": "operations.merge",
    "plan": "operations.plan",
    "stats": "operations.stats",
    "verify": "operations.verify",
}

__all__ = [
    "Adapter",
    "Geometry",
    "ProloraError",
    "Statistics",
    "calibrate",
    "compress",
    "convert_official",
    "diff",
    "expand",
    "merge",
    "plan",
    "stats",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
