"""Reports as tables for a person: one function a report."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Literal

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from rich.console import Console

    from prolora_tools.reports import (
        BudgetReport,
        CandidatesReport,
        CompressionReport,
        ConversionReport,
        DifferenceReport,
        ExpansionReport,
        ManifestReport,
        MergeReport,
        ModuleCompression,
        TensorProblem,
        VerifyReport,
    )

View = Literal["type", "layer", "module"]


def size(n_bytes: int) -> str:
    """Bytes for a person: 1.2 MB."""
    number, unit = float(n_bytes), "B"
    for bigger in ("kB", "MB", "GB", "TB"):
        if number < 999.95:
            break
        number, unit = number / 1000, bigger
    return f"{n_bytes} B" if unit == "B" else f"{number:.1f} {unit}"


def error(value: float | None) -> str:
    """A relative error; 0 is exact, and small ones keep their exponent."""
    if value is None:
        return "-"
    if value == 0:
        return "0 (exact)"
    return f"{value:.4f}" if value >= 5e-4 else f"{value:.1e}"


def _table(*columns: str, left: int = 1) -> Table:
    """A plain table: the first `left` columns are text, the others numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", overflow="fold", no_wrap=i >= left)
    return table


def _facts(console: Console, title: str, facts: Iterable[tuple[str, str]]) -> None:
    """A heading, and aligned lines of name and value under it; empty values are left out."""
    console.print(Text(title, style="bold"), soft_wrap=True)
    rows = [(name, value) for name, value in facts if value]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        console.print(Text(f"  {name:<{width}}  {value}"), soft_wrap=True)


def budget(view: View) -> Callable[[BudgetReport, Console], None]:
    """`stats`, and `plan` of one geometry, grouped as asked for."""

    def render(report: BudgetReport, console: Console) -> None:
        compared = report.comparison
        blocks = sum(m.blocks for m in report.modules)
        factors = report.parameters - report.other_parameters
        _facts(
            console,
            f"{report.subject}: {'PRoLoRA' if report.kind == 'PROLORA' else 'LoRA'}",
            [
                ("parameters", f"{report.parameters:,} ({size(report.bytes)})"),
                ("of these beside the factors", f"{report.other_parameters:,}" if report.other_parameters else ""),
                (
                    "LoRA of the same rank",
                    f"{compared.lora_same_rank:,} ({factors / compared.lora_same_rank:.1%} used)",
                ),
                ("LoRA of equal size", f"rank {compared.equal_budget_lora_rank:.3g}"),
                (f"VeRA of rank {compared.vera_rank}", f"{compared.vera:,}"),
                (
                    "distinct blocks of dW",
                    f"{sum(m.distinct_blocks for m in report.modules):,} of {blocks:,}" if blocks else "",
                ),
                ("base", f"{report.base_parameters:,} parameters" if report.base_parameters else ""),
                ("share of the base", f"{report.base_share:.3%}" if report.base_share is not None else ""),
            ],
        )
        console.print()
        if view == "module":
            table = _table(
                "module", "in", "out", "rank", "unshared", "chunks", "strides", "blocks", "parameters", "bytes"
            )
            for m in report.modules:
                table.add_row(
                    m.name,
                    f"{m.in_features:,}",
                    f"{m.out_features:,}",
                    str(m.rank),
                    str(m.unshared),
                    f"{m.chunks_a},{m.chunks_b}",
                    f"{m.stride_a},{m.stride_b}",
                    f"{m.distinct_blocks}/{m.blocks}" if m.blocks else "-",
                    f"{m.parameters:,}",
                    size(m.bytes),
                )
        else:
            table = _table(view, "modules", "parameters", "bytes", "share")
            for group in report.by_type if view == "type" else report.by_layer:
                share = f"{group.parameters / factors:.1%}" if factors else "-"
                table.add_row(group.name, str(group.modules), f"{group.parameters:,}", size(group.bytes), share)
        console.print(table)

    return render


def candidates(report: CandidatesReport, console: Console) -> None:
    """`plan` with a budget."""
    _facts(
        console,
        f"{report.subject}: geometries that meet the budget",
        [
            ("budget", f"{report.budget:,} parameters"),
            ("LoRA of equal size", f"rank {report.lora_rank:.3g}"),
            ("target modules", str(report.targets)),
        ],
    )
    console.print()
    if not report.candidates:
        console.print("no geometry of rank 64 or less, in at most 16 chunks, comes within 10 % below the budget")
        return
    table = _table("rank", "unshared", "chunks", "parameters", "bytes", "of budget", left=0)
    for c in report.candidates:
        chunks = f"{c.chunks_a},{c.chunks_b}" if c.rank > c.unshared else "(LoRA)"
        row = (str(c.rank), str(c.unshared), chunks, f"{c.parameters:,}", size(c.bytes), f"{c.budget_share:.2%}")
        table.add_row(*row)
    console.print(table)


def compression(report: CompressionReport, console: Console) -> None:
    """`compress`."""
    calibrated = report.calibrated_error is not None
    told, svd_told = (
        (report.calibrated_error, report.svd_calibrated_error)
        if calibrated
        else (report.relative_error, report.svd_relative_error)
    )
    wins = told is not None and (svd_told or 0.0) < told and report.lengthen != "directions"
    _facts(
        console,
        f"{report.source} -> {report.output or '(dry run, nothing written)'}",
        [
            (
                "parameters",
                (
                    f"{report.parameters:,} of {report.source_parameters:,} "
                    f"({report.parameters / report.source_parameters:.1%}, {size(report.bytes)})"
                ),
            ),
            ("allowed", f"{report.budget:,}" if report.budget is not None else ""),
            ("relative error of dW", error(report.relative_error) if report.relative_error is not None else ""),
            (
                "truncated SVD, no larger",
                f"{error(report.svd_relative_error)} with {report.svd_parameters:,} parameters"
                if report.svd_relative_error is not None
                else "",
            ),
            ("calibrated error", error(report.calibrated_error) if calibrated else ""),
            ("calibrated SVD, no larger", error(report.svd_calibrated_error) if calibrated else ""),
            (
                "tolerance",
                f"{report.max_error:g}: {'met' if report.ok else 'NOT met'}" if report.max_error is not None else "",
            ),
        ],
    )
    if wins:
        console.print("  A plain LoRA of smaller rank keeps more of this adapter at this size.", style="yellow")
    console.print()
    table = _table("type", "modules", "shape", "method", "parameters", "error", "worst", "SVD error", left=1)
    groups: dict[str, list[int]] = {}
    for i, m in enumerate(report.modules):
        groups.setdefault(m.name.rpartition(".")[2], []).append(i)
    for name, members in groups.items():
        modules = [report.modules[i] for i in members]
        pairs = [
            (m.calibrated_error, m.svd_calibrated_error) if calibrated else (m.relative_error, m.svd_relative_error)
            for m in modules
        ]
        errors, svd = ([x for x in column if x is not None] for column in zip(*pairs, strict=True))
        methods = sorted({m.method for m in modules if m.method})
        table.add_row(
            name,
            str(len(modules)),
            _shape(modules),
            "+".join(methods) or "-",
            f"{sum(m.parameters for m in modules):,}",
            error(sum(errors) / len(errors) if errors else None),
            error(max(errors, default=None)),
            error(sum(svd) / len(svd) if svd else None),
        )
    console.print(table)
    if report.relative_error is not None:
        console.print(
            "Errors by type are means over its modules; 1 is as bad as dropping dW. Shapes are r/u/m,n.", style="dim"
        )


def _shape(modules: list[ModuleCompression]) -> str:
    """The shape most modules of a type have, and how many others there are: 8/2/4,4 and 3 more."""
    shapes = [
        f"{m.rank}/{m.unshared}/{m.chunks_a},{m.chunks_b}" if m.rank > m.unshared else f"LoRA {m.rank}" for m in modules
    ]
    names = sorted(set(shapes), key=lambda name: (-shapes.count(name), name))
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def conversion(report: ConversionReport, console: Console) -> None:
    """`convert-official`."""
    _facts(
        console,
        f"{report.source} -> {report.output or '(dry run, nothing written)'}",
        [
            ("read", f"{report.file}, {'a raw checkpoint' if report.source_kind == 'raw' else 'an expanded adapter'}"),
            ("modules", str(report.modules)),
            ("rank", f"{report.rank}, {report.unshared} of it unshared"),
            ("chunks of A, B", f"{report.chunks_a}, {report.chunks_b}"),
            ("strides of A, B", f"{report.stride_a}, {report.stride_b}"),
            ("parameters", f"{report.parameters:,}"),
        ],
    )


def expansion(report: ExpansionReport, console: Console) -> None:
    """`expand`."""
    alpha = f"{report.alpha:g}" + (", scaling multiplied into B" if report.scaling_in_b else "")
    vllm = f"--max-lora-rank {report.vllm_max_lora_rank}" if report.vllm_max_lora_rank else "no limit so high"
    _facts(
        console,
        f"{report.source} -> {report.output or '(dry run, nothing written)'}",
        [
            ("modules", str(report.modules)),
            (
                "rank",
                str(report.rank) if report.rank == report.lowest_rank else f"{report.lowest_rank} to {report.rank}",
            ),
            ("alpha", alpha),
            ("parameters", f"{report.parameters:,} from {report.source_parameters:,} ({size(report.bytes)})"),
            ("vLLM", vllm),
        ],
    )


def merged(report: MergeReport, console: Console) -> None:
    """`merge`."""
    _facts(
        console,
        f"{report.base} + {report.adapter} -> {report.output or '(dry run, nothing written)'}",
        [
            ("parameters", f"{report.parameters:,} ({size(report.bytes)}, {size(report.bytes_free)} free)"),
            ("adapter tensors", f"{report.adapter_tensors:,}, each with its place"),
            ("tensors merged", f"{report.merged_tensors:,}"),
            ("copied bit for bit", f"{report.copied_tensors:,}"),
            ("converted", f"{report.converted_tensors:,}" if report.converted_tensors else ""),
            ("new", ", ".join(report.new_tensors)),
            ("head untied", "yes: tie_word_embeddings is false now" if report.untied else ""),
            ("files beside", ", ".join(report.files)),
        ],
    )
    console.print()
    table = _table("shard", "tensors", "merged", "bytes")
    for shard in report.shards:
        table.add_row(shard.name, str(shard.tensors), str(shard.merged), size(shard.bytes))
    console.print(table)
    if report.output is None:
        console.print()
        alike = Counter((_starred(c.name), c.shape, _starred(c.change)) for c in report.changes)
        table = _table("tensors", "number", "shape", "what the adapters do to each", left=4)
        for (name, shape, change), count in alike.items():
            table.add_row(name, f"{count:,}", " x ".join(map(str, shape)), change)
        console.print(table)


def _starred(text: str) -> str:
    """Numbers that stand between dots, those of layers and experts, as stars."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", text)


def verified(report: VerifyReport, console: Console) -> None:
    """`verify`."""
    _facts(
        console,
        f"{report.merged}: {'verified' if report.ok else 'NOT base + adapter'}",
        [
            ("tensors compared", f"{report.tensors:,}"),
            ("changed by the adapter", f"{report.merged_tensors:,}, {report.exact_tensors:,} of them bit for bit"),
            ("untouched", f"{report.untouched_tensors:,}"),
            ("largest distance", f"{report.max_ulps} ulps in half precision, {report.max_difference:.3g} absolute"),
            (
                "tolerance",
                f"{report.ulps} ulp in half precision; rtol {report.rtol:g}, atol {report.atol:g} in float32",
            ),
        ],
    )
    _problems(console, "tensor", report.problems)


def _problems(console: Console, column: str, problems: Iterable[TensorProblem]) -> None:
    """A table of what is wrong, where something is."""
    rows = list(problems)
    if rows:
        console.print()
        table = _table(column, "problem", left=2)
        for problem in rows:
            table.add_row(problem.name, problem.problem)
        console.print(table)


def manifest(report: ManifestReport, console: Console) -> None:
    """`verify --manifest`."""
    facts = [("files", f"{report.files:,} ({size(report.bytes)})")]
    _facts(console, f"{report.folder}: {'as its manifest says' if report.ok else 'NOT as its manifest says'}", facts)
    _problems(console, "file", report.problems)


def difference(report: DifferenceReport, console: Console) -> None:
    """`diff`."""
    measured = [(m.relative_error, m.name) for m in report.modules if m.relative_error is not None]
    worst = max(measured, default=None)
    met = "" if report.max_error is None else f"{report.max_error:g}: {'met' if report.ok else 'NOT met'}"
    _facts(
        console,
        f"{report.b} against {report.a}",
        [
            ("relative error of dW", error(report.relative_error)),
            ("modules", str(len(report.modules))),
            ("worst module", f"{error(worst[0])} in {worst[1]}" if worst else ""),
            ("only in the first", ", ".join(report.only_in_a)),
            ("only in the second", ", ".join(report.only_in_b)),
            ("other differences", ", ".join(report.other_differences)),
            ("tolerance", met),
        ],
    )
