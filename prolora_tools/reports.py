"""What every operation returns: frozen results, of which a terminal table, `--json` and the model card are views.

Sizes in bytes, counts as integers, errors as relative Frobenius norms (0 is exact, 1 is as bad as dropping dW).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

SCHEMA_VERSION = 1


class Report:
    """Base of all reports."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object with `schema_version` and `report`, the name of the kind, first."""
        return {"schema_version": SCHEMA_VERSION, "report": type(self).__name__, **_plain(self)}

    @property
    def ok(self) -> bool:
        """Whether the result lies within the tolerance that was asked for."""
        return True


R = TypeVar("R", bound=Report)
Finish = Callable[[Path, R], None]
"""Puts the last files, such as a model card, into a complete folder before it gets its name."""


def add_nothing(folder: Path, report: Report) -> None:
    """The `finish` of operations whose caller has nothing to add."""


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


@dataclass(frozen=True)
class ModuleBudget:
    """One target module: its dims, its geometry and what it costs.

    `distinct_blocks` of `blocks` parts of dW differ; both are 0 where nothing is shared.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    unshared: int
    chunks_a: int
    chunks_b: int
    stride_a: int
    stride_b: int
    parameters: int
    bytes: int
    distinct_blocks: int
    blocks: int


@dataclass(frozen=True)
class Group:
    """Modules of one type or one layer, summed up."""

    name: str
    modules: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Comparison:
    """The same target modules under other methods, in parameters.

    Attributes:
        lora_same_rank: plain LoRA of each module's rank.
        equal_budget_lora_rank: the LoRA rank that costs as much, a fraction as a rule.
        vera_rank: the rank VeRA is counted at.
        vera: VeRA of that rank.
    """

    lora_same_rank: int
    equal_budget_lora_rank: float
    vera_rank: int
    vera: int


@dataclass(frozen=True)
class BudgetReport(Report):
    """`stats` of an adapter, or `plan` of one geometry.

    Attributes:
        subject: the folder that was read.
        kind: LORA or PROLORA.
        parameters: all numbers in the adapter, those beside the factors included.
        bytes: their size.
        other_parameters: numbers beside the factors (modules_to_save, biases, DoRA magnitudes, token rows).
        other_bytes: their size.
        base_parameters: of the base, None when it was not given.
        base_share: parameters / base_parameters.
    """

    subject: str
    kind: str
    parameters: int
    bytes: int
    other_parameters: int
    other_bytes: int
    comparison: Comparison
    base_parameters: int | None
    base_share: float | None
    by_type: tuple[Group, ...]
    by_layer: tuple[Group, ...]
    modules: tuple[ModuleBudget, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlanCandidate:
    """A geometry that meets the budget, with the fields of a plan."""

    rank: int
    unshared: int
    chunks_a: int
    chunks_b: int
    parameters: int
    bytes: int
    budget_share: float
    modules: tuple[ModuleBudget, ...]


@dataclass(frozen=True)
class CandidatesReport(Report):
    """`plan` with a budget: geometries that meet it, the fullest first."""

    subject: str
    budget: int
    lora_rank: float
    targets: int
    candidates: tuple[PlanCandidate, ...]


@dataclass(frozen=True)
class ModuleCompression(ModuleBudget):
    """One compressed module; errors are None in a dry run.

    `svd_relative_error` is that of the truncated SVD of rank `svd_rank`: the largest LoRA no bigger than this module
    or, where shapes were chosen, as many ranks as the same budget gives it when SVD ranks are chosen.
    `calibrated_error` is the relative error in the norm of the statistics, and `svd_calibrated_error` that of the
    LoRA of rank `svd_rank` fitted in that norm; None without statistics.
    """

    method: str | None
    relative_error: float | None
    svd_rank: int
    svd_relative_error: float | None
    calibrated_error: float | None = None
    svd_calibrated_error: float | None = None


@dataclass(frozen=True)
class CompressionReport(Report):
    """`compress`: what was made of an adapter, and how far its dW is from the original's.

    Attributes:
        source: the adapter that was read.
        output: the folder that was written, None in a dry run.
        method: the method asked for, `best` when each module took its better one.
        parameters: all numbers written, those beside the factors included.
        bytes: their size.
        source_parameters: the same of the source.
        source_bytes: the same of the source.
        relative_error: |dW - dW^| / |dW| over all modules together, scaling included.
        svd_relative_error: the same for truncated SVDs that are no bigger: module by module, or, where shapes were
            chosen, in total.
        svd_parameters: what those SVDs would cost, beside tensors included.
        max_error: the tolerance asked for.
        calibrated_error: the relative error in the norm of the statistics, None without them.
        svd_calibrated_error: the same for LoRAs of those ranks fitted in that norm.
        budget: parameters that were allowed, None where the shape was given or found.
        lengthen: what got its length back, `whole` or `directions`, None without statistics.
    """

    source: str
    output: str | None
    method: str
    parameters: int
    bytes: int
    source_parameters: int
    source_bytes: int
    relative_error: float | None
    svd_relative_error: float | None
    svd_parameters: int
    max_error: float | None
    modules: tuple[ModuleCompression, ...]
    notes: tuple[str, ...] = ()
    calibrated_error: float | None = None
    svd_calibrated_error: float | None = None
    budget: int | None = None
    lengthen: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the total error, in the norm of the statistics where there are any, is within `max_error`."""
        error = self.relative_error if self.calibrated_error is None else self.calibrated_error
        return self.max_error is None or error is None or error <= self.max_error


@dataclass(frozen=True)
class ConversionReport(Report):
    """`convert-official`: what a checkpoint of the official code was found to be.

    Attributes:
        source_kind: `raw` for a training checkpoint, `expanded` for a final adapter.
        file: the weights file that was read.
        rank: total rank; unshared, chunks and strides are those of all modules.
    """

    source: str
    output: str | None
    source_kind: str
    file: str
    modules: int
    rank: int
    unshared: int
    chunks_a: int
    chunks_b: int
    stride_a: int
    stride_b: int
    parameters: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExpansionReport(Report):
    """`expand`: the LoRA folder that was written.

    Attributes:
        rank: the highest rank in it, the only one under `uniform`.
        lowest_rank: the lowest one.
        alpha: its lora_alpha.
        scaling_in_b: whether the scaling was multiplied into B, which rounds unless it is a power of two.
        vllm_max_lora_rank: the `--max-lora-rank` to start vLLM with, None where vLLM has none so high.
    """

    source: str
    output: str | None
    uniform: bool
    modules: int
    rank: int
    lowest_rank: int
    alpha: float
    scaling_in_b: bool
    vllm_max_lora_rank: int | None
    parameters: int
    bytes: int
    source_parameters: int
    source_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardReport:
    """One written file."""

    name: str
    bytes: int
    tensors: int
    merged: int


@dataclass(frozen=True)
class TensorChange:
    """What a merge does to one tensor of the base."""

    name: str
    shape: tuple[int, ...]
    change: str


@dataclass(frozen=True)
class MergeReport(Report):
    """`merge`: the model folder that was written, or would be in a dry run.

    Attributes:
        merged_tensors: tensors that took a delta, a replacement or new rows.
        copied_tensors: tensors copied bit for bit.
        converted_tensors: untouched tensors whose dtype was changed.
        new_tensors: names that the base's checkpoint does not have, such as an untied lm_head.
        untied: whether tie_word_embeddings was set to false.
        dtype: the output dtype asked for, None to keep the base's.
        bytes_free: on the output's disk, before.
        changes: what becomes of each tensor that an adapter has a part in.
        adapter_tensors: tensors in the adapters' files; each has its place in `changes`, or the merge is refused.
    """

    adapter: str
    base: str
    output: str | None
    parameters: int
    bytes: int
    bytes_free: int
    dtype: str | None
    merged_tensors: int
    copied_tensors: int
    converted_tensors: int
    new_tensors: tuple[str, ...]
    untied: bool
    shards: tuple[ShardReport, ...]
    files: tuple[str, ...]
    changes: tuple[TensorChange, ...] = ()
    adapter_tensors: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TensorProblem:
    """One tensor, or field of config.json, that is not what base and adapter make it."""

    name: str
    problem: str


@dataclass(frozen=True)
class ManifestReport(Report):
    """`verify --manifest`: whether a folder's files are those of its manifest.

    Attributes:
        files: files that the manifest names.
        bytes: their size.
        problems: files that are missing, changed or not named; `name` is the file's.
    """

    folder: str
    files: int
    bytes: int
    problems: tuple[TensorProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class VerifyReport(Report):
    """`verify`: whether a merged folder is base + adapter.

    Attributes:
        tensors: tensors of the merged model that were compared.
        merged_tensors: those that the adapter changes.
        exact_tensors: those of them that are bit for bit what this package computes.
        untouched_tensors: those that must equal the base's bit for bit, or its rounding to the merged dtype.
        ulps: the tolerance for bfloat16 and float16, in units in the last place.
        rtol: the relative tolerance for float32 and float64.
        atol: the absolute one.
        max_ulps: the largest distance seen in bfloat16 and float16.
        max_difference: the largest absolute difference seen.
        problems: what is wrong; none when the folder is verified.
    """

    merged: str
    base: str
    adapter: str
    tensors: int
    merged_tensors: int
    exact_tensors: int
    untouched_tensors: int
    ulps: int
    rtol: float
    atol: float
    max_ulps: int
    max_difference: float
    problems: tuple[TensorProblem, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class ModuleDifference:
    """How far the second adapter's dW is from the first's in one module.

    `relative_error` is None where the first has no dW there (it is zero or the module is missing).
    """

    name: str
    relative_error: float | None
    norm_a: float
    norm_b: float


@dataclass(frozen=True)
class DifferenceReport(Report):
    """`diff`: |dW_A - dW_B| / |dW_A| per module and in total, scaling included.

    Attributes:
        only_in_a: modules that B lacks; their whole dW counts as difference.
        only_in_b: modules that A lacks.
        other_differences: tensors beside the factors that differ or are in one adapter only.
        max_error: the tolerance asked for.
    """

    a: str
    b: str
    relative_error: float | None
    max_error: float | None
    only_in_a: tuple[str, ...]
    only_in_b: tuple[str, ...]
    other_differences: tuple[str, ...]
    modules: tuple[ModuleDifference, ...]

    @property
    def ok(self) -> bool:
        """Whether the total is within `max_error` and nothing beside the factors differs."""
        if self.max_error is None:
            return True
        close = self.relative_error is not None and self.relative_error <= self.max_error
        return close and not self.other_differences
