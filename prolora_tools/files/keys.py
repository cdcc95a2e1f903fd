"""Tensor names of an adapter <-> (module path, role).

PEFT writes `base_model.model.` + module path + suffix, without the adapter's name. Suffixes are matched whole,
dot included: "lora_A" is in "prolora_A" too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIX = "base_model.model."

LORA_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
}
PROLORA_ROLES = {
    ".prolora_A": "A",
    ".prolora_B": "B",
    ".prolora_A_unshared": "A_unshared",
    ".prolora_B_unshared": "B_unshared",
    ".prolora_B_bias": "bias",
    ".prolora_embedding_A": "embedding_A",
    ".prolora_embedding_B": "embedding_B",
    ".prolora_embedding_A_unshared": "embedding_A_unshared",
    ".prolora_embedding_B_unshared": "embedding_B_unshared",
}
_SUFFIXES = {role: suffix for suffix, role in reversed(LORA_ROLES.items())}
_PROLORA_SUFFIXES = {role: suffix for suffix, role in PROLORA_ROLES.items()}
_TOKENS = re.compile(r"(.*?)(?:\.token_adapter)?\.trainable_tokens_delta")


def parse(name: str, *, prolora: bool) -> tuple[str, str] | None:
    """A tensor's name without PREFIX -> (module path, role), None for a whole weight or bias.

    Roles are those of the tables above, and `tokens` for the rows of trainable tokens.
    """
    roles = PROLORA_ROLES if prolora else LORA_ROLES
    for suffix, role in roles.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), role
    if match := _TOKENS.fullmatch(name):
        return match[1], "tokens"
    return None


def unwrapped(path: str) -> tuple[str, int]:
    """A module path -> (the path without its trailing `.base_layer`s, how many those are).

    PEFT wraps a module once for each of its target_parameters, and each wrapper's name is in the next one's.
    """
    depth = 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    return path, depth


def lora_key(path: str, role: str) -> str:
    """The name PEFT gives a LoRA tensor."""
    return PREFIX + path + _SUFFIXES[role]


def prolora_key(path: str, role: str) -> str:
    """The name of a PRoLoRA tensor (docs/format.md)."""
    return PREFIX + path + _PROLORA_SUFFIXES[role]


def renamed(name: str, *, prolora: bool) -> str:
    """The key, in an adapter of the other or the same kind, of a tensor that is no factor.

    Only lora_bias has a name of its own in each; everything else keeps its name.
    """
    short = name.removeprefix(PREFIX)
    place = parse(short, prolora=False) or parse(short, prolora=True)
    if place is None or place[1] != "bias":
        return name
    return (prolora_key if prolora else lora_key)(*place)


def wrapped(pattern: str) -> str:
    """The regex that a pattern of a rank_pattern or the like stands for (PEFT's rule)."""
    return rf"(.*\.)?({pattern})$"


def pattern_key(patterns: Mapping[str, object], path: str) -> str | None:
    """The entry of a rank_pattern or the like that holds for `path`: the first in file order (PEFT's rule)."""
    for pattern in patterns:
        if re.match(wrapped(pattern), path):
            return pattern
    return None


def matches_parameter(target_parameters: Sequence[str], name: str) -> bool:
    """Whether PEFT's target_parameters picks the parameter: names matched from a dot on."""
    return any(name == target or name.endswith(f".{target}") for target in target_parameters)


def matches_target(target_modules: list[str] | str | None, path: str) -> bool:
    """Whether PEFT's target_modules picks the module: a regex matched whole, or names matched from a dot on."""
    if target_modules is None:
        return False
    if isinstance(target_modules, str):
        return target_modules.lower() == "all-linear" or re.fullmatch(target_modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target_modules)
