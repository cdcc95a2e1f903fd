"""Checkpoints of the official PRoLoRA code -> our format, exactly.

Source: GitHub Forence1999/PRoLoRA, `modules/chunkwise_sharing_LoRA.py`. A raw training checkpoint holds, for each
module, `lora_A.weight` (r_s, ceil(in / m)), `lora_B.weight` (ceil(out / n), r_s), `lora_A_vec` (u, in) and
`lora_B_vec` (u, out), the last transposed against B. Its config is that of a LoRA: u, m and n are not in it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prolora_tools.core.geometry import Geometry, Sharing, ceil_div, default_stride
from prolora_tools.errors import InputError, MismatchError, ProloraError, RequestError
from prolora_tools.files import keys
from prolora_tools.files.adapter import BIN, SAFETENSORS, Adapter, FactorSpec, read_weights, write_adapter
from prolora_tools.files.checkpoint import require_folder
from prolora_tools.files.config import FORMAT_VERSION, AdapterConfig
from prolora_tools.files.quantised import open_base
from prolora_tools.files.tensors import StoredTensor, check_finite
from prolora_tools.files.writer import check_target, staged
from prolora_tools.operations.compress import compress
from prolora_tools.operations.shapes import structure
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import ConversionReport

if TYPE_CHECKING:
    from prolora_tools.files.checkpoint import Checkpoint
    from prolora_tools.files.dtypes import Floats

_ROLES = {".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_A_vec": "A_unshared", ".lora_B_vec": "B_unshared"}

_VECTORS = (".lora_A_vec", ".lora_B_vec")


def convert_official(
    folder: str | Path,
    out: str | Path,
    *,
    chunks: tuple[int, int] | int | None = None,
    base: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = SILENT,
) -> ConversionReport:
    """Read a checkpoint of the official code into a PRoLoRA adapter folder, bit for bit.

    A final adapter, which holds ordinary expanded factors, is recognised by its numbers. In a raw training
    checkpoint the number of chunks follows from the true dims, which `lora_A_vec` and `lora_B_vec` tell, or the base
    where u is 0. Several numbers can give the same width; where the choice would matter it is asked for, never guessed.

    Args:
        folder: the checkpoint's folder (`checkpoint-N/`), or the final adapter's.
        out: the folder to write.
        chunks: m and n, or one number for both, where the dims do not tell.
        base: the base model's folder, for the true dims where u is 0.
        overwrite: replace `out` if it is a model folder.
        dry_run: read headers only and write nothing.
        progress: told of each finished module.

    Raises:
        InputError: it is no raw checkpoint, or a broken one.
        RequestError: `chunks` or `base` is needed.
        MismatchError: `chunks` or `base` does not fit the checkpoint.
        OutputError: `out` is refused or cannot be written.
    """
    source = Path(folder)
    require_folder(source)
    config = AdapterConfig.read(source)
    file, tensors, notes = _raw_weights(source)
    if not any(name.endswith(_VECTORS) for name in tensors) and (found := _expanded(source)) is not None:
        return _convert_expanded(found, out, overwrite=overwrite, dry_run=dry_run, progress=progress)
    wanted = (chunks, chunks) if isinstance(chunks, int) else chunks
    if wanted is not None:
        Geometry(config.r, 0, *wanted)  # raises where the request itself is out of range
    modules = _modules(file, config, tensors, None if base is None else open_base(Path(base)))
    rank, unshared = _ranks(file, config, modules)
    geometry = Geometry(
        rank,
        unshared,
        _chunks("A", rank - unshared, [(m.in_features, m.width_a) for m in modules], wanted and wanted[0], file),
        _chunks("B", rank - unshared, [(m.out_features, m.width_b) for m in modules], wanted and wanted[1], file),
    )
    report = ConversionReport(
        source=str(folder),
        output=None if dry_run else str(out),
        source_kind="raw",
        file=file.name,
        modules=len(modules),
        rank=rank,
        unshared=unshared,
        chunks_a=geometry.chunks_a,
        chunks_b=geometry.chunks_b,
        stride_a=geometry.a.stride,
        stride_b=geometry.b.stride,
        parameters=sum(geometry.parameters(m.in_features, m.out_features) for m in modules),
        notes=notes,
    )
    target, inputs = Path(out), [source, *([Path(base)] if base is not None else [])]
    if dry_run:
        check_target(target, inputs, overwrite=overwrite)
        return report
    by_path = {m.path: m for m in modules}
    specs = [spec for m in modules for spec in m.specs(geometry)]
    raw = {
        **config.common(),
        "peft_type": "PROLORA",
        "format_version": FORMAT_VERSION,
        "unshared_r": unshared,
        "chunks_A": geometry.chunks_a,
        "chunks_B": geometry.chunks_b,
        "stride_A": None,
        "stride_B": None,
        "rotate": True,
    }
    progress.start("convert", len(modules), "modules")
    with staged(target, inputs, overwrite=overwrite) as stage:
        write_adapter(stage, raw, specs, lambda path: by_path[path].factors(), {}, progress)
    return report


def _expanded(folder: Path) -> Adapter | None:
    """The folder as a final adapter of the official code, None where its factors are no expansion.

    Chunks of a raw checkpoint with u = 0 look like the factors of a smaller LoRA; what tells is the structure.
    """
    try:
        adapter = Adapter.open(folder)
    except ProloraError:  # the reading as a raw checkpoint says what is wrong
        return None
    return adapter if structure(adapter) is not None else None


def _convert_expanded(
    adapter: Adapter, out: str | Path, *, overwrite: bool, dry_run: bool, progress: Progress
) -> ConversionReport:
    """A final adapter: `compress` without a shape takes it back to the chunks it was expanded from."""
    if dry_run:
        raise RequestError(
            "official-dry-run",
            f"{adapter.folder} is an expanded adapter: its shape is in its values, which a dry run does not read",
            hint="leave --dry-run out",
        )
    made = compress(adapter.folder, out, overwrite=overwrite, progress=progress)
    shared = max(made.modules, key=lambda m: m.rank - m.unshared)
    return ConversionReport(
        source=str(adapter.folder),
        output=str(out),
        source_kind="expanded",
        file=adapter.file.name,
        modules=len(made.modules),
        rank=shared.rank,
        unshared=shared.unshared,
        chunks_a=shared.chunks_a,
        chunks_b=shared.chunks_b,
        stride_a=shared.stride_a,
        stride_b=shared.stride_b,
        parameters=made.parameters,
        notes=made.notes,
    )


@dataclass(frozen=True)
class _Module:
    """One module of a raw checkpoint: its stored tensors by role and its true dims."""

    path: str
    stored: dict[str, StoredTensor]
    in_features: int
    out_features: int

    @property
    def width_a(self) -> int:
        return self.stored["A"].shape[1]

    @property
    def width_b(self) -> int:
        return self.stored["B"].shape[0]

    @property
    def ranks(self) -> tuple[int, int]:
        """Shared and unshared rank."""
        vec = self.stored.get("A_unshared")
        return self.stored["A"].shape[0], vec.shape[0] if vec else 0

    def specs(self, geometry: Geometry) -> list[FactorSpec]:
        """Our four tensors."""
        shapes = {
            "A": (geometry.shared, self.width_a),
            "B": (self.width_b, geometry.shared),
            "A_unshared": (geometry.unshared, self.in_features),
            "B_unshared": (self.out_features, geometry.unshared),
        }
        dtype = self.stored["A"].dtype
        return [FactorSpec(keys.prolora_key(self.path, r), self.path, r, dtype, s) for r, s in shapes.items()]

    def factors(self) -> dict[str, Floats]:
        """The arrays by role, as they lie in our format."""
        arrays = {role: tensor.read() for role, tensor in self.stored.items()}
        for role, tensor in self.stored.items():
            check_finite(arrays[role], tensor)
        if "B_unshared" in arrays:
            return arrays | {"B_unshared": arrays["B_unshared"].T}
        nothing = arrays["A"][:0]
        return arrays | {"A_unshared": nothing, "B_unshared": nothing}


def _raw_weights(folder: Path) -> tuple[Path, dict[str, StoredTensor], tuple[str, ...]]:
    """The file with the raw factors: a folder can hold them in one format and the expanded adapter in the other."""
    present = [folder / name for name in (SAFETENSORS, BIN) if (folder / name).is_file()]
    found = [(file, read_weights(file)) for file in present]
    raw = [(f, t) for f, t in found if any(name.endswith(_VECTORS) for name in t)]
    # With u = 0 there are no vectors, and only the shapes tell: A and B of chunks do not fit a plain LoRA's config.
    file, tensors = (raw or found or [(folder / SAFETENSORS, {})])[0]
    if not tensors:
        raise InputError(
            "official-no-weights",
            f"{folder} has neither {SAFETENSORS} nor {BIN}",
            hint="give the checkpoint-N folder that the official code wrote",
        )
    others = tuple(f"{f.name} is there too and was not used; {file.name} was" for f in present if f != file)
    return file, tensors, others


def _modules(
    file: Path, config: AdapterConfig, tensors: dict[str, StoredTensor], base: Checkpoint | None
) -> list[_Module]:
    """Sort the tensors into modules and find their true dims."""
    parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        short = name.removeprefix(keys.PREFIX)
        suffix = next((s for s in _ROLES if short.endswith(s)), None)
        if short == name or suffix is None:
            raise InputError(
                "official-unknown-tensor",
                f"{file}: {name!r} is no tensor of an official PRoLoRA checkpoint",
                hint="expected lora_A.weight, lora_B.weight, lora_A_vec and lora_B_vec under base_model.model.",
            )
        tensor.require_float()
        parts[short.removesuffix(suffix)][_ROLES[suffix]] = tensor
    modules = []
    for path, stored in sorted(parts.items()):
        needed = set(_ROLES.values()) if stored.keys() & {"A_unshared", "B_unshared"} else {"A", "B"}
        if missing := needed - stored.keys():
            raise InputError(
                "official-missing-tensor",
                f"{file}: {path} lacks {', '.join(s for s, role in _ROLES.items() if role in missing)}",
                hint="the checkpoint is incomplete; copy it again",
            )
        for role, tensor in stored.items():
            if len(tensor.shape) != 2 or tensor.shape[0 if role == "B" else 1] == 0:  # no ranks is fine, no columns not
                raise _shape_error(file, tensor, "2 dims, only the ranks of which may be 0")
        modules.append(_Module(path, stored, *_dims(file, path, stored, base)))
    _check_shapes(file, config, modules)
    return modules


def _dims(file: Path, path: str, stored: dict[str, StoredTensor], base: Checkpoint | None) -> tuple[int, int]:
    """True in and out: from the unshared vectors, or from the base."""
    known = None
    if "A_unshared" in stored:
        known = (stored["A_unshared"].shape[-1], stored["B_unshared"].shape[-1])
    if base is not None:
        weight = base.tensors.get(f"{path}.weight")
        if weight is None or len(weight.shape) != 2 or (known is not None and weight.shape != known[::-1]):
            raise MismatchError(
                "official-base",
                f"{file}: {path} does not fit the base {base.folder}: "
                f"{'no such tensor' if weight is None else f'{list(weight.shape)} there'}",
                hint="give the base it was trained on",
            )
        return weight.shape[1], weight.shape[0]
    if known is None:
        raise RequestError(
            "official-needs-base",
            f"{file}: u is 0, so the checkpoint does not hold the true dims of {path}",
            hint="give the base model: --base BASE",
        )
    return known


def _shape_error(file: Path, tensor: StoredTensor, expected: str) -> InputError:
    return InputError(
        "official-shape",
        f"{file}: {tensor.name!r} has the shape {list(tensor.shape)}, expected {expected}",
        hint="the checkpoint is damaged, or not of the official code",
    )


def _check_shapes(file: Path, config: AdapterConfig, modules: list[_Module]) -> None:
    for m in modules:
        shared, unshared = m.ranks
        expected = {
            "A": (shared, m.width_a),
            "B": (m.width_b, shared),
            "A_unshared": (unshared, m.in_features),
            "B_unshared": (unshared, m.out_features),
        }
        for role, tensor in m.stored.items():
            if tensor.shape != expected[role]:
                raise _shape_error(file, tensor, str(list(expected[role])))
        if shared + unshared != config.rank(m.path):
            raise InputError(
                "official-rank",
                f"{file}: {m.path} has {shared} shared and {unshared} unshared ranks, and the config says "
                f"r = {config.rank(m.path)}",
                hint="config and weights are of different checkpoints",
            )


def _ranks(file: Path, config: AdapterConfig, modules: list[_Module]) -> tuple[int, int]:
    """The total and the unshared rank, one for all modules as in the official code."""
    found = {m.ranks for m in modules}
    if len(found) != 1:
        raise InputError(
            "official-ranks",
            f"{file}: modules have different ranks, {sorted(found)} shared and unshared",
            hint="the official code has one rank for all; the checkpoint is damaged",
        )
    shared, unshared = found.pop()
    return config.r if shared + unshared == config.r else shared + unshared, unshared


def _chunks(side: str, shared: int, dims: list[tuple[int, int]], wanted: int | None, file: Path) -> int:
    """The number of chunks that gives every module its width; asked for where several would mean different dW."""
    # Beyond the longest dim and the shared rank, more chunks change neither a width nor a stride.
    most = max(shared, *(dim for dim, _ in dims)) + 1
    fitting = {c for c in range(1, most + 1) if all(ceil_div(dim, c) == width for dim, width in dims)}
    if wanted is not None:
        if not all(ceil_div(dim, wanted) == width for dim, width in dims):
            raise MismatchError(
                "official-chunks",
                f"{file}: {wanted} chunks of {side} do not give the widths of its tensors",
                hint=f"these do: {_some(fitting)}" if fitting else "no number of chunks does: check the base",
            )
        return wanted
    if not fitting:
        raise MismatchError(
            "official-no-chunks",
            f"{file}: no number of chunks of {side} gives the widths of its tensors",
            hint="the checkpoint is damaged, or the base is not the one it was trained on",
        )
    meanings = {
        tuple(map(tuple, Sharing(shared, c, default_stride(shared, c)).source_rows(_copies(dims, c)))) for c in fitting
    }
    if len(meanings) > 1:
        raise RequestError(
            "official-ambiguous",
            f"{file}: {_some(fitting)} chunks of {side} all give the widths of its tensors, and mean different dW",
            hint="say how many it was trained with: --chunks M,N",
        )
    return min(fitting)


def _copies(dims: list[tuple[int, int]], chunks: int) -> int:
    """Copies that the longest module really holds."""
    return max(ceil_div(dim, ceil_div(dim, chunks)) for dim, _ in dims) if dims else 0


def _some(numbers: set[int]) -> str:
    shown = [str(n) for n in sorted(numbers)]
    return ", ".join(shown[:4]) + (" ..." if len(shown) > 4 else "")
