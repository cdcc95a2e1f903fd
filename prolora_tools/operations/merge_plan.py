"""What a merged model consists of, decided from headers alone: each output tensor and what it is made of."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from prolora_tools.errors import MismatchError, RequestError, UnsupportedError
from prolora_tools.files import dtypes, keys
from prolora_tools.files.adapter import is_embedding
from prolora_tools.files.quantised import ORIGINAL, QuantisedTensor
from prolora_tools.operations.mapping import Place, Resolution, module_missing, touched
from prolora_tools.operations.resolution import missing, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prolora_tools.files.adapter import Adapter, AdapterModule
    from prolora_tools.files.checkpoint import Checkpoint
    from prolora_tools.files.tensors import StoredTensor


@dataclass(frozen=True)
class Update:
    """A module's part in one tensor, and the weight of its adapter.

    Attributes:
        module: whose delta it is.
        weight: of the adapter.
        expert: which of the module's deltas.
        first: the delta's row that the part begins with.
        rows: how many rows it has; None for all from `first` on.
        at: the tensor's row at which the part is added.
    """

    module: AdapterModule
    weight: float = 1.0
    expert: int = 0
    first: int = 0
    rows: int | None = None
    at: int = 0

    @property
    def scaling(self) -> float:
        """What its product, or its bias, is multiplied with."""
        return self.module.scaling * self.weight


@dataclass(frozen=True)
class TokenRows:
    """Rows of an embedding that replace the base's (PEFT's trainable tokens)."""

    stored: StoredTensor
    indices: list[int]


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the merged model.

    Attributes:
        name: its key in the output.
        dtype: its dtype in the output.
        source: the stored tensor it starts from, the base's or the adapter's own.
        updates: the modules whose deltas are added, in this order.
        transposed: the weight is stored (in, out), as Conv1D and Embedding are.
        biases: the modules whose lora_bias, times its scaling, is added.
        tokens: rows to replace.
        replaced: whether `source` is the adapter's.
    """

    name: str
    dtype: str
    source: StoredTensor
    updates: tuple[Update, ...] = ()
    transposed: bool = False
    biases: tuple[Update, ...] = ()
    tokens: TokenRows | None = None
    replaced: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dims."""
        return self.source.shape

    @property
    def n_bytes(self) -> int:
        """Its size in the output."""
        return self.source.items * dtypes.ITEM_BITS[self.dtype] // 8

    @property
    def changed(self) -> bool:
        """Whether the adapter has a part in it."""
        return self.replaced or bool(self.updates or self.biases) or self.tokens is not None

    @property
    def copied(self) -> bool:
        """Whether its bytes are the source's."""
        as_stored = self.dtype == self.source.dtype and not isinstance(self.source, QuantisedTensor)
        return as_stored and not self.updates and not self.biases and self.tokens is None

    @property
    def change(self) -> str:
        """What the adapters do to it, in words; empty where they do nothing."""
        parts = ["replaced by the adapter's"] if self.replaced else []
        parts += [text + f" ({n} experts)" * (n > 1) for text, n in Counter(map(self._added, self.updates)).items()]
        parts += [f"+ {u.scaling:.6g} lora_bias" for u in self.biases]
        if self.tokens is not None:
            parts.append(f"{len(self.tokens.indices)} rows replaced")
        return "; ".join(parts)

    def _added(self, update: Update) -> str:
        module = update.module
        kind = "DoRA" if module.dora else "PRoLoRA" if module.prolora else "LoRA"
        owner = f" of {module.weight_name}" if module.weight_name != self.name else ""
        return f"+ {update.scaling:.6g} B A{owner}, {kind} of rank {module.geometry.rank}"

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) as it is walked: a vector as one column, a stack's matrices one below the other.

        A convolution's kernel goes with its columns where a delta is added, since B A has them there.
        """
        if not self.shape or not self.source.items:
            return (1, 1)
        lead = 1 if len(self.shape) == 1 or any(u.module.kind == "conv" for u in self.updates) else len(self.shape) - 1
        rows = math.prod(self.shape[:lead])
        return (rows, self.source.items // rows)


@dataclass(frozen=True)
class MergePlan:
    """A whole merge, decided.

    Attributes:
        tensors: every tensor of the output by key, in the base's order.
        new: keys that the base's checkpoint does not have.
        untied: whether embedding and head part ways.
        vocab_size: the new number of embedding rows, None where it stays.
        old_vocab_size: the base's number of them, None where it stays.
    """

    tensors: dict[str, OutputTensor]
    new: tuple[str, ...]
    untied: bool
    vocab_size: int | None
    old_vocab_size: int | None


def plan_of(
    adapters: Sequence[Adapter], base: Checkpoint, weights: Sequence[float], scale: float, dtype: str | None
) -> tuple[MergePlan, list[float]]:
    """The plan of one or several adapters, and what each one's deltas are multiplied with.

    Args:
        adapters: the adapters, in the order in which their deltas are added.
        base: the base's checkpoint.
        weights: one for each adapter; none for 1 each.
        scale: multiplies all of them.
        dtype: as in `plan_merge`.

    Raises:
        RequestError: another number of weights than adapters, or one that is not finite.
        UnsupportedError, MismatchError: as `plan_merge` and `combine`.
    """
    weights = list(weights) or [1.0] * len(adapters)
    if len(weights) != len(adapters) or not all(map(math.isfinite, (scale, *weights))):
        raise RequestError(
            "merge-weights",
            f"{len(weights)} weights, scale {scale:g}, for {len(adapters)} adapters: expected a finite number for each",
            hint="give --weight once an adapter, in their order, or not at all",
        )
    scaled = [scale * weight for weight in weights]
    return combine([plan_merge(a, base, dtype) for a in adapters], adapters, scaled), scaled


def plan_merge(adapter: Adapter, base: Checkpoint, dtype: str | None) -> MergePlan:
    """Decide every output tensor.

    Args:
        adapter: the adapter.
        base: the base's checkpoint.
        dtype: the output dtype of every float tensor, None to keep each one's.

    Raises:
        UnsupportedError: a base whose tensors do not map one to one, or are quantised the other way round.
        MismatchError: adapter and base do not belong together.
    """
    bound, resolution = resolve(adapter, base)
    _refuse_turned(base, resolution)
    _check_coverage(bound, resolution)
    changes = _Planner(bound, base, resolution)
    tensors = {key: changes.output(key) for key in base.tensors}
    new = tuple(sorted(changes.new))
    for key in new:
        tensors[key] = changes.new[key]
    if dtype is not None:
        tensors = {k: replace(t, dtype=dtype) if t.dtype in dtypes.FLOATS else t for k, t in tensors.items()}
    sizes = changes.vocabulary()
    return MergePlan(tensors, new, changes.untied, *sizes)


def combine(plans: Sequence[MergePlan], adapters: Sequence[Adapter], weights: Sequence[float]) -> MergePlan:
    """One plan of several adapters' plans for one base and dtype: W + weight * scaling * (B A) of each, in order.

    Args:
        plans: what each adapter does alone.
        adapters: the adapters, for messages.
        weights: what each adapter's deltas are multiplied with.

    Raises:
        MismatchError: two adapters change one tensor in ways that have no sum.
        UnsupportedError: a weight other than 1 for an adapter that does more than add.
    """
    tensors: dict[str, OutputTensor] = {}
    owners: dict[str, int] = {}
    for i, (plan, weight) in enumerate(zip(plans, weights, strict=True)):
        for key, tensor in plan.tensors.items():
            if tensor.changed and weight != 1 and not _additive(tensor):
                raise UnsupportedError(
                    "merge-weight",
                    f"the adapter {adapters[i].folder} replaces {key!r} or its norms, which has no {weight:g} times",
                    hint="give it the weight 1, or leave it out",
                )
            held, added = tensors.get(key), _weighted(tensor, weight)
            if held is None or not held.changed:
                tensors[key] = added
            elif added.changed:
                if not (_additive(held) and _additive(added) and held.transposed == added.transposed):
                    raise _conflict(key, adapters[owners[key]], adapters[i])
                updates, biases = held.updates + added.updates, held.biases + added.biases
                tensors[key] = replace(held, updates=updates, biases=biases)
            if added.changed:
                owners[key] = i
    new = tuple(sorted({key for plan in plans for key in plan.new}))
    _check_ties(new, tensors, plans, adapters)
    resized = next((p for p in plans if p.vocab_size is not None), plans[0])
    untied = any(plan.untied for plan in plans)
    return MergePlan(tensors, new, untied, resized.vocab_size, resized.old_vocab_size)


def _check_ties(
    new: tuple[str, ...], tensors: dict[str, OutputTensor], plans: Sequence[MergePlan], adapters: Sequence[Adapter]
) -> None:
    """Refuse an adapter that unties a head beside one that changes embedding and head through the tie."""
    for key in new:
        for i, plan in enumerate(plans):
            source = plan.tensors.get(tensors[key].source.name)
            if key not in plan.tensors and source is not None and source.changed:
                raise _conflict(key, adapters[next(j for j, p in enumerate(plans) if key in p.new)], adapters[i])


def _additive(tensor: OutputTensor) -> bool:
    """Whether an adapter only adds to a tensor."""
    return not tensor.replaced and tensor.tokens is None and not any(u.module.dora for u in tensor.updates)


def _weighted(tensor: OutputTensor, weight: float) -> OutputTensor:
    return replace(
        tensor,
        updates=tuple(replace(u, weight=weight) for u in tensor.updates),
        biases=tuple(replace(u, weight=weight) for u in tensor.biases),
    )


def _conflict(key: str, first: Adapter, second: Adapter) -> MismatchError:
    return MismatchError(
        "merge-conflict",
        f"the adapters {first.folder} and {second.folder} both change {key!r}, and one does more than add to it",
        hint="replaced weights, token rows and DoRA have no sum: leave one of the adapters out",
    )


def _refuse_turned(base: Checkpoint, resolution: Resolution) -> None:
    """Refuse quantised Conv1D weights: transformers turns them round, (in, out) to (out, in), when it quantises."""
    for name in sorted(resolution.in_out):
        key = resolution.keys.get(name, "")
        stored = base.tensors.get(key)
        if isinstance(stored, QuantisedTensor) and len(stored.shape) == 2:
            raise UnsupportedError(
                "base-quantised-conv1d",
                f"{base.folder}: {key!r} is quantised, and of a Conv1D layer, whose weights are stored transposed then",
                hint=ORIGINAL,
            )


def _check_coverage(adapter: Adapter, resolution: Resolution) -> None:
    """Refuse an adapter that lacks a module its config targets, seen by its siblings in other layers."""
    if adapter.config.raw.get("layers_to_transform") is not None:
        return
    templates = {_template(path) for path in adapter.modules}
    for name in resolution.keys:
        path, _, parameter = name.rpartition(".")
        if (
            parameter == "weight"
            and path not in adapter.modules
            and _template(path) in templates
            and keys.matches_target(adapter.config.target_modules, path)
            and not keys.matches_target(adapter.config.exclude_modules, path)
            and f"{path}.weight" not in adapter.whole
        ):
            raise module_missing(adapter, path)


def _template(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", path)


class _Planner:
    """Gives every base tensor what the adapter does to it, and checks that all of the adapter lands."""

    def __init__(self, adapter: Adapter, base: Checkpoint, resolution: Resolution) -> None:
        self.adapter, self.base, self.resolution = adapter, base, resolution
        self.new: dict[str, OutputTensor] = {}
        self.by_key: dict[str, OutputTensor] = {}
        self.by_weight = {module.weight_name: module for module in adapter.modules.values()}
        names = set(touched(adapter))
        tied, own = names & resolution.tied.keys(), names - resolution.tied.keys()
        for name in sorted(own):
            if name in resolution.parts:
                self.add_parts(name, resolution.parts[name])
            else:
                self.by_key[self.key(name)] = self.changed(name, self.stored(name))
        self.untied = False
        self.settle_ties(own, tied)

    def key(self, name: str) -> str:
        if name not in self.resolution.keys:
            raise missing(self.adapter, self.base, name)
        return self.resolution.keys[name]

    def stored(self, name: str) -> StoredTensor:
        """The base's tensor behind a parameter, through a tie if need be."""
        return self.base.tensors[self.key(self.resolution.tied.get(name, name))]

    def output(self, key: str) -> OutputTensor:
        """The output tensor at a key of the base."""
        stored = self.base.tensors[key]
        return self.by_key.get(key, OutputTensor(key, stored.dtype, stored))

    def settle_ties(self, own: set[str], tied: set[str]) -> None:
        """A head that shares the embedding's tensor: keep sharing only where both end up the same.

        PEFT adds a delta to both when it merges one of them; its forward does not. The forward is what was
        trained, so the two part ways, except for trainable tokens, whose rows PEFT ties itself.
        """
        whole = self.adapter.whole
        for name, source in self.resolution.tied.items():
            if name not in tied and source not in own:
                continue
            path = source.removesuffix(".weight")
            if (name not in tied and path in self.adapter.tokens) or (
                name in whole and source in whole and _same(whole[name], whole[source])
            ):
                self.share(name, source)
            else:
                self.untied = True
                target = self.resolution.keys.get(name, name)
                made = self.changed(name, self.stored(name)) if name in tied else None
                made = made or OutputTensor(target, self.stored(name).dtype, self.stored(name))
                (self.by_key if target in self.base.tensors else self.new)[target] = replace(made, name=target)

    def share(self, name: str, source: str) -> None:
        """The tie stays; a checkpoint that stores the tensor twice gets it twice."""
        if name in self.resolution.keys:
            key = self.resolution.keys[name]
            self.by_key[key] = replace(self.by_key[self.key(source)], name=key)

    def changed(self, name: str, stored: StoredTensor) -> OutputTensor:
        """What becomes of one parameter; checks that every part fits it."""
        key = self.resolution.keys.get(name, name)
        stored.require_float()
        tensor = OutputTensor(key, stored.dtype, stored)
        path, _, parameter = name.rpartition(".")
        if name in self.adapter.whole:
            new = self.adapter.whole[name]
            if new.shape[1:] != stored.shape[1:] or (new.shape != stored.shape and not self.may_resize(name)):
                raise self.shape_error(name, new.shape, stored.shape)
            tensor = replace(tensor, source=new, replaced=True)
        module = self.by_weight.get(name)
        if module is not None:
            transposed = module.kind == "embedding" or name in self.resolution.in_out
            self.check_delta(module, tensor.source, Place(key), transposed=transposed)
            tensor = replace(tensor, updates=_updates(module, Place(key), stored), transposed=transposed)
        module = self.adapter.modules.get(path)
        if module is not None and parameter == "bias" and "bias" in module.stored:
            if module.stored["bias"].shape != tensor.source.shape:
                raise self.shape_error(name, module.stored["bias"].shape, stored.shape)
            tensor = replace(tensor, biases=(Update(module),))
        if parameter == "weight" and path in self.adapter.tokens:
            rows, indices = self.adapter.tokens[path], self.adapter.token_indices(path)
            if rows.shape[1:] != tensor.source.shape[1:]:
                raise self.shape_error(name, rows.shape, stored.shape)
            if max(indices, default=-1) >= tensor.source.shape[0]:
                raise MismatchError(
                    "merge-token-row",
                    f"the adapter {self.adapter.folder} replaces row {max(indices)} of {name!r}, which has "
                    f"{tensor.source.shape[0]:,} rows in the base {self.base.folder}",
                    hint=self.adapter.config.base_hint,
                )
            tensor = replace(tensor, tokens=TokenRows(rows, indices))
        return tensor

    def add_parts(self, name: str, places: tuple[Place, ...]) -> None:
        """Share a module's delta out between the stored tensors that its parameter is made of."""
        module = self.by_weight.get(name)
        in_out, whole = name in self.resolution.in_out, all(place.rows is None for place in places)
        if module is None or module.dora or module.kind != "linear" or (in_out and not whole):
            raise UnsupportedError(
                "merge-part",
                f"{self.base.folder} stores {name!r} fused or in parts, the first {places[0].key!r}, and the adapter "
                f"{self.adapter.folder} does more to it than to add a product to its rows",
                hint="merge it with PEFT's merge_and_unload()",
            )
        rows = sum(place.rows or 0 for place in places if not place.expert)
        if not whole and rows != module.out_features:
            raise self.shape_error(name, (module.out_features, module.in_features), (rows, module.in_features))
        for place in places:
            stored = self.base.tensors[place.key]
            stored.require_float()
            transposed = in_out != place.swapped
            self.check_delta(module, stored, place, transposed=transposed)
            held = self.by_key.get(place.key) or OutputTensor(place.key, stored.dtype, stored, transposed=transposed)
            self.by_key[place.key] = replace(held, updates=held.updates + _updates(module, place, stored))

    def check_delta(self, module: AdapterModule, weight: StoredTensor, place: Place, *, transposed: bool) -> None:
        expected = (module.out_features if place.rows is None else place.rows, *module.a_dims)
        if (module.kind == "linear" and transposed) or module.kind == "embedding":
            expected = (module.in_features, module.out_features)
        if module.experts > 1 and place.expert is None:
            expected = (module.experts, *expected)
        found = weight.shape if place.rows is None else (place.rows, *weight.shape[1:])
        if found == expected:
            return
        channels = weight.shape[1] if module.kind == "conv" and weight.shape[2:] == expected[2:] else 0
        if channels and channels < expected[1] and expected[1] % channels == 0:
            raise UnsupportedError(
                "merge-conv-groups",
                f"{module.path} is a convolution with {expected[1] // channels} groups in {self.base.folder}",
                hint="merge it with PEFT's merge_and_unload()",
            )
        raise self.shape_error(module.weight_name, expected, weight.shape)

    def shape_error(self, name: str, found: tuple[int, ...], base: tuple[int, ...]) -> MismatchError:
        return MismatchError(
            "merge-shape",
            f"{name!r} is {list(base)} in the base {self.base.folder}, and the adapter is for {list(found)}",
            hint=self.adapter.config.base_hint,
        )

    def may_resize(self, name: str) -> bool:
        """Only an embedding or a head may have other rows than the base: a resized vocabulary."""
        return is_embedding(name.rpartition(".")[0])

    def vocabulary(self) -> tuple[int | None, int | None]:
        """New and old number of rows, where whole embeddings changed them; they must agree with each other."""
        changes = {
            (new.shape[0], self.stored(name).shape[0])
            for name, new in self.adapter.whole.items()
            if self.may_resize(name) and new.shape != self.stored(name).shape
        }
        if not changes:
            return None, None
        if len(changes) > 1:
            raise MismatchError(
                "merge-vocabulary",
                f"the adapter {self.adapter.folder} resizes embedding and head to {sorted(n for n, _ in changes)} rows",
                hint="both must have one number of rows; save the adapter again",
            )
        return changes.pop()


def _updates(module: AdapterModule, place: Place, stored: StoredTensor) -> tuple[Update, ...]:
    """A module's part in the tensor at `place`, one matrix of which it changes, or each of a stack's."""
    if module.experts > 1 and place.expert is None:
        height = stored.shape[-2]
        return tuple(Update(module, expert=i, at=i * height) for i in range(module.experts))
    return (Update(module, expert=place.expert or 0, first=place.first, rows=place.rows, at=place.at),)


def _same(a: StoredTensor, b: StoredTensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.read_bytes() == b.read_bytes()
