"""Base + adapter -> full weights, streamed: headers first, blocks of rows, untouched tensors copied by the kernel."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prolora_tools import __version__
from prolora_tools.core.merging import panel_rows
from prolora_tools.errors import OutputError, RequestError
from prolora_tools.files import dtypes
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import INDEX, SINGLE, Checkpoint
from prolora_tools.files.config import FILE, dump
from prolora_tools.files.quantised import CONFIGS, PARTS, open_base
from prolora_tools.files.stream import Files, copy_span, reserve, start_writeback, write_at
from prolora_tools.files.tensors import layout, reading
from prolora_tools.files.writer import abandoned_bytes, check_target, copy_file, staged, write_file
from prolora_tools.operations.manifest import Journal, digest
from prolora_tools.operations.merge_blocks import Blocks
from prolora_tools.operations.merge_plan import MergePlan, OutputTensor, plan_of
from prolora_tools.operations.threads import cores, one_blas_thread
from prolora_tools.progress import SILENT, Progress
from prolora_tools.reports import MergeReport, ShardReport, TensorChange, add_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from prolora_tools.reports import Finish

CARRIED = (
    "added_tokens.json", "chat_template.*", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "special_tokens_map.json", "spiece.model", "sentencepiece.*", "tokenizer*", "vocab.*",
    "additional_chat_templates/*", "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json",
    "*_Pooling/config.json",
)  # fmt: skip
"""What goes along with the weights: tokenizer, templates, generation and sentence-transformers settings."""

TASK_BYTES = 64 << 20
"""A tensor larger than this is shared out between threads."""


def merge(
    adapter: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    more: Sequence[str | Path] = (),
    weights: Sequence[float] = (),
    scale: float = 1.0,
    dtype: str | None = None,
    max_shard_size: int | None = None,
    copy_code: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_nonfinite: bool = False,
    manifest: bool = False,
    resume: bool = False,
    threads: int | None = None,
    finish: Finish[MergeReport] = add_nothing,
    progress: Progress = SILENT,
) -> MergeReport:
    """Merge a LoRA or PRoLoRA adapter into its base, shard by shard, into a folder that transformers loads.

    Each merged element is scaling * (B A) + W in float32, rounded once to the output dtype. Memory does not grow
    with the model: a thread holds one module's factors and one block of rows.

    Args:
        adapter: the adapter's folder.
        out: the folder to write.
        base: the base model's folder, safetensors or `.bin` files, one or with an index. Weights quantised by
            bitsandbytes or as FP8 are read as the floats they stand for.
        more: folders of further adapters, merged in the same pass.
        weights: what each adapter's deltas are multiplied with, the first adapter's first; none for 1 each.
        scale: what all of them are multiplied with besides.
        dtype: torch's name of the output dtype; None keeps each tensor's, and gives quantised ones that of
            config.json, or bfloat16.
        max_shard_size: bytes a shard may have; None keeps the base's files.
        copy_code: carry the base's `.py` files along too.
        overwrite: replace `out` if it is a model folder.
        dry_run: read headers only and write nothing.
        allow_nonfinite: let inf and nan that the base holds, or that the sum gives, into the output.
        manifest: write merge_manifest.json: size and sha256 of every file, which `check_manifest` reads.
        resume: keep the finished shards of a run that was killed or interrupted and whose inputs were the same,
            each checked by its sha256, and leave this run's where it is interrupted. Implies `manifest`.
        threads: None takes one a core.
        finish: called with the complete folder and the report before the folder becomes `out`.
        progress: told of bytes written.

    Raises:
        RequestError: a number or a name is out of its range.
        InputError: adapter or base is missing or broken, or a value is inf or nan.
        UnsupportedError: a kind of adapter or base that is refused.
        MismatchError: adapter and base do not belong together.
        OutputError: `out` is refused, too large for its disk, or cannot be written.
    """
    if max_shard_size is not None and max_shard_size < 1:
        raise RequestError(
            "shard-size",
            f"the shard size is {max_shard_size}, expected at least 1 byte",
            hint="for example --max-shard-size 5GB",
        )
    adapters, checkpoint = [Adapter.open(Path(a)) for a in (adapter, *more)], open_base(Path(base))
    opened, wanted = adapters[0], None if dtype is None else dtypes.parse(dtype)
    plan, weights = plan_of(adapters, checkpoint, weights, scale, wanted)
    shards = all_shards = _shards(plan, checkpoint, max_shard_size)
    carried = _carried_files(checkpoint.folder, opened.folder, copy_code=copy_code)
    target, inputs = Path(out), [*(a.folder for a in adapters), checkpoint.folder]
    check_target(target, inputs, overwrite=overwrite)
    size = sum(s.n_bytes for s in shards) + sum(f.stat().st_size for f in carried.values())
    free = _free_bytes(target) + abandoned_bytes(target)
    report = _report(adapters, checkpoint, plan, shards, carried, output=None if dry_run else str(out), free=free)
    if dry_run:
        return report
    if size > free:
        raise OutputError(
            "merge-no-space",
            f"the merged model has {size:,} bytes, and the disk of {out} has {free:,} free",
            hint="free space there, choose another disk with -o OUT, or a smaller --dtype",
        )
    progress.start("merge", sum(s.n_bytes for s in shards), "bytes")
    with staged(target, inputs, overwrite=overwrite, resume=resume) as stage:
        journal = Journal(stage, _request(adapters, weights, checkpoint, shards, dtype)) if manifest or resume else None
        if journal is not None:
            for done in (s for s in shards if s.name in journal.finished):
                progress.advance(done.n_bytes)
            shards = [s for s in shards if s.name not in journal.finished]
        _write_shards(stage, shards, threads or cores(), progress, journal, allow_nonfinite=allow_nonfinite)
        if [s.name for s in all_shards] != [SINGLE]:
            write_file(stage / INDEX, dump(_index(all_shards, checkpoint)))
        write_file(stage / "config.json", dump(_config(checkpoint.config, plan, dtype)))
        for name, source in carried.items():
            (stage / name).parent.mkdir(exist_ok=True)
            copy_file(source, stage / name)
        Checkpoint.open(stage)  # what we wrote must open
        finish(stage, report)
        if journal is not None:
            journal.finish()
    return report


def _request(
    adapters: list[Adapter], weights: Sequence[float], base: Checkpoint, shards: list[_Shard], dtype: str | None
) -> str:
    """What a finished shard depends on: a run with another request keeps nothing of it."""
    files = [*base.files, base.folder / "config.json"]
    parts: list[object] = [
        __version__,
        dtype,
        list(weights),
        [(s.name, s.n_bytes, hashlib.sha256(s.header).hexdigest()) for s in shards],
    ]
    for folder, names in (*((a.folder, [a.file, a.folder / FILE]) for a in adapters), (base.folder, files)):
        for path in names:
            with reading(path):
                stat = path.stat()
            parts.append([str(folder.resolve()), path.name, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True)
class _Shard:
    """One file to write: where its tensors go, and the bytes before them."""

    name: str
    tensors: dict[str, OutputTensor]
    header: bytes
    spans: dict[str, tuple[int, int]]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(n for _, n in self.spans.values())


def _shards(plan: MergePlan, base: Checkpoint, max_shard_size: int | None) -> list[_Shard]:
    """Lay the output out: the base's files where they may stay, new ones of at most `max_shard_size` otherwise."""
    if max_shard_size is None:
        groups = {name: {k: plan.tensors[k] for k in tensors} for name, tensors in base.shards.items()}
        groups[list(groups)[-1]] |= {k: plan.tensors[k] for k in plan.new}
        return [_laid_out(name, tensors, base) for name, tensors in groups.items()]
    packed: list[dict[str, OutputTensor]] = [{}]
    room = max_shard_size
    for key, tensor in plan.tensors.items():
        if packed[-1] and tensor.n_bytes > room:
            packed.append({})
            room = max_shard_size
        packed[-1][key] = tensor
        room -= tensor.n_bytes
    count = len(packed)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    return [_laid_out(name, tensors, base) for name, tensors in zip(names, packed, strict=True)]


def _laid_out(name: str, tensors: dict[str, OutputTensor], base: Checkpoint) -> _Shard:
    """Keep the base file's header and offsets where nothing in them changes; make new ones otherwise."""
    old = base.shards.get(name, {})
    same = (
        base.as_stored
        and list(old) == list(tensors)
        and all((t.dtype, t.shape) == (old[k].dtype, old[k].shape) for k, t in tensors.items())
    )
    if same and old:
        start = min(t.begin for t in old.values())
        with reading(base.folder / name), (base.folder / name).open("rb") as f:
            header = f.read(start)
        return _Shard(name, tensors, header, {k: (t.begin, t.n_bytes) for k, t in old.items()})
    header, spans = layout((k, t.dtype, t.shape) for k, t in tensors.items())
    return _Shard(name, tensors, header, spans)


def _write_shards(
    stage: Path,
    shards: list[_Shard],
    threads: int,
    progress: Progress,
    journal: Journal | None,
    *,
    allow_nonfinite: bool,
) -> None:
    """Write all shards, tensors shared out between threads; the first error stops them all."""
    stop = threading.Event()
    with Files() as files:
        outputs: list[int] = []
        try:
            for shard in shards:
                outputs.append(os.open(stage / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
                reserve(outputs[-1], shard.n_bytes)
                write_at(outputs[-1], shard.header, 0)
            writer = _Writer(files, Blocks(files, allow_nonfinite=allow_nonfinite), stop, progress, journal)
            with one_blas_thread(), ThreadPoolExecutor(threads) as pool:
                tasks = [pool.submit(task) for task in writer.tasks(shards, outputs, threads)]
                try:
                    done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                finally:
                    stop.set()
                    for task in tasks:
                        task.cancel()
        finally:
            for output in outputs:
                os.close(output)


class _Writer:
    """Makes the tasks that fill the output files."""

    def __init__(
        self, files: Files, blocks: Blocks, stop: threading.Event, progress: Progress, journal: Journal | None
    ) -> None:
        self.files, self.blocks, self.stop, self.progress, self.journal = files, blocks, stop, progress, journal
        self.lock, self.many = threading.Lock(), False

    def tasks(self, shards: list[_Shard], outputs: list[int], threads: int) -> Iterator[Callable[[], None]]:
        """Tasks in turn from as many shards as there are threads, so that each reads and writes another file."""
        self.many = len(shards) > 1
        pairs = list(zip(shards, outputs, strict=True))
        for first in range(0, len(pairs), threads):
            queues = [self._counted(s, o) for s, o in pairs[first : first + threads]]
            for turn in zip_longest(*queues):
                yield from (task for task in turn if task is not None)

    def _counted(self, shard: _Shard, output: int) -> list[Callable[[], None]]:
        """A shard's tasks, the last of which, whichever it is, also makes the file durable."""
        tasks = list(self._shard_tasks(shard, output))
        left = len(tasks) + 1

        def run(task: Callable[[], None]) -> None:
            nonlocal left
            task()
            with self.lock:
                left -= 1
                last = left == 0
            if last and not self.stop.is_set():
                self.finish(shard, output)

        return [_call(run, task) for task in [*tasks, lambda: None]]

    def finish(self, shard: _Shard, output: int) -> None:
        """All of a shard is written."""
        os.fdatasync(output)
        if self.journal is not None:
            self.journal.add(shard.name, shard.n_bytes, digest(output, self.stop))
        if self.many:  # of one file, the line at the end tells all
            self.progress.milestone(f"{shard.name}: {shard.n_bytes:,} bytes written")

    def _shard_tasks(self, shard: _Shard, output: int) -> Iterator[Callable[[], None]]:
        for name, tensor in shard.tensors.items():
            at, size = shard.spans[name]
            if tensor.copied and not tensor.replaced:  # the adapter's own weights are checked to be finite
                for offset in range(0, size, TASK_BYTES):
                    yield _call(self.copy, tensor, output, at, offset, min(TASK_BYTES, size - offset))
                continue
            rows, columns = tensor.matrix
            panel = panel_rows(columns)
            step = panel * max(1, TASK_BYTES // (panel * columns * dtypes.ITEM_BITS[tensor.dtype] // 8))
            if tensor.transposed and any(update.module.dora for update in tensor.updates):
                step = rows  # its norms need a pass over the whole weight, which is made once
            for start in range(0, rows, step):
                yield _call(self.make, tensor, output, at, start, min(start + step, rows))

    def copy(self, tensor: OutputTensor, output: int, at: int, offset: int, n_bytes: int) -> None:
        """Copy a span of an untouched tensor."""
        source, done = self.files.handle(tensor.source.file), 0
        while done < n_bytes and not self.stop.is_set():
            begin = offset + done
            got = copy_span(source, tensor.source.begin + begin, output, at + begin, n_bytes - done)
            if not got:
                tensor.source.read_bytes()  # raises: the file has ended early
            done += got
            self.progress.advance(got)
        self.written(output, at + offset, n_bytes)

    def make(self, tensor: OutputTensor, output: int, at: int, start: int, stop: int) -> None:
        """Compute and write rows `start` to `stop`."""
        row_bytes = tensor.n_bytes // tensor.matrix[0]
        for row, carrier in self.blocks(tensor, start, stop):
            if self.stop.is_set():
                return
            write_at(output, carrier.reshape(-1).view("u1").data, at + row * row_bytes)
            self.progress.advance(carrier.nbytes)
        self.written(output, at + start * row_bytes, (stop - start) * row_bytes)

    def written(self, output: int, offset: int, n_bytes: int) -> None:
        """A span is done: let it go to the disk, unless it will be read once more for its hash."""
        if self.journal is None:
            start_writeback(output, offset, n_bytes)


def _call(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


def _free_bytes(out: Path) -> int:
    """Bytes free on the disk that `out` will lie on."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _index(shards: list[_Shard], base: Checkpoint) -> dict[str, Any]:
    """The index's JSON: true sizes, and the base's other metadata."""
    metadata = dict(base.index_metadata)
    metadata["total_size"] = sum(n for s in shards for _, n in s.spans.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(t.source.items for s in shards for t in s.tensors.values())
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def _config(base: dict[str, Any], plan: MergePlan, dtype: str | None) -> dict[str, Any]:
    """config.json of the merged model: the base's with what the merge changed."""
    config = dict(base)
    nested = {k: dict(v) for k, v in config.items() if k in PARTS and isinstance(v, dict)}
    config |= nested
    for part in (config, *nested.values()):
        if plan.untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
        if plan.vocab_size is not None and part.get("vocab_size") == plan.old_vocab_size:
            part["vocab_size"] = plan.vocab_size
        for key in CONFIGS:
            part.pop(key, None)  # what was quantised is written as floats
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in part:
                part[key] = dtype
    return config


def _carried_files(base: Path, adapter: Path, *, copy_code: bool) -> dict[str, Path]:
    """Files that go along, by their name in the output; the adapter's own tokenizer wins over the base's.

    A tokenizer is taken whole from one folder: files of two tokenizers would not fit each other.
    """
    own = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    tokenizer = ("tokenizer*", "added_tokens.json", "special_tokens_map.json", "vocab.*", "merges.txt", "spiece.model")
    found: dict[str, Path] = {}
    for folder in (base, adapter):
        for pattern in (*CARRIED, *(["*.py"] if copy_code and folder == base else [])):
            if own and folder == base and pattern in tokenizer:
                continue
            if folder == adapter and pattern not in {*tokenizer, "chat_template.*", "additional_chat_templates/*"}:
                continue
            for path in sorted(folder.glob(pattern)):
                if path.is_file():
                    found[str(path.relative_to(folder))] = path
    return dict(sorted(found.items()))


def _report(
    adapters: list[Adapter],
    base: Checkpoint,
    plan: MergePlan,
    shards: list[_Shard],
    carried: dict[str, Path],
    *,
    output: str | None,
    free: int,
) -> MergeReport:
    tensors = list(plan.tensors.values())
    notes = [*(note for adapter in adapters for note in adapter.notes), *base.notes]
    if "auto_map" in base.config and not any(name.endswith(".py") for name in carried):
        notes.append("config.json names custom code (auto_map) that was not carried along; --copy-code does")
    dtypes_out = {t.dtype for t in tensors if t.changed}
    return MergeReport(
        adapter=" + ".join(str(a.folder) for a in adapters),
        base=str(base.folder),
        output=output,
        parameters=sum(t.source.items for t in tensors),
        bytes=sum(s.n_bytes for s in shards),
        bytes_free=free,
        dtype=", ".join(sorted(dtypes_out)) or None,
        merged_tensors=sum(t.changed for t in tensors),
        copied_tensors=sum(t.copied and not t.changed for t in tensors),
        converted_tensors=sum(not t.copied and not t.changed for t in tensors),
        new_tensors=plan.new,
        untied=plan.untied,
        shards=tuple(
            ShardReport(s.name, s.n_bytes, len(s.tensors), sum(t.changed for t in s.tensors.values())) for s in shards
        ),
        files=tuple(carried),
        adapter_tensors=sum(a.tensor_count for a in adapters),
        changes=tuple(TensorChange(t.name, t.shape, t.change) for t in tensors if t.changed),
        notes=tuple(notes),
    )
