"""Adapter.open(): LoRA and PRoLoRA folders behind one face.

An adapter is modules, each of which gives its factors A (r, in), B (out, r) and its scaling, and whole tensors
that go with them (biases, modules_to_save, embeddings of a resized vocabulary, rows of trainable tokens).
Every tensor of the file is used exactly once; one that has no place, or has its other half missing, is an error.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prolora_tools.core.sharing import expand
from prolora_tools.errors import InputError, UnsupportedError
from prolora_tools.files import dtypes, keys
from prolora_tools.files.checkpoint import require_folder
from prolora_tools.files.config import FILE, AdapterConfig, dump
from prolora_tools.files.pickled import read_whole
from prolora_tools.files.tensors import StoredTensor, check_finite, read_header
from prolora_tools.files.writer import write_file, write_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from prolora_tools.core.geometry import Geometry
    from prolora_tools.files.dtypes import Floats
    from prolora_tools.progress import Progress

SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"

Kind = Literal["linear", "conv", "embedding"]

# Names under which transformers models keep their token embeddings and output heads; PEFT saves these whole,
# without a mark in the config, when the vocabulary was resized or an embedding is targeted.
_EMBEDDINGS = re.compile(
    r"(.*\.)?(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out|tok_embeddings|embeddings|shared|output"
    r"|decoder|embedding)"
)


@dataclass(frozen=True)
class AdapterModule:
    """One adapted module.

    Attributes:
        path: its module path in the base model.
        kind: linear (Linear and Conv1D), conv or embedding.
        in_features: columns of A; for a convolution input channels times kernel size, for an embedding the vocabulary.
        out_features: rows of B.
        geometry: its PRoLoRA shape; LoRA is all unshared.
        scaling: what B A is multiplied with.
        stored: its tensors by role.
        parameter: the parameter of the module that it changes.
        experts: matrices in that parameter, (experts, out, in). Of several, A is (experts * r, in), expert by expert,
            and B (out, r * experts), rank by rank (PEFT's ParamWrapper).
    """

    path: str
    kind: Kind
    in_features: int
    out_features: int
    geometry: Geometry
    scaling: float
    stored: dict[str, StoredTensor]
    parameter: str = "weight"
    experts: int = 1

    @property
    def weight_name(self) -> str:
        """The name of the parameter in the base model."""
        return f"{self.path}.{self.parameter}"

    @property
    def prolora(self) -> bool:
        """Whether it is stored in chunks."""
        return "A_unshared" in self.stored

    @property
    def dtype(self) -> str:
        """The dtype of its A factor."""
        return self.stored["A"].dtype

    @property
    def dora(self) -> bool:
        """Whether it has a DoRA magnitude."""
        return "magnitude" in self.stored

    @property
    def a_dims(self) -> tuple[int, ...]:
        """The dims of A behind the rank: (in,), or (in channels, kernel...) of a convolution."""
        return self.stored["A_unshared" if self.prolora else "A"].shape[1:]

    @property
    def parameters(self) -> int:
        """Stored numbers of its factors; a bias or a magnitude is counted with the other tensors."""
        return sum(t.items for t in self._factor_tensors())

    @property
    def n_bytes(self) -> int:
        """Stored bytes of its factors."""
        return sum(t.n_bytes for t in self._factor_tensors())

    def _factor_tensors(self) -> Iterator[StoredTensor]:
        return (t for role, t in self.stored.items() if role not in {"bias", "magnitude"})

    def read(self, role: str) -> Floats:
        """One stored tensor in float32 (float64 if stored so), checked to be finite."""
        tensor = self.stored[role]
        values = tensor.read()
        check_finite(values, tensor)
        return values

    def factors(self) -> tuple[Floats, Floats]:
        """Full factors A (r, in) and B (out, r), float32 (float64 if stored so); B is a view of rank-first memory.

        Raises:
            InputError: a value is inf or nan, or the file cannot be read.
        """
        a, bt = self.chunked()
        if not self.prolora:
            return a, bt.T
        a_full = expand(a, self.geometry.a, self.in_features)
        bt_full = expand(bt, self.geometry.b, self.out_features)
        return (
            np.concatenate([a_full, self._flat("A_unshared")]),
            np.concatenate([bt_full, self._flat("B_unshared").T]).T,
        )

    def expert_factors(self) -> tuple[Floats, Floats]:
        """The factors expert by expert: A (experts, r, in) and B (experts, out, r)."""
        a, b = self.factors()
        shape = (self.experts, self.geometry.rank)
        return a.reshape(*shape, -1), np.ascontiguousarray(b.reshape(-1, *reversed(shape)).transpose(2, 0, 1))

    def chunked(self) -> tuple[Floats, Floats]:
        """What is stored under A and B, rank-first: the chunks of a PRoLoRA, the whole factors of a LoRA."""
        return self._flat("A"), self._flat("B").T

    def _flat(self, role: str) -> Floats:
        """A factor as a matrix, kernel dims folded into the columns: A (ranks, columns), B (rows, ranks)."""
        values = self.read(role)
        return values.reshape(values.shape[0], -1) if values.size else values.reshape(_matrix(values.shape))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, opened by its headers.

    Attributes:
        folder: where it lies.
        file: the weights file that was read.
        config: its configuration.
        modules: adapted modules by path, sorted.
        whole: base tensor name -> the stored tensor that replaces it (modules_to_save, biases, embeddings).
        tokens: embedding path -> rows that replace the base's, for config's trainable_token_indices.
        notes: what a reader should be told, such as a second weights file that was not read.
        wrapped: module path -> the A and B tensors of each of its target_parameters, in the order in which PEFT
            wrapped them, which is that of the module's parameters. Which those are, only the base model tells.
    """

    folder: Path
    file: Path
    config: AdapterConfig
    modules: dict[str, AdapterModule]
    whole: dict[str, StoredTensor]
    tokens: dict[str, StoredTensor]
    notes: tuple[str, ...] = ()
    wrapped: dict[str, tuple[dict[str, StoredTensor], ...]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read the config and the header of the weights file and account for every tensor.

        Raises:
            InputError: a file is missing or broken, or config and tensors disagree.
            UnsupportedError: a kind of adapter that is refused.
        """
        require_folder(folder)
        config = AdapterConfig.read(folder)
        file, notes = _weights_file(folder)
        tensors = read_weights(file)
        return _Sorter(folder, file, config, tensors, notes).adapter()

    @property
    def dora(self) -> bool:
        """Whether any module has a DoRA magnitude."""
        return any(m.dora for m in self.modules.values())

    @property
    def other_tensors(self) -> list[StoredTensor]:
        """Everything but the modules' factors: whole weights, token rows, biases, magnitudes, target_parameters."""
        beside = [m.stored[r] for m in self.modules.values() for r in ("bias", "magnitude") if r in m.stored]
        wrapped = [tensor for factors in self.wrapped.values() for pair in factors for tensor in pair.values()]
        return [*self.whole.values(), *self.tokens.values(), *beside, *wrapped]

    @property
    def tensor_count(self) -> int:
        """Tensors in its file."""
        factors = sum(role not in {"bias", "magnitude"} for m in self.modules.values() for role in m.stored)
        return factors + len(self.other_tensors)

    def require_modules(self) -> Adapter:
        """This adapter. Raises UnsupportedError where it has factors on parameters, which are not known by name."""
        if self.wrapped:
            raise UnsupportedError(
                "adapter-target-parameters",
                f"{self.folder}: target_parameters is set, and {next(iter(self.wrapped))} has factors on parameters "
                "such as fused experts, which only merge, verify and stats handle",
                hint="prolora-tools merge it into its base, or train the adapter with target_modules",
            )
        return self

    def token_indices(self, path: str) -> list[int]:
        """The rows of the embedding `path` that trainable tokens replace, in the order of their tensor."""
        raw = self.config.raw.get("trainable_token_indices")
        if isinstance(raw, dict):
            key = keys.pattern_key({re.escape(k): None for k in raw}, path)
            raw = next((v for k, v in raw.items() if re.escape(k) == key), None)
        indices = raw if isinstance(raw, list) else None
        rows = self.tokens[path].shape[0]
        if indices is None or len(indices) != rows or not all(type(i) is int and i >= 0 for i in indices):
            raise InputError(
                "adapter-token-indices",
                f"{self.folder}: trainable_token_indices does not list the {rows} rows that {path} has",
                hint="config and weights are of different adapters; save the adapter again",
            )
        return list(indices)


def is_embedding(path: str) -> bool:
    """Whether a module path ends in a name that transformers models give token embeddings and output heads."""
    return _EMBEDDINGS.fullmatch(path) is not None


def _weights_file(folder: Path) -> tuple[Path, tuple[str, ...]]:
    safe, pickled = folder / SAFETENSORS, folder / BIN
    if safe.is_file():
        both = (f"{BIN} is there too and was not read; {SAFETENSORS} was",) if pickled.is_file() else ()
        return safe, both
    if pickled.is_file():
        return pickled, ()
    raise InputError(
        "adapter-no-weights",
        f"{folder} has neither {SAFETENSORS} nor {BIN}",
        hint="the download is incomplete, or this is not an adapter folder",
    )


def read_weights(file: Path) -> dict[str, StoredTensor]:
    """The tensors of an adapter's weights file, safetensors by its header or `.bin` by torch's weights_only loader.

    Raises:
        InputError: it is missing or broken, or holds anything but float tensors.
    """
    return read_header(file)[0] if file.suffix == ".safetensors" else read_whole(file)


class _Sorter:
    """Gives every tensor of an adapter file its place, or says why it has none."""

    def __init__(
        self, folder: Path, file: Path, config: AdapterConfig, tensors: dict[str, StoredTensor], notes: tuple[str, ...]
    ) -> None:
        self.folder, self.file, self.config, self.tensors = folder, file, config, tensors
        self.notes = list(notes)
        self.whole: dict[str, StoredTensor] = {}
        self.tokens: dict[str, StoredTensor] = {}

    def adapter(self) -> Adapter:
        parts: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, tensor in self.tensors.items():
            if not name.startswith(keys.PREFIX):
                raise InputError(
                    "adapter-key-prefix",
                    f"{self.file}: the key {name!r} does not start with {keys.PREFIX!r}",
                    hint="keys must be as PEFT's save_pretrained() writes them",
                )
            tensor.require_float()
            short = name.removeprefix(keys.PREFIX)
            place = keys.parse(short, prolora=self.config.prolora)
            if place is None:
                self.place_whole(short, tensor)
            elif place[1] == "tokens":
                self.tokens[place[0]] = tensor
            else:
                parts[place[0]][place[1]] = tensor
        wrapped = self.wrapped_factors(parts)
        if not parts and not wrapped:
            raise InputError(
                "adapter-empty",
                f"{self.file} holds no {'PRoLoRA' if self.config.prolora else 'LoRA'} factors",
                hint="the adapter was saved without its weights, or peft_type is wrong",
            )
        modules = {path: self.module(path, parts[path]) for path in sorted(parts)}
        self.check_patterns(list(modules))
        notes = tuple(self.notes)
        return Adapter(self.folder, self.file, self.config, modules, self.whole, self.tokens, notes, wrapped)

    def wrapped_factors(
        self, parts: dict[str, dict[str, StoredTensor]]
    ) -> dict[str, tuple[dict[str, StoredTensor], ...]]:
        """Take the factors of target_parameters out of `parts`: those of modules that target_modules does not pick."""
        found: dict[str, dict[int, dict[str, StoredTensor]]] = defaultdict(dict)
        for name in list(parts) if self.config.target_parameters else []:
            path, depth = keys.unwrapped(name)
            if keys.matches_target(self.config.target_modules, path):
                continue
            stored = parts.pop(name)
            if lacking := sorted({"A", "B"} - set(stored)):
                raise self.incomplete(name, sorted(stored), keys.lora_key(name, lacking[0]))
            if extra := sorted(set(stored) - {"A", "B"}):
                raise self.shape_error(name, stored[extra[0]], "nothing beside A and B for target_parameters")
            a, b = stored["A"], stored["B"]
            if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or 0 in (*a.shape, *b.shape):
                raise self.shape_error(name, b, f"two dims, the second as A's first, which is {list(a.shape)}")
            found[path][depth] = stored
        for path, wrappers in found.items():
            for depth in range(len(wrappers)):
                if depth not in wrappers:
                    name = path + ".base_layer" * depth
                    raise self.incomplete(name, [], keys.lora_key(name, "A"))
        return {
            path: tuple(found[path][depth] for depth in sorted(found[path], reverse=True)) for path in sorted(found)
        }

    def incomplete(self, path: str, held: list[str], missing: str) -> InputError:
        return InputError(
            "adapter-missing-tensor",
            f"{self.file}: {path} has {', '.join(held) or 'no factors'}, and {missing!r} is missing",
            hint="the file is incomplete; save or download the adapter again",
        )

    def place_whole(self, short: str, tensor: StoredTensor) -> None:
        """A whole weight or bias: allowed where the config, or PEFT's rule for embeddings, says so."""
        if short.endswith((".lora_A_vec", ".lora_B_vec")):
            raise UnsupportedError(
                "adapter-official-raw",
                f"{self.file} is a raw training checkpoint of the official PRoLoRA code ({tensor.name!r})",
                hint=f"prolora-tools convert-official {self.folder} -o OUT",
            )
        target = short.replace(".base_layer.", ".")
        path, _, parameter = target.rpartition(".")
        saved = self.config.raw.get("modules_to_save")
        names = [saved] if isinstance(saved, str) else saved if isinstance(saved, list) else []
        in_saved = any(f".{name}." in f".{target}" for name in names)
        bias = parameter == "bias" and self.config.bias != "none"
        embedding = parameter in {"weight", "bias"} and is_embedding(path)
        if not (in_saved or bias or embedding) or target in self.whole:
            raise InputError(
                "adapter-unused-tensor",
                f"{self.file}: {tensor.name!r} has no place: it is no factor, no bias or module that the config "
                "says was saved, and no embedding",
                hint="a tensor that is not understood is not dropped; check peft_type, bias and modules_to_save",
            )
        self.whole[target] = tensor

    def module(self, path: str, parts: dict[str, StoredTensor]) -> AdapterModule:
        """Check one module's tensors against each other and the config."""
        embedding = any(role.startswith("embedding_") for role in parts)
        stored = {role.removeprefix("embedding_"): t for role, t in parts.items()}
        needed = ["A", "B", *(["A_unshared", "B_unshared"] if self.config.prolora else [])]
        if missing := [role for role in needed if role not in stored]:
            made = keys.prolora_key if self.config.prolora else keys.lora_key
            role = ("embedding_" if embedding else "") + missing[0]
            raise self.incomplete(path, sorted(parts), made(path, role))
        self.check_target(path)
        geometry = self.config.geometry(path)
        a, b = stored["A"], stored["B"]
        whole_a = stored.get("A_unshared", a)
        whole_b = stored.get("B_unshared", b)
        if min(len(t.shape) for t in (a, b, whole_a, whole_b)) < 2:
            raise self.shape_error(path, a, "at least 2 dims, rank first")
        in_features, out_features = math.prod(whole_a.shape[1:]), whole_b.shape[0]
        kind: Kind = "embedding" if embedding else "conv" if len(whole_a.shape) > 2 else "linear"
        expected: dict[str, tuple[int, ...]]
        kernel = (1,) * (len(whole_b.shape) - 2)
        if self.config.prolora:
            expected = {
                "A": (geometry.shared, geometry.a.width(in_features)),
                "B": (geometry.b.width(out_features), geometry.shared),
                "A_unshared": (geometry.unshared, *whole_a.shape[1:]),
                "B_unshared": (out_features, geometry.unshared, *kernel),
            }
        else:
            expected = {"A": (geometry.rank, *a.shape[1:]), "B": (out_features, geometry.rank, *kernel)}
        if "bias" in stored:
            expected["bias"] = (out_features,)
        for role, shape in expected.items():
            if stored[role].shape != shape:
                why = geometry if self.config.prolora else f"r={geometry.rank}"
                raise self.shape_error(path, stored[role], f"{list(shape)} for {why}")
        if len(whole_b.shape) != len(whole_a.shape) or in_features == 0 or out_features == 0:
            raise self.shape_error(path, whole_b, f"as many dims as A's {list(whole_a.shape)}, none of them 0")
        self.check_magnitude(path, stored, out_features)
        return AdapterModule(path, kind, in_features, out_features, geometry, self.config.scaling(path), stored)

    def check_magnitude(self, path: str, stored: dict[str, StoredTensor], out_features: int) -> None:
        magnitude = stored.get("magnitude")
        if (magnitude is not None) != self.config.use_dora:
            raise InputError(
                "adapter-dora",
                f"{self.file}: use_dora is {str(self.config.use_dora).lower()} in the config, and {path} has "
                f"{'a' if magnitude else 'no'} lora_magnitude_vector",
                hint="config and weights are of different adapters; save the adapter again",
            )
        if magnitude is not None and magnitude.items != out_features:
            raise self.shape_error(path, magnitude, f"{out_features} numbers, one an output")

    def shape_error(self, path: str, tensor: StoredTensor, expected: str) -> InputError:
        return InputError(
            "adapter-shape",
            f"{self.file}: {tensor.name!r} has the shape {list(tensor.shape)}, expected {expected}",
            hint=f"r, the patterns or the chunks in the config do not fit the tensors of {path}",
        )

    def check_target(self, path: str) -> None:
        if self.config.target_modules is not None and not keys.matches_target(self.config.target_modules, path):
            raise InputError(
                "adapter-target-modules",
                f"{self.file}: {path} has factors, and the config's target_modules does not pick it",
                hint="config and weights are of different adapters; save the adapter again",
            )

    def check_patterns(self, paths: list[str]) -> None:
        """Tell of alpha patterns that overlap: the first in file order holds, which JSON tools may reorder."""
        for path in paths:
            hits = [p for p in self.config.alpha_pattern if keys.pattern_key({p: None}, path)]
            if len({self.config.alpha_pattern[p] for p in hits}) > 1:
                self.notes.append(f"alpha_pattern: {' and '.join(map(repr, hits))} both match {path}; the first holds")
                return


@dataclass(frozen=True)
class FactorSpec:
    """One factor to write: its tensor name, and whose it is."""

    name: str
    path: str
    role: str
    dtype: str
    shape: tuple[int, ...]


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    specs: Iterable[FactorSpec],
    factors: Callable[[str], dict[str, Floats]],
    copied: dict[str, StoredTensor],
    progress: Progress,
) -> None:
    """Write an adapter into a staged folder, one module in memory at a time, and open it again.

    Args:
        folder: the stage.
        config: adapter_config.json.
        specs: every factor.
        factors: gives a module's arrays by role; called once a module, in the order of the file.
        copied: tensor name -> the stored tensor whose bytes go there.
        progress: told of each finished module.
    """
    by_name = {spec.name: spec for spec in specs}
    at_hand: tuple[str, dict[str, Floats]] = ("", {})

    def data(name: str) -> bytes:
        nonlocal at_hand
        if name in copied:
            return copied[name].read_bytes()
        spec = by_name[name]
        if at_hand[0] != spec.path:  # a module's tensors follow each other in the file
            at_hand = (spec.path, factors(spec.path))
            progress.advance(1)
        carrier = dtypes.encode(at_hand[1][spec.role], spec.dtype)
        if not dtypes.all_finite(carrier):
            raise InputError(
                "factor-overflow",
                f"factor {spec.role} of {spec.path} has numbers that {spec.dtype} cannot hold",
                hint="choose a wider type, such as --dtype float32",
            )
        return carrier.tobytes()

    all_specs = [(s.name, s.dtype, s.shape) for s in by_name.values()]
    all_specs += [(name, t.dtype, t.shape) for name, t in copied.items()]
    write_safetensors(folder / SAFETENSORS, all_specs, data)
    write_file(folder / FILE, dump(config))
    Adapter.open(folder)  # what we wrote must open
