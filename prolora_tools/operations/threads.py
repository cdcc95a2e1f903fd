"""How work is shared out: our threads over tensors and modules, one BLAS thread in each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def one_blas_thread() -> AbstractContextManager[object]:
    """Our work is many small products: one BLAS thread each, and our threads over tensors."""
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - not needed to plan

    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
