"""A second device where there is none: torch tensors that report the device `elsewhere`, their numbers on the CPU.

As on a GPU, an operation on tensors of both devices fails; only a copy goes from one to the other. Registering a
device is for good, so this is a program:

    python -m tests.operations.second_device ADAPTER BASE TEXT OUT

calibrates on it, wide layers by sketches, and saves the statistics.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prolora_tools.operations import calibrate as operation

if TYPE_CHECKING:
    from collections.abc import Callable

SETTINGS: dict[str, Any] = {"outputs": True, "tokens": 512, "length": 64, "batch": 4}
DENSE, ROWS = 300, 8
NAME = "elsewhere"
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Elsewhere(torch.Tensor):
    """A tensor on the second device."""

    held: torch.Tensor

    @classmethod
    def of(cls, held: torch.Tensor) -> Elsewhere:
        """The tensor `held`, as one of the device."""
        out: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        out.held = held
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override] # no cls in the stub
        return _run(func, args, kwargs or {})


class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's own
    """Sees what is called with a device and no tensor of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU, and its results on the device that was asked for, or that the tensors are on."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if isinstance(x, Elsewhere)]
    foreign = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]  # a number may come from anywhere
    if here and foreign and function not in _COPIES:
        raise RuntimeError(f"{function}: tensors on two devices")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if function is torch.ops.aten.copy_.default:
        asked = args[0].device
    stays = bool(here) if asked is None else torch.device(asked).type == NAME
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, Elsewhere) else x, (args, kwargs))

    def placed(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not stays:
            return x
        own = next((y for y in here if y.held is x), None)  # of an operation in place
        return Elsewhere.of(x) if own is None else own

    return tree_map(placed, function(*args, **kwargs))


class _Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Asked by transformers, which switches autocasting off."""
        return [torch.float16]


def main() -> None:
    adapter, base, text, out = map(Path, sys.argv[1:])
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(list, device=...) then copies through the dispatch
    operation.DENSE, operation.ROWS = DENSE, ROWS
    with Dispatch():  # type: ignore[no-untyped-call] # torch's own
        operation.calibrate(adapter, base=base, text=text, device=NAME, **SETTINGS).save(out)


if __name__ == "__main__":
    main()
