"""Output tensors made block by block: read rows, add the adapters' part, round once, in buffers that are reused."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.core.merging import Delta, column_norms, panel_rows, row_norms
from prolora_tools.errors import InputError
from prolora_tools.files import dtypes
from prolora_tools.files.quantised import QuantisedTensor
from prolora_tools.files.tensors import check_finite

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from prolora_tools.files.adapter import AdapterModule
    from prolora_tools.files.dtypes import Floats
    from prolora_tools.files.stream import Files
    from prolora_tools.files.tensors import StoredTensor
    from prolora_tools.operations.merge_plan import OutputTensor, Update


KEPT = 3
"""Modules of experts whose factors are kept: gate, up and down of the layer at work."""


class Blocks:
    """Makes output tensors block by block. Safe to use from several threads: each has its own buffers.

    Args:
        files: open files.
        rows: rows in one block; None takes a panel's, so that a block and its scratch stay in the cache.
        allow_nonfinite: let inf and nan pass.
    """

    def __init__(self, files: Files, rows: int | None = None, *, allow_nonfinite: bool = False) -> None:
        self.files, self.rows, self.allow_nonfinite = files, rows, allow_nonfinite
        self._buffers = threading.local()
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[Floats, Floats]] = {}

    def rows_of(self, tensor: OutputTensor) -> int:
        """Rows in one block."""
        return self.rows or panel_rows(tensor.matrix[1])

    def __call__(
        self, tensor: OutputTensor, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """The rows from `start` to `stop` of a tensor that is not a plain copy, as they are stored.

        Yields:
            (first row, carrier array (rows, columns) of the output dtype); the array is reused by the next step.

        Raises:
            InputError: the adapter or the result holds inf or nan.
        """
        rows, columns = tensor.matrix
        made = self._made(tensor)
        item = dtypes.ITEM_BITS[tensor.dtype] // 8
        for at, weight in self._weights(tensor, made, start, rows if stop is None else stop):
            out = self._buffer("out", weight.size * item)
            carrier, finite = dtypes.encode_into(weight.reshape(-1), tensor.dtype, out)
            carrier = carrier.reshape(-1, columns)
            if not finite and not self.allow_nonfinite:
                self._explain(tensor, at, weight, carrier)
            yield at, carrier

    def _explain(self, tensor: OutputTensor, at: int, weight: Floats, carrier: npt.NDArray[Any]) -> None:
        """Raises InputError; a base's own inf that no adapter touches is its own business."""
        bad = ~np.isfinite(dtypes.decode(carrier.tobytes(), tensor.dtype).reshape(weight.shape))
        if not tensor.changed:
            bad &= np.isfinite(weight)
            if not bad.any():
                return
        raise InputError(
            "merge-not-finite",
            f"{tensor.source.file}: {tensor.name!r} would hold inf or nan after the merge, first in row "
            f"{at + int(bad.any(axis=1).argmax())}",
            hint="the base or the adapter's own weight holds such a value, or the sum overflows the dtype: "
            "try --dtype float32, or --allow-nonfinite",
        )

    def _buffer(self, name: str, n_bytes: int) -> npt.NDArray[np.uint8]:
        """This thread's buffer of that name, at least 64-byte aligned, grown when it is too small."""
        held: npt.NDArray[np.uint8] | None = getattr(self._buffers, name, None)
        if held is None or len(held) < n_bytes:
            raw = np.empty(n_bytes + 64, dtype=np.uint8)
            held = raw[-raw.ctypes.data % 64 :]
            setattr(self._buffers, name, held)
        return held[:n_bytes]

    def _made(self, tensor: OutputTensor) -> _Parts:
        """Read what the adapters give to a tensor."""
        tokens = magnitude = None
        if tensor.tokens is not None:
            tokens = tensor.tokens.stored.read()
            check_finite(tokens, tensor.tokens.stored)
        parts = _Parts(
            tuple(self._delta(update, transposed=tensor.transposed) for update in tensor.updates),
            tuple(u.module.read("bias") * np.float32(u.scaling) for u in tensor.biases),
            tokens,
        )
        if any(update.module.dora for update in tensor.updates):
            magnitude = tensor.updates[0].module.read("magnitude").reshape(-1)
        if magnitude is None or not tensor.transposed:
            return replace(parts, magnitude=magnitude)
        # Stored (in, out), the norm of an output runs down a column: a pass of its own over the weight.
        walk = (weight for _, weight in self._weights(tensor, parts, 0, tensor.matrix[0]))
        with np.errstate(all="ignore"):
            return replace(parts, column_factor=magnitude / column_norms(walk, tensor.matrix[1]))

    def _delta(self, update: Update, *, transposed: bool) -> Delta:
        module = update.module
        if module.experts == 1:
            a, b = module.factors()
        else:
            a, b = self._expert_factors(module)
            a, b = a[update.expert], b[update.expert]
        b = b[update.first :][: update.rows]
        return Delta.of(a, b, update.scaling, transposed=transposed, at=update.at)

    def _expert_factors(self, module: AdapterModule) -> tuple[Floats, Floats]:
        """A (experts, r, in) and B (experts, out, r); those of the last modules asked for are kept.

        The experts of a layer are tensors of their own in most checkpoints, and each needs its part of one factor.
        """
        with self._lock:
            if module.weight_name not in self._kept:
                while len(self._kept) >= KEPT:
                    self._kept.pop(next(iter(self._kept)))
                self._kept[module.weight_name] = module.expert_factors()
            return self._kept[module.weight_name]

    def _read(self, source: StoredTensor, begin: int, values: Floats) -> Floats:
        """The source's numbers from flat index `begin` on, in `values` or in a buffer of their bytes."""
        if isinstance(source, QuantisedTensor):
            source.read_items(self.files, begin, values)
            return values
        size = dtypes.ITEM_BITS[source.dtype] // 8
        raw = self._buffer("raw", values.size * size)
        self.files.read_into(source, begin * size, raw)
        return dtypes.decode_into(raw, source.dtype, values)

    def _weights(self, tensor: OutputTensor, parts: _Parts, start: int, stop: int) -> Iterator[tuple[int, Floats]]:
        """The block's values before rounding, float32 (float64 for an F64 source)."""
        _, columns = tensor.matrix
        step, source, wide = self.rows_of(tensor), tensor.source, np.dtype(_wide(tensor))
        replaced = {row: i for i, row in enumerate(tensor.tokens.indices)} if tensor.tokens else {}
        for at in range(start, stop, step):
            n = min(step, stop - at)
            values = self._buffer("weight", n * columns * wide.itemsize).view(wide)
            weight = self._read(source, at * columns, values).reshape(n, columns)
            with np.errstate(all="ignore"):  # what is not finite is an error of its own, told by __call__
                if parts.deltas:
                    high = panel_rows(columns)
                    scratch = self._buffer("scratch", high * columns * wide.itemsize).view(wide).reshape(high, columns)
                    for delta in parts.deltas:
                        delta.add_to(weight, at, scratch)
                if parts.column_factor is not None:
                    weight *= parts.column_factor
                elif parts.magnitude is not None:
                    weight *= (parts.magnitude[at : at + n] / row_norms(weight))[:, None]
                for bias in parts.biases:
                    weight += bias[at : at + n, None]
            for row in range(at, at + n) if replaced else ():
                if row in replaced and parts.tokens is not None:
                    weight[row - at] = parts.tokens[replaced[row]]
            yield at, weight


def _wide(tensor: OutputTensor) -> type[np.floating[Any]]:
    """The dtype that sums are made in."""
    return np.float64 if tensor.source.dtype == "F64" else np.float32


@dataclass(frozen=True)
class _Parts:
    """What the adapters give to one tensor, read."""

    deltas: tuple[Delta, ...]
    biases: tuple[Floats, ...]
    tokens: Floats | None
    magnitude: Floats | None = None
    column_factor: Floats | None = None
