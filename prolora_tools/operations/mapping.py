"""How transformers makes a model's parameters of a checkpoint's tensors: renames, stacks, chunks, swapped dims.

Its own mapping is run over the names of the checkpoint and of the adapter; what its operations do to shapes is known
here for the common ones, and any other is an error that names it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import MismatchError
from prolora_tools.files.adapter import AdapterModule
from prolora_tools.files.keys import matches_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prolora_tools.files.adapter import Adapter
    from prolora_tools.files.checkpoint import Checkpoint


@dataclass(frozen=True)
class Place:
    """A stored tensor that holds a parameter, or rows of it, or some of whose rows are the parameter.

    Attributes:
        key: the stored tensor.
        expert: which matrix of a stack (experts, rows, columns) it is; None for the whole parameter.
        first: the parameter's row that it begins with.
        rows: how many of the parameter's rows it holds; None for all.
        at: the stored tensor's row at which they begin.
        swapped: it is stored with its last two dims swapped.
    """

    key: str
    expert: int | None = None
    first: int = 0
    rows: int | None = None
    at: int = 0
    swapped: bool = False


@dataclass(frozen=True)
class Resolution:
    """Names of the model's parameters -> what is stored.

    Attributes:
        keys: parameter name -> the one checkpoint key that is this parameter.
        tied: parameter -> the parameter whose tensor it shares.
        in_out: parameters that are stored (in, out): transformers' Conv1D, and experts that say so.
        parts: parameters that are made of several stored tensors, or of a part of one -> where they are.
        refused: parameters that transformers makes of stored tensors in a way not known here -> how.
    """

    keys: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict)
    in_out: frozenset[str] = frozenset()
    parts: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def touched(adapter: Adapter) -> list[str]:
    """The parameter names that an adapter changes."""
    names = [m.weight_name for m in adapter.modules.values()] + [f"{path}.weight" for path in adapter.tokens]
    names += [f"{m.path}.bias" for m in adapter.modules.values() if "bias" in m.stored]
    return [*names, *adapter.whole]


def module_missing(adapter: Adapter, path: str) -> MismatchError:
    """The error for a module that the adapter should have factors for."""
    return MismatchError(
        "merge-module-missing",
        f"the adapter {adapter.folder} has no factors for {path}, which its targets pick, as they pick others",
        hint="the adapter is incomplete, or the base has more layers than the one it was trained on",
    )


class Mapping:
    """How transformers makes one model's parameters of a checkpoint's tensors."""

    def __init__(self, model: Any, base: Checkpoint) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - seconds of import
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key  # noqa: PLC0415
        from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

        transforms = get_model_conversion_mapping(model)
        self.renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self.converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self.natural: Callable[[str], list[tuple[Any, ...]]] = dot_natural_key
        self.model, self.base, self.parameters = model, base, model.state_dict()
        self.modules = dict(model.named_modules())
        self.keys: dict[str, str] = {}
        # parameter -> pattern of its converter -> keys, in the order in which transformers collects them
        self.sources: dict[str, dict[str, list[str]]] = {}
        for key in sorted(base.tensors, key=dot_natural_key):
            name, pattern = self.renamed(key)
            if pattern is None:
                self.keys.setdefault(name, key)
            else:
                self.sources.setdefault(name, {}).setdefault(pattern, []).append(key)
        parts: dict[str, tuple[Place, ...]] = {}
        refused: dict[str, str] = {}
        for name, sources in self.sources.items():
            converter = next(c for c in self.converters if next(iter(sources)) in c.source_patterns)
            try:
                parts |= self.parts(name, converter, sources)
            except _UnknownError as error:
                refused |= dict.fromkeys(self.targets(name, converter), str(error))
        in_out = {f"{path}.weight" for path, module in self.modules.items() if isinstance(module, Conv1D)}
        for path, module in self.modules.items():
            if getattr(module, "is_transposed", False):
                in_out |= {f"{path}.{name}" for name, p in module.named_parameters(recurse=False) if p.dim() == 3}
        tied = {
            name: source
            for name, source in model.all_tied_weights_keys.items()
            if source in self.keys or source in parts
        }
        self.resolution = Resolution(self.keys, tied, frozenset(in_out), parts, refused)

    def renamed(self, key: str) -> tuple[str, str | None]:
        """The parameter that a stored name stands for, and the pattern of the converter that makes it."""
        from transformers.core_model_loading import rename_source_key  # noqa: PLC0415 - seconds of import

        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self.renamings, self.converters, prefix, self.parameters)
        if name not in self.parameters and key in self.parameters:  # transformers' loader takes such a rename back
            name, pattern = rename_source_key(key, [], [], prefix, self.parameters)
        return name, pattern

    def targets(self, name: str, converter: Any) -> list[str]:
        """The parameters that a converter makes, of which `name` is the first."""
        first, *others = converter.target_patterns
        start, _, end = name.partition(first)
        return [name, *(start + other + end for other in others)]

    def parts(self, name: str, converter: Any, sources: dict[str, list[str]]) -> dict[str, tuple[Place, ...]]:
        """Where the parameters that a converter makes are stored; the operations known here are the common ones.

        Raises:
            _UnknownError: others, or the tensors at hand do not fill the parameter.
        """
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
        lists = [sources[p] for p in converter.source_patterns if p in sources]
        names = self.targets(name, converter)
        if any(n not in self.parameters for n in names):
            raise _UnknownError(f"{names[-1]} is no parameter of the model")
        shape = tuple(self.parameters[name].shape)
        if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) and len(names) == 1:
            return {name: self.stacked(name, lists, shape)}
        if steps == [("Concatenate", 0)] and len(names) == 1:
            return {name: self.joined(name, [key for keys in lists for key in keys], shape[0])}
        if steps == [("Chunk", 0)] and len(lists) == 1 and len(lists[0]) == 1:
            return self.chunks(names, lists[0][0])
        dims = [(getattr(op, "dim0", None), getattr(op, "dim1", None)) for op in converter.operations]
        last_two = (len(shape) - 2, len(shape) - 1)
        if [s for s, _ in steps] == ["Transpose"] and dims == [last_two] and len(lists) == 1 and len(lists[0]) == 1:
            same = converter.operations[0].check_dims and self.base.tensors[lists[0][0]].shape == shape
            return {name: (Place(lists[0][0], swapped=not same),)}
        raise _UnknownError(" and ".join(step for step, _ in steps))

    def stacked(self, name: str, lists: list[list[str]], shape: tuple[int, ...]) -> tuple[Place, ...]:
        """Experts stored one by one, each in as many tensors as there are lists, rows after rows."""
        if len(shape) != 3 or any(len(keys) != shape[0] for keys in lists):
            raise _UnknownError(f"{name} is {list(shape)}, of {', '.join(str(len(keys)) for keys in lists)} tensors")
        places: list[Place] = []
        for expert, keys in enumerate(zip(*lists, strict=True)):
            places += self.joined(name, keys, shape[1], expert)
        return tuple(places)

    def joined(self, name: str, keys: Iterable[str], rows: int, expert: int | None = None) -> tuple[Place, ...]:
        """Tensors whose rows follow each other and make up all rows of the parameter."""
        places, first = [], 0
        for key in keys:
            places.append(Place(key, expert, first, self.base.tensors[key].shape[0]))
            first += self.base.tensors[key].shape[0]
        if first != rows:
            raise _UnknownError(f"{name} has {rows} rows, its stored tensors {first}")
        return tuple(places)

    def chunks(self, names: list[str], key: str) -> dict[str, tuple[Place, ...]]:
        """Parameters that are equal spans of one stored tensor's rows."""
        rows, rest = divmod(self.base.tensors[key].shape[0], len(names))
        if rest or any(self.parameters[n].shape[0] != rows for n in names):
            raise _UnknownError(f"{key} cannot be cut into {len(names)} equal parts")
        return {n: (Place(key, rows=rows, at=i * rows),) for i, n in enumerate(names)}

    def bind(self, adapter: Adapter) -> Adapter | None:
        """The adapter in the model's names, its target_parameters found; None if the model lacks a module of it."""
        names: dict[str, str] = {}
        own = {module.weight_name for module in adapter.modules.values()}
        singles: dict[tuple[str, str], list[str]] = {}
        for name in touched(adapter):
            if name in self.parameters or name in self.resolution.tied:
                continue
            if name in self.base.tensors:  # one expert's own weight, which transformers would fuse
                self.keys[name] = name
                continue
            new, pattern = self.renamed(name)
            if pattern is not None:
                singles.setdefault((new, pattern), []).append(name)
            elif new in self.parameters:
                names[name] = new
            elif name in own and name.rpartition(".")[0] not in self.modules:
                return None
        for (new, pattern), adapted in singles.items():  # the i-th of the adapter's is the i-th of the base's
            stored = self.sources.get(new, {}).get(pattern, [])
            if len(stored) != len(adapted):
                return None
            self.keys |= dict(zip(sorted(adapted, key=self.natural), stored, strict=True))
        if any(path not in self.modules for path in adapter.wrapped):
            return None
        return self.with_parameters(_renamed(adapter, names) if names else adapter)

    def lacking(self, adapter: Adapter) -> str:
        """The first module that the model does not have."""
        paths = [*adapter.modules, *adapter.wrapped]
        return next((path for path in paths if path not in self.modules), paths[0])

    def with_parameters(self, adapter: Adapter) -> Adapter:
        """Find the parameter behind each wrapper: PEFT wraps a module's targeted ones in the order it holds them."""
        modules, targets = dict(adapter.modules), adapter.config.target_parameters
        for path, module in self.modules.items() if targets else ():
            own = module.named_parameters(recurse=False)
            held = {n: p for n, p in own if matches_parameter(targets, f"{path}.{n}")}
            factors = adapter.wrapped.get(path, ())
            if len(held) != len(factors):
                raise module_missing(adapter, f"{path}.{list(held)[-1]}" if held else path)
            for (name, parameter), stored in zip(held.items(), factors, strict=True):
                experts = parameter.shape[0] if parameter.dim() == 3 else 1
                rank = adapter.config.rank(f"{path}.{name}")
                a, b = stored["A"], stored["B"]
                if a.shape[0] != experts * rank:
                    raise MismatchError(
                        "merge-parameter-rank",
                        f"{a.name!r} has {a.shape[0]} rows in {a.file}, expected rank {rank} for each of the {experts} "
                        f"experts of {path}.{name}",
                        hint=adapter.config.base_hint,
                    )
                scaling, rank_only = adapter.config.scaling(f"{path}.{name}"), Geometry.lora(rank)
                made = AdapterModule(
                    path, "linear", a.shape[1], b.shape[0], rank_only, scaling, stored, name, experts
                )  # fmt: skip
                modules[path if name == "weight" else f"{path}.{name}"] = made
        return replace(adapter, modules=modules, wrapped={})


class _UnknownError(Exception):
    """Why a parameter's stored tensors are not understood."""


def _renamed(adapter: Adapter, names: dict[str, str]) -> Adapter:
    """The adapter under the model's names, as PEFT's own loading renames it."""

    def path(old: str) -> str:
        return names.get(f"{old}.weight", f"{old}.weight").removesuffix(".weight")

    modules = {path(p): replace(m, path=path(p)) for p, m in adapter.modules.items()}
    whole = {names.get(name, name): tensor for name, tensor in adapter.whole.items()}
    return replace(adapter, modules=modules, whole=whole, tokens={path(p): t for p, t in adapter.tokens.items()})
