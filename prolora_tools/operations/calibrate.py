"""Second moments of a model's activations and output gradients on a text, module by module, for a calibrated fit.

The adapter is added to the base's weights, the text runs through in windows, and hooks sum up x^T x of every target
module's inputs and, with `outputs`, g^T g of the gradients that come back to its outputs. Their loss is the
model's own log-likelihood of labels drawn from its predictions, so g^T g is a block of the Fisher matrix. Nothing of
the activations is kept: wide layers go through a count sketch, each token added to one of its rows with a random sign.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prolora_tools.core.moments import Moments
from prolora_tools.errors import InputError, MismatchError, RequestError, UnsupportedError, first_line
from prolora_tools.files import dtypes
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.checkpoint import read_model_config
from prolora_tools.files.tensors import StoredTensor, read_header, reading
from prolora_tools.files.writer import write_safetensors, writing
from prolora_tools.operations.models import meta_model
from prolora_tools.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]

DENSE = 2048
"""Features up to which a moment is kept as a dense matrix."""
ROWS = 1024
"""Rows of a sketch."""
_SIDES = ("input", "output")


@dataclass(frozen=True)
class Statistics:
    """Second moments by module, in memory or in a file, read one at a time.

    Attributes:
        arrays: what a file holds, by tensor name: `side:paths`, or `side.sketch:paths` and `side.diagonal:paths`,
            where modules that share an input stand together, separated by `|`.
        tokens: read from the text; 0 where a file does not tell.
    """

    arrays: dict[str, Floats | StoredTensor]
    tokens: int = 0
    _names: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in self.arrays:
            kind, _, paths = name.partition(":")
            for path in paths.split("|"):
                self._names[kind, path] = paths

    @classmethod
    def open(cls, file: Path) -> Statistics:
        """Read a file's header.

        Raises:
            InputError: missing, damaged, or of another kind.
        """
        tensors, _ = read_header(file)
        kinds = {side + part for side in _SIDES for part in ("", ".sketch", ".diagonal")}
        if not tensors or any(name.partition(":")[0] not in kinds for name in tensors):
            raise InputError(
                "statistics-content",
                f"{file} holds no statistics: its tensors are not named input:... or output:...",
                hint="make them: prolora-tools compress ADAPTER -o OUT --calibrate TEXT --base BASE --statistics FILE",
            )
        return cls(dict(tensors))

    def save(self, file: Path) -> None:
        """Write the file, replacing one that is there.

        Raises:
            OutputError: it cannot be written.
        """
        part = file.with_name(f".{file.name}.{os.getpid()}")
        with writing(file):
            try:
                specs = [(name, "F32", tuple(x.shape)) for name, x in self.arrays.items()]
                write_safetensors(part, specs, lambda name: dtypes.encode(self._read(name), "F32").tobytes())
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)

    @property
    def outputs(self) -> bool:
        """Whether there are moments of output gradients."""
        return any(name.startswith("output") for name in self.arrays)

    def _read(self, name: str) -> Floats:
        found = self.arrays[name]
        return found.read().astype(np.float32) if isinstance(found, StoredTensor) else found

    def moments(self, path: str, side: str, dim: int) -> Moments | None:
        """The moments of a module's `input` or `output`, None where the statistics have none.

        Raises:
            MismatchError: they are of a module of other dims.
        """
        dense, sketch = self._names.get((side, path)), self._names.get((f"{side}.sketch", path))
        if dense is None and sketch is None:
            return None
        if dense is not None:
            matrix = self._read(f"{side}:{dense}").astype(np.float64)
            shapes = [matrix.shape, (dim, dim)]
        else:
            rows = self._read(f"{side}.sketch:{sketch}").astype(np.float64)
            diagonal = self._read(f"{side}.diagonal:{sketch}").astype(np.float64)
            shapes = [(*rows.shape[1:], *diagonal.shape), (dim, dim)]
        if shapes[0] != shapes[1]:
            raise MismatchError(
                "statistics-dims",
                f"the statistics of the {side}s of {path} are for {shapes[0][-1]} features, the adapter has {dim}",
                hint="they were made for another base; make them again with --calibrate TEXT --base BASE",
            )
        return Moments.of_matrix(matrix) if dense is not None else Moments.of_sketch(rows, diagonal)


def calibrate(
    adapter: str | Path,
    *,
    base: str | Path,
    text: str | Path,
    outputs: bool = False,
    tokens: int = 49_152,
    batch: int = 8,
    length: int = 256,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Statistics:
    """Collect the statistics of an adapter's modules on a text.

    Args:
        adapter: a LoRA folder.
        base: the base model's folder, with its tokenizer.
        text: a file of text, or .jsonl whose lines are strings or objects with a `text`.
        outputs: collect the moments of output gradients too, by a backward pass.
        tokens: how many to read, in windows spread evenly over the text.
        batch: windows a step.
        length: tokens a window.
        seed: of the labels and the sketches.
        device: torch's name of the device.
        progress: told of each finished window.

    Raises:
        RequestError: a number is out of its range, or the device is not there, has no float64 or too little memory.
        InputError: a file is missing or broken, or the text is shorter than one window.
        MismatchError: the base does not have the adapter's modules.
        UnsupportedError: DoRA, custom code, or gradients of a model without logits.
    """
    for name, value in (("tokens", tokens), ("batch", batch), ("length", length)):
        if value < 1:
            raise RequestError(
                "calibrate-number", f"{name} is {value}, expected at least 1", hint=f"give --calibrate-{name} 1 or more"
            )
    import torch  # noqa: PLC0415 - seconds of import

    try:
        torch.empty(0, dtype=torch.float64, device=device)  # what sums are kept in
    except (RuntimeError, AssertionError, TypeError) as error:  # as it is not built in, or has no float64
        raise RequestError(
            "calibrate-device",
            f"torch cannot use {device!r}: {first_line(error)}",
            hint="without --device the CPU is used",
        ) from error
    opened = Adapter.open(Path(adapter)).require_modules()
    if opened.dora:
        raise UnsupportedError(
            "calibrate-dora", f"{opened.folder} is a DoRA adapter", hint="DoRA can be merged, not compressed"
        )
    config = read_model_config(Path(base))
    limit = config.get("max_position_embeddings")
    windows = _windows(Path(base), Path(text), min(length, limit) if isinstance(limit, int) else length, tokens)
    model = _model(opened, Path(base), config)
    with _memory(device, "the model"):
        model = model.to(device)
    collector = _Collector(model, list(opened.modules), outputs, seed)
    generator = torch.Generator().manual_seed(seed)
    progress.start("calibrate", len(windows), "windows")
    with collector.watching():
        for start in range(0, len(windows), batch):
            ids = torch.tensor(windows[start : start + batch], device=device)
            with _memory(device, f"{len(ids)} windows of {len(windows[0]):,} tokens at once"):
                if outputs:
                    _sampled_loss(model, ids, generator)
                else:
                    with torch.no_grad():
                        model(ids)
            progress.advance(len(ids))
    return Statistics(collector.arrays(), len(windows) * len(windows[0]))


@contextmanager
def _memory(device: str, what: str) -> Iterator[None]:
    """Torch's error where the device cannot hold `what`, as a request that asked for too much."""
    import torch  # noqa: PLC0415 - loaded already

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RequestError(
            "calibrate-memory",
            f"{device} has not enough memory for {what}: {first_line(error)}",
            hint="give a smaller --calibrate-batch or --calibrate-length, or another --device",
        ) from error


def _model(adapter: Adapter, base: Path, config: dict[str, Any]) -> Any:
    """The base in float32 with the adapter added to its weights, from local files, without running foreign code."""
    import torch  # noqa: PLC0415 - seconds of import
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    cls = type(meta_model(base, config, adapter))
    logging.disable_progress_bar()
    try:
        model = cls.from_pretrained(base, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            "calibrate-model",
            f"transformers cannot load a model from {base}: {first_line(error)}",
            hint="give the base's whole folder, weights included",
        ) from error
    model.eval().requires_grad_(requires_grad=False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for path, stored in adapter.modules.items():
            if stored.kind == "linear":
                a, b = stored.factors()
                delta = torch.from_numpy(np.asarray(stored.scaling * (b @ a), dtype=np.float32))
                weight = modules[path].weight
                weight.add_(delta.T if isinstance(modules[path], Conv1D) else delta)
        for name, tensor in adapter.whole.items():
            if name in parameters and parameters[name].shape == tensor.shape:
                parameters[name].copy_(torch.from_numpy(np.asarray(tensor.read(), dtype=np.float32)))
    return model


def _sampled_loss(model: Any, ids: Any, generator: Any) -> None:
    """Back-propagate the negative log-likelihood of labels drawn from the model's own predictions."""
    import torch  # noqa: PLC0415 - loaded already

    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(requires_grad=True)
    logits = getattr(model(inputs_embeds=embedded), "logits", None)
    if logits is None:
        raise UnsupportedError(
            "calibrate-no-logits",
            f"{type(model).__name__} predicts no labels, so there are no gradients of its likelihood",
            hint="leave out --calibrate-outputs: inputs alone are collected for any model",
        )
    flat = logits.reshape(-1, logits.shape[-1])
    labels = torch.multinomial(flat.detach().float().softmax(dim=-1).cpu(), 1, generator=generator).squeeze(1)
    torch.nn.functional.cross_entropy(flat, labels.to(flat.device), reduction="sum").backward()  # type: ignore[no-untyped-call] # torch's own


class _Collector:
    """Hooks that sum up second moments. Modules that were given one and the same input share its sum."""

    def __init__(self, model: Any, paths: Sequence[str], outputs: bool, seed: int) -> None:
        import torch  # noqa: PLC0415 - loaded already

        self.modules = {path: module for path, module in model.named_modules() if path in set(paths)}
        # Of embeddings and convolutions the norm stays the Frobenius norm.
        self.modules = {p: m for p, m in self.modules.items() if type(m).__name__ in {"Linear", "Conv1D"}}
        self.outputs = outputs
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.leaders: dict[str, str] = {}
        self.last: tuple[Any, str] = (None, "")
        self.sums: dict[tuple[str, str], list[Any]] = {}
        self.seen: dict[tuple[str, str], int] = {}

    def watching(self) -> Any:
        """Hooks in place as long as the block lasts."""
        stack = ExitStack()
        for path, module in self.modules.items():
            stack.callback(module.register_forward_hook(self._forward(path)).remove)
            if self.outputs:
                stack.callback(module.register_full_backward_hook(self._backward(path)).remove)
        return stack

    def _forward(self, path: str) -> Any:
        def hook(_module: Any, inputs: Any, _output: Any) -> None:
            leader = self.leaders.get(path)
            if leader is None:
                leader = self.leaders[path] = self.last[1] if inputs[0] is self.last[0] else path
            if leader == path:
                self._add("input", path, inputs[0])
                self.last = inputs[0], path

        return hook

    def _backward(self, path: str) -> Any:
        def hook(_module: Any, _into: Any, gradients: Any) -> None:
            self._add("output", path, gradients[0])

        return hook

    def _add(self, side: str, path: str, values: Any) -> None:
        """Add the moments of (..., dim) values, float32 products summed in float64."""
        import torch  # noqa: PLC0415 - loaded already

        x = values.detach().reshape(-1, values.shape[-1]).float()
        dim = x.shape[1]
        if (side, path) not in self.sums:
            shapes = [(dim, dim)] if dim <= DENSE else [(ROWS, dim), (dim,)]
            self.sums[side, path] = [torch.zeros(s, dtype=torch.float64, device=x.device) for s in shapes]
            self.seen[side, path] = 0
        sums = self.sums[side, path]
        if dim <= DENSE:
            sums[0] += (x.T @ x).double()
        else:
            rows = torch.randint(ROWS, (len(x),), generator=self.generator).to(x.device)
            signs = torch.randint(2, (len(x), 1), generator=self.generator).to(x.device) * 2 - 1
            sums[0].index_add_(0, rows, (x * signs).double())
            sums[1] += (x**2).sum(dim=0).double()
        self.seen[side, path] += len(x)

    def arrays(self) -> dict[str, Floats | StoredTensor]:
        """Means over the tokens, under the names of a statistics file; the sums, twice as large, are gone after."""
        out: dict[str, Floats | StoredTensor] = {}
        for side, path in list(self.sums):
            sums = self.sums.pop((side, path))
            members = [p for p, leader in self.leaders.items() if leader == path] if side == "input" else [path]
            name = "|".join(sorted(members))
            count = self.seen[side, path]
            arrays = [x.cpu().numpy() for x in sums]
            if len(arrays) == 1:
                out[f"{side}:{name}"] = (arrays[0] / count).astype(np.float32)
            else:
                out[f"{side}.sketch:{name}"] = (arrays[0] / np.sqrt(count)).astype(np.float32)
                out[f"{side}.diagonal:{name}"] = (arrays[1] / count).astype(np.float32)
        return dict(sorted(out.items()))


def _windows(base: Path, text: Path, length: int, tokens: int) -> list[list[int]]:
    """Windows of `length` tokens, spread evenly over the text."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - seconds of import

    parts = list(_texts(text))
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            "calibrate-tokenizer",
            f"transformers cannot load a tokenizer from {base}: {first_line(error)}",
            hint="put the base's tokenizer files into its folder",
        ) from error
    ids = [i for part in parts for i in tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]]
    count = len(ids) // length
    if not count:
        raise InputError(
            "calibrate-text-short",
            f"{text} has {len(ids):,} tokens, expected at least one window of {length:,}",
            hint="give more text, or a smaller --calibrate-length",
        )
    wanted = max(min(count, tokens // length), 1)
    starts = [i * count // wanted * length for i in range(wanted)]
    return [ids[s : s + length] for s in starts]


def _texts(file: Path) -> Iterator[str]:
    """The whole file, or the texts of a .jsonl."""
    with reading(file):
        raw = file.read_bytes()
    try:
        content = raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "calibrate-text-encoding", f"{file} is not UTF-8: {error}", hint="convert it to UTF-8"
        ) from error
    if file.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
                yield value if isinstance(value, str) else str(value["text"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    "calibrate-jsonl",
                    f"{file}, line {number}: expected a JSON string or an object with a text",
                    hint='lines such as {"text": "..."}',
                ) from error
