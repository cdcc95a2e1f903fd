"""Whether a merged folder is base + adapter: every tensor is recomputed, block by block, and compared."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.files import dtypes
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import Checkpoint
from prolora_tools.files.quantised import open_base, quantisation
from prolora_tools.files.stream import Files
from prolora_tools.operations.merge_blocks import Blocks
from prolora_tools.operations.merge_plan import MergePlan, OutputTensor, plan_of
from prolora_tools.operations.threads import cores, one_blas_thread
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import TensorProblem, VerifyReport

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from prolora_tools.files.tensors import StoredTensor

RTOL, ATOL = 1e-5, 1e-6
PIECE = 1 << 20
"""Bytes of an untouched tensor that are compared at once."""


def verify(
    merged: str | Path,
    *,
    base: str | Path,
    adapter: str | Path,
    more: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    scale: float = 1.0,
    ulps: int = 1,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> VerifyReport:
    """Check that every tensor of a merged model is base + delta, or the base's own bit for bit.

    A changed tensor may be `ulps` units in the last place off in bfloat16 and float16, and within rtol 1e-5 or
    atol 1e-6 in float32 and float64: products summed in another order round differently.

    Args:
        merged: the merged model's folder.
        base: the base's folder.
        adapter: the adapter's folder.
        more: folders of the other adapters that were merged with it.
        weights: what each adapter's deltas were multiplied with, the first adapter's first; none for 1 each.
        scale: what all of them were multiplied with besides.
        ulps: the tolerance in half precision.
        threads: None takes one a core.
        progress: told of bytes compared.

    Raises:
        RequestError: the weights are not one finite number for each adapter.
        InputError: one of the folders is missing or broken.
        UnsupportedError: a kind of adapter or base that is refused.
        MismatchError: adapter and base do not belong together.
    """
    adapters, checkpoint = [Adapter.open(Path(a)) for a in (adapter, *more)], open_base(Path(base))
    found = Checkpoint.open(Path(merged))
    plan, _ = plan_of(adapters, checkpoint, weights, scale, None)
    problems = [
        *(TensorProblem(name, "is missing") for name in plan.tensors if name not in found.tensors),
        *(TensorProblem(name, "does not belong there") for name in found.tensors if name not in plan.tensors),
        *_config_problems(found.config, plan),
    ]
    pairs: list[tuple[OutputTensor, StoredTensor]] = []
    for name, tensor in plan.tensors.items():
        stored = found.tensors.get(name)
        if stored is None:
            continue
        if stored.shape != tensor.shape:
            problems.append(TensorProblem(name, f"is {list(stored.shape)}, expected {list(tensor.shape)}"))
        elif stored.dtype != tensor.dtype and not {stored.dtype, tensor.dtype} <= set(dtypes.FLOATS):
            problems.append(TensorProblem(name, f"is {stored.dtype}, expected {tensor.dtype}"))
        else:
            pairs.append((replace(tensor, dtype=stored.dtype), stored))
    progress.start("verify", sum(stored.n_bytes for _, stored in pairs), "bytes")
    with Files() as files, one_blas_thread(), ThreadPoolExecutor(threads or cores()) as pool:
        comparison = _Comparison(files, ulps, progress)
        try:
            results = list(pool.map(comparison, pairs))
        finally:
            comparison.stop.set()
    problems += [r.problem for r in results if r.problem is not None]
    return VerifyReport(
        merged=str(merged),
        base=str(base),
        adapter=" + ".join(str(a) for a in (adapter, *more)),
        tensors=len(pairs),
        merged_tensors=sum(t.changed for t, _ in pairs),
        exact_tensors=sum(t.changed and r.exact for (t, _), r in zip(pairs, results, strict=True)),
        untouched_tensors=sum(not t.changed for t, _ in pairs),
        ulps=ulps,
        rtol=RTOL,
        atol=ATOL,
        max_ulps=max((r.max_ulps for r in results), default=0),
        max_difference=max((r.max_difference for r in results), default=0.0),
        problems=tuple(problems),
    )


def _config_problems(config: dict[str, Any], plan: MergePlan) -> list[TensorProblem]:
    """Fields of config.json without which transformers would not load the weights as they are."""
    problems = []
    if plan.untied and config.get("tie_word_embeddings") is not False:
        problems.append(
            TensorProblem("config.json", "tie_word_embeddings is not false, so the head would take the embedding")
        )
    if quantisation(config) is not None:
        problems.append(TensorProblem("config.json", "names a quantisation, and the weights are floats"))
    sizes = [part.get("vocab_size") for part in (config, *config.values()) if isinstance(part, dict)]
    if plan.vocab_size is not None and plan.vocab_size not in sizes:
        problems.append(TensorProblem("config.json", f"vocab_size is not {plan.vocab_size}, the embedding's rows"))
    return problems


@dataclass(frozen=True)
class _Result:
    """What comparing one tensor found."""

    exact: bool = True
    max_ulps: int = 0
    max_difference: float = 0.0
    problem: TensorProblem | None = None


class _Comparison:
    """Compares one tensor with what it should be; called from several threads."""

    def __init__(self, files: Files, ulps: int, progress: Progress) -> None:
        self.files, self.ulps, self.progress = files, ulps, progress
        self.blocks = Blocks(files)
        self.stop = threading.Event()

    def __call__(self, pair: tuple[OutputTensor, StoredTensor]) -> _Result:
        tensor, stored = pair
        return self.raw(tensor, stored) if tensor.copied else self.made(tensor, stored)

    def raw(self, tensor: OutputTensor, stored: StoredTensor) -> _Result:
        """A tensor that must be the same bytes."""
        buffers = np.empty((2, min(PIECE, max(stored.n_bytes, 1))), dtype=np.uint8)
        for offset in range(0, stored.n_bytes, PIECE):
            if self.stop.is_set():
                break
            n = min(PIECE, stored.n_bytes - offset)
            expected, found = buffers[0, :n], buffers[1, :n]
            self.files.read_into(tensor.source, offset, expected)
            self.files.read_into(stored, offset, found)
            if not np.array_equal(expected, found):
                at = offset + int((expected != found).argmax())
                what = "the adapter's" if tensor.replaced else "the base's"
                return _Result(
                    exact=False,
                    problem=TensorProblem(tensor.name, f"differs from {what} bytes, first at byte {at:,} of it"),
                )
            self.progress.advance(n)
        return _Result()

    def made(self, tensor: OutputTensor, stored: StoredTensor) -> _Result:
        """A tensor that is computed."""
        result, row_bytes = _Result(), stored.n_bytes // tensor.matrix[0]
        raw = np.empty(min(self.blocks.rows_of(tensor), tensor.matrix[0]) * row_bytes, dtype=np.uint8)
        for row, expected in self.blocks(tensor):
            if self.stop.is_set():
                break
            piece = raw[: expected.nbytes]
            self.files.read_into(stored, row * row_bytes, piece)
            found = piece.view(expected.dtype).reshape(expected.shape)
            if not np.array_equal(expected.view("u1"), found.view("u1")):
                result = self.compare(tensor, result, row, expected, found)
                if result.problem is not None:
                    return result
            self.progress.advance(expected.nbytes)
        return result

    def compare(
        self, tensor: OutputTensor, so_far: _Result, row: int, expected: npt.NDArray[Any], found: npt.NDArray[Any]
    ) -> _Result:
        """Two blocks that are not the same bytes."""
        wanted, got = (dtypes.decode(x.tobytes(), tensor.dtype).astype(np.float64) for x in (expected, found))
        difference = np.abs(wanted - got)
        difference[np.isnan(difference)] = np.inf
        ulps = 0
        if tensor.dtype in {"BF16", "F16"}:
            steps = np.abs(_ordered(expected) - _ordered(found)).reshape(-1)
            ulps = int(steps.max())
            wrong = steps > (self.ulps if tensor.changed else 0)
        else:
            allowed = ATOL + RTOL * np.abs(wanted) if tensor.changed else np.zeros_like(wanted)
            wrong = ~(difference <= allowed)
        wrong |= np.isinf(difference)
        problem = None
        if wrong.any():
            at = int(wrong.argmax())
            where = f"row {row + at // tensor.matrix[1]}, column {at % tensor.matrix[1]}"
            problem = TensorProblem(
                tensor.name,
                f"differs from {'base + delta' if tensor.changed else 'the rounded base'} in "
                f"{np.count_nonzero(wrong):,} numbers of a block, first in {where}: "
                f"expected {wanted[at]:.9g}, found {got[at]:.9g}",
            )
        return _Result(
            exact=False,
            max_ulps=max(so_far.max_ulps, ulps),
            max_difference=max(so_far.max_difference, float(difference.max())),
            problem=problem,
        )


def _ordered(carrier: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """16-bit floats -> integers in the order of their values, neighbours one apart, the two zeros equal."""
    bits = carrier.view("<u2").astype(np.int32)
    return np.where(bits & 0x8000, -(bits & 0x7FFF), bits)
