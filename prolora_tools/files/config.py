"""adapter_config.json <-> a dataclass; fields that are not ours to understand are preserved.

What changes the meaning of the tensors and is not supported is refused here, by name.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeGuard

from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import InputError, RequestError, UnsupportedError
from prolora_tools.files.keys import pattern_key, wrapped
from prolora_tools.files.tensors import read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FILE = "adapter_config.json"
FORMAT_VERSION = 1

# Inits that also changed the base weights: A and B alone are not the adapter (PEFT docs, "initialization").
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields under which lora_A and lora_B mean something else than scaling * B A on a module's weight.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only after its invocation tokens",
    "arrow_config": "Arrow routes between adapters per token",
    "kasa_config": "KaSA learns singular values beside A and B",
    "use_qalora": "QALoRA pools the inputs",
    "use_bdlora": "BD-LoRA makes A or B block-diagonal",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "the model's layers were replicated when it was loaded",
    "megatron_config": "Megatron splits the layers over devices",
}
# Fields that mean the same for LoRA and PRoLoRA; they go over when one is made from the other.
_COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save",
    "ensure_weight_tying", "r", "rank_pattern", "alpha_pattern", "revision", "target_modules", "task_type",
    "trainable_token_indices", "use_rslora",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterConfig:
    """One adapter's configuration.

    Attributes:
        raw: the whole JSON object, unknown fields included.
        prolora: whether peft_type is PROLORA rather than LORA.
        r: total rank, before patterns.
        alpha: lora_alpha, before patterns.
        use_rslora: scaling is alpha / sqrt(r) instead of alpha / r.
        use_dora: the adapter holds magnitudes.
        target_modules: list of names, or a regex.
        exclude_modules: the same, for what `target_modules` picks and the adapter leaves out.
        target_parameters: names of parameters, such as fused experts, that carry factors of their own.
        bias: which of the base's biases were trained: none, all or lora_only.
    """

    raw: dict[str, Any]
    prolora: bool
    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None = None
    target_parameters: tuple[str, ...] = ()
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    unshared_r: int = 0
    chunks: tuple[int, int] = (1, 1)
    strides: tuple[int | None, int | None] = (None, None)
    rotate: bool = True
    patterns: dict[str, dict[str, int]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read and check adapter_config.json.

        Raises:
            InputError: missing, no JSON object, or a field of the wrong type.
            UnsupportedError: a kind of adapter this package refuses.
        """
        path = folder / FILE
        if not path.is_file():
            raise InputError(
                "adapter-no-config",
                f"{folder} has no {FILE}, so it is not an adapter",
                hint="give the folder that PEFT's save_pretrained() wrote",
            )
        return cls.from_json(read_json(path), path)

    @classmethod
    def from_json(cls, raw: dict[str, Any], path: Path) -> AdapterConfig:
        """Check a parsed adapter_config.json; `path` is for messages."""
        kind = raw.get("peft_type")
        if not isinstance(kind, str) or kind not in {"LORA", "PROLORA"}:
            raise UnsupportedError(
                "config-peft-type",
                f"{path}: peft_type is {kind!r}, expected LORA or PROLORA",
                hint="other adapters have other maths; PEFT's convert_to_lora makes a LoRA of some",
            )
        fields = _Fields(raw, path)
        prolora = kind == "PROLORA"
        if not prolora:
            _refuse(raw, path)
        version = fields.integer("format_version", FORMAT_VERSION)
        if prolora and version != FORMAT_VERSION:
            raise UnsupportedError(
                "config-format-version",
                f"{path}: format_version is {version}, this release reads {FORMAT_VERSION}",
                hint="pip install --upgrade prolora-tools",
            )
        config = cls(
            raw=raw,
            prolora=prolora,
            r=fields.integer("r", 8, least=1),
            alpha=fields.number("lora_alpha", 8),
            use_rslora=fields.flag("use_rslora"),
            use_dora=fields.flag("use_dora"),
            target_modules=fields.targets("target_modules"),
            exclude_modules=fields.targets("exclude_modules"),
            target_parameters=() if prolora else fields.names("target_parameters"),
            bias=fields.bias(),
            rank_pattern=fields.pattern("rank_pattern", integers=True),
            alpha_pattern=fields.pattern("alpha_pattern"),
        )
        if not prolora:
            return config
        return replace(
            config,
            unshared_r=fields.integer("unshared_r", 0),
            chunks=(fields.integer("chunks_A", 1, least=1), fields.integer("chunks_B", 1, least=1)),
            strides=(fields.optional("stride_A"), fields.optional("stride_B")),
            rotate=fields.flag("rotate", default=True),
            patterns={
                name: fields.pattern(f"{name}_pattern", integers=True)
                for name in ("unshared", "chunks_A", "chunks_B", "stride_A", "stride_B")
            },
        )

    def rank(self, path: str) -> int:
        """The module's rank by r and rank_pattern."""
        key = pattern_key(self.rank_pattern, path)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, path: str) -> float:
        """The module's alpha by lora_alpha and alpha_pattern."""
        key = pattern_key(self.alpha_pattern, path)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scaling(self, path: str) -> float:
        """Alpha / r, or alpha / sqrt(r) under rsLoRA, r being the TOTAL rank of the module."""
        rank = self.rank(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def geometry(self, path: str) -> Geometry:
        """The module's geometry; a LoRA's is all unshared.

        Raises:
            InputError: the config's numbers for this module do not go together.
        """
        try:
            return self._geometry(path)
        except RequestError as error:
            raise InputError(
                "config-geometry",
                f"{FILE} gives {path} an impossible shape: {error.message}",
                hint="repair r, unshared_r, chunks, strides or their patterns, or save the adapter again",
            ) from error

    def _geometry(self, path: str) -> Geometry:
        rank = self.rank(path)
        if not self.prolora:
            return Geometry.lora(rank)

        def value(name: str, default: int | None) -> int | None:
            patterns = self.patterns.get(name, {})
            key = pattern_key(patterns, path)
            return default if key is None else patterns[key]

        strides = (value("stride_A", self.strides[0]), value("stride_B", self.strides[1]))
        if not self.rotate:
            strides = (0, 0)
        unshared, chunks_a = value("unshared", self.unshared_r), value("chunks_A", self.chunks[0])
        chunks_b = value("chunks_B", self.chunks[1])
        assert unshared is not None
        assert chunks_a is not None
        assert chunks_b is not None
        return Geometry(rank, unshared, chunks_a, chunks_b, *strides)

    @property
    def base_hint(self) -> str:
        """What to say where a base does not fit."""
        name = self.raw.get("base_model_name_or_path")
        return f"give the base it was trained on{f': {name}' if name else ', which its config does not name'}"

    def common(self) -> dict[str, Any]:
        """The fields that LoRA and PRoLoRA share, and those that nobody here knows."""
        known = set(_LORA_ONLY) | set(_PROLORA_ONLY) | {"peft_type", "peft_version"}
        return {k: v for k, v in self.raw.items() if k in _COMMON or k not in known}


_LORA_ONLY = (
    *_REFUSED, "corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_ga_config",
    "megatron_core", "qalora_group_size", "use_dora", "velora_config", "layer_replication", "runtime_config",
    "target_parameters",
)  # fmt: skip
_PROLORA_ONLY = (
    "format_version", "unshared_r", "chunks_A", "chunks_B", "stride_A", "stride_B", "rotate",
    "unshared_pattern", "chunks_A_pattern", "chunks_B_pattern", "stride_A_pattern", "stride_B_pattern",
    "init_prolora_weights",
)  # fmt: skip


def dump(raw: Mapping[str, Any]) -> bytes:
    """The bytes of a config file: sorted fields, so that the same config is the same file.

    What stands inside a field keeps its order: of a rank_pattern, the first entry that matches holds.
    """
    ordered = {key: raw[key] for key in sorted(raw)}
    return (json.dumps(ordered, indent=2, ensure_ascii=False) + "\n").encode()


def _refuse(raw: dict[str, Any], path: Path) -> None:
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise UnsupportedError(
            "config-base-changing-init",
            f"{path}: init_lora_weights is {init!r}, which changed the base weights too",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    for name, why in _REFUSED.items():
        if raw.get(name):
            raise UnsupportedError(
                "config-variant",
                f"{path}: {name} is set: {why}",
                hint="use it through PEFT, and merge it with merge_and_unload() where PEFT can merge this variant",
            )


def _is_number(value: object) -> TypeGuard[float]:
    """A finite number that arithmetic can use: JSON has infinities in Python's eyes, and integers of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


class _Fields:
    """Typed access to the fields of a parsed config; every wrong type is one error naming the field."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def wrong(self, name: str, expected: str) -> InputError:
        return InputError(
            "config-field",
            f"{self.path}: {name} is {reprlib.repr(self.raw[name])}, expected {expected}",
            hint="repair the field, or save the adapter again",
        )

    def integer(self, name: str, default: int, *, least: int = 0) -> int:
        value = self.raw.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, f"a whole number of at least {least}")
        return value

    def optional(self, name: str) -> int | None:
        return None if self.raw.get(name) is None else self.integer(name, 0)

    def number(self, name: str, default: float) -> float:
        value: float | None = self.raw.get(name)
        if value is None:
            return default
        if not _is_number(value):
            raise self.wrong(name, "a number")
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def bias(self) -> str:
        value = self.raw.get("bias")
        if value is None:
            return "none"
        if not isinstance(value, str) or value not in {"none", "all", "lora_only"}:
            raise self.wrong("bias", "none, all or lora_only")
        return value

    def targets(self, name: str) -> list[str] | str | None:
        value = self.raw.get(name)
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return value
        if isinstance(value, str):
            self.check_regex(name, value)
            return value
        if value is None:
            return None
        raise self.wrong(name, "a list of names or a regex")

    def names(self, name: str) -> tuple[str, ...]:
        value = self.raw.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(name, "a list of names")
        return tuple(value)

    def pattern(self, name: str, *, integers: bool = False) -> dict[str, Any]:
        value = self.raw.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(
            _is_number(v) and (isinstance(v, int) or not integers) for v in value.values()
        ):
            raise self.wrong(name, f"an object of {'whole ' if integers else ''}numbers by module name")
        for key in value:
            self.check_regex(name, wrapped(key))
        return value

    def check_regex(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.wrong(name, f"valid regular expressions ({pattern!r}: {error})") from error
