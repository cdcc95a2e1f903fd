"""Which tensor of a checkpoint a module path of the adapter means.

A path need not be a key: transformers renames modules when it loads, checkpoints of bare models lack a prefix,
tied heads are not stored. The answer comes from transformers' own mapping on a meta-device model, never from a
guess. For the common architectures, where the adapter's paths are keys, nothing needs to be asked, and torch stays out
of the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prolora_tools.errors import MismatchError, UnsupportedError
from prolora_tools.files.adapter import is_embedding
from prolora_tools.operations.mapping import Mapping, Resolution, touched
from prolora_tools.operations.models import models_of, no_module

if TYPE_CHECKING:
    from prolora_tools.files.adapter import Adapter
    from prolora_tools.files.checkpoint import Checkpoint

PLAIN = frozenset(
    {
        "bert", "cohere", "deepseek_v2", "deepseek_v3", "electra", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4",
        "glm4_moe", "gpt_oss", "granite", "llama", "mistral", "mixtral", "mpnet", "olmo", "olmo2", "olmo3", "olmoe",
        "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "roberta", "seed_oss", "smollm3",
        "stablelm", "starcoder2", "xlm-roberta",
    }
)  # fmt: skip
"""model_types none of whose linear layers is stored (in, out), and whose parameters, where they are stored one by one,
are stored under their own names. A test holds this list to the installed transformers."""


def resolve(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, Resolution]:
    """Find the stored tensors behind an adapter's module paths.

    Returns:
        The adapter with its target_parameters among its modules and every path as the model names it, and where
        the model's parameters are stored.

    Raises:
        MismatchError: the base has no such modules.
        UnsupportedError: the model needs custom code, or its stored tensors are fused where the adapter is not.
        InputError: transformers cannot build the model from config.json.
    """
    names = touched(adapter)
    linear = not adapter.config.target_parameters and all(
        m.kind == "linear" and not is_embedding(m.path)  # a head may be tied, and be stored all the same
        for m in adapter.modules.values()
    )
    plain = base.config.get("model_type") in PLAIN and linear
    if plain and not adapter.whole and not adapter.tokens and all(n in base.tensors for n in names):
        return adapter, Resolution({name: name for name in base.tensors})
    bound, resolution = _ask_transformers(adapter, base)
    for name in touched(bound):
        if name in resolution.refused:
            raise UnsupportedError(
                "merge-fused",
                f"how {base.folder} stores {name!r} is not understood: {resolution.refused[name]}",
                hint="check that the base is complete; PEFT's merge_and_unload() may understand it",
            )
        if name not in resolution.keys and name not in resolution.tied and name not in resolution.parts:
            raise missing(adapter, base, name)
    return bound, resolution


def missing(adapter: Adapter, base: Checkpoint, name: str) -> MismatchError:
    """The error for a parameter that the base does not have."""
    return MismatchError(
        "merge-no-such-tensor",
        f"the adapter {adapter.folder} changes {name!r}, which the base {base.folder} does not have",
        hint=adapter.config.base_hint,
    )


def _ask_transformers(adapter: Adapter, base: Checkpoint) -> tuple[Adapter, Resolution]:
    """Build the model without weights and run its loading rules over the checkpoint's and the adapter's names."""
    mapping: Mapping | None = None
    for model in models_of(base.folder, base.config, adapter):
        mapping = Mapping(model, base)
        bound = mapping.bind(adapter)
        if bound is not None:
            return bound, mapping.resolution
    assert mapping is not None
    raise no_module(adapter, base.folder, mapping.lacking(adapter))
