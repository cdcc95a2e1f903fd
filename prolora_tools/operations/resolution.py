"""Which tensor of a checkpoint a module path of the adapter means.

A path need not be a key: transformers renames modules when it loads, checkpoints of bare models lack a prefix,
tied heads are not stored. The answer comes from transformers' own mapping on a meta-device model, never from a
guess. For the common dense architectures whose every path is a key, nothing needs to be asked, and torch
stays out of the process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prolora_tools.errors import InputError, MismatchError, UnsupportedError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from prolora_tools.files.adapter import Adapter
    from prolora_tools.files.checkpoint import Checkpoint

LINEAR_ONLY = frozenset(
    {
        "bert", "cohere", "gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "mpnet", "olmo", "olmo2",
        "phi3", "qwen2", "qwen3", "roberta", "smollm3", "starcoder2", "xlm-roberta",
    }
)  # fmt: skip
"""model_types whose linear layers are all nn.Linear and whose checkpoints keep the module paths as keys.

A test holds this list to the installed transformers."""


@dataclass(frozen=True)
class Resolution:
    """Names of the model's parameters -> what is stored.

    Attributes:
        keys: parameter name -> checkpoint key.
        tied: parameter -> the parameter whose tensor it shares.
        conv1d: module paths whose weight is (in, out), transformers' Conv1D.
        fused: parameters that are made of several stored tensors, or of a part of one.
    """

    keys: dict[str, str]
    tied: dict[str, str] = field(default_factory=dict)
    conv1d: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()


def touched(adapter: Adapter) -> list[str]:
    """The parameter names that an adapter changes."""
    names = [f"{path}.weight" for path in (*adapter.modules, *adapter.tokens)]
    names += [f"{path}.bias" for path, module in adapter.modules.items() if "bias" in module.stored]
    return [*names, *adapter.whole]


def resolve(adapter: Adapter, base: Checkpoint) -> Resolution:
    """Find the stored tensors behind an adapter's module paths.

    Raises:
        MismatchError: the base has no such modules.
        UnsupportedError: the model needs custom code, or its stored tensors are fused where the adapter is not.
        InputError: transformers cannot build the model from config.json.
    """
    names = touched(adapter)
    dense = base.config.get("model_type") in LINEAR_ONLY and all(m.kind == "linear" for m in adapter.modules.values())
    if dense and not adapter.whole and not adapter.tokens and all(n in base.tensors for n in names):
        return Resolution({name: name for name in base.tensors})
    resolution = _ask_transformers(adapter, base)
    for name in names:
        if name in resolution.fused:
            raise UnsupportedError(
                "merge-fused",
                f"{base.folder} stores {name!r} fused with other tensors or in parts",
                hint="load the base with transformers and save_pretrained() it, then merge into that",
            )
        if name not in resolution.keys and name not in resolution.tied:
            raise missing(adapter, base, name)
    return resolution


def missing(adapter: Adapter, base: Checkpoint, name: str) -> MismatchError:
    """The error for a parameter that the base does not have."""
    return MismatchError(
        "merge-no-such-tensor",
        f"the adapter {adapter.folder} changes {name!r}, which the base {base.folder} does not have",
        hint=adapter.config.base_hint,
    )


def _ask_transformers(adapter: Adapter, base: Checkpoint) -> Resolution:
    """Build the model without weights and run its loading rules over the checkpoint's keys."""
    from transformers.conversion_mapping import get_model_conversion_mapping  # noqa: PLC0415 - seconds of import
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key  # noqa: PLC0415
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415

    model = meta_model(base.folder, base.config, adapter)
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    parameters = model.state_dict()
    keys: dict[str, str] = {}
    fused: set[str] = set()
    for key in base.tensors:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)
        if converter is not None or name in keys:
            fused.add(name)
        keys[name] = key
    tied = {name: source for name, source in model.all_tied_weights_keys.items() if source in keys}
    conv1d = frozenset(path for path, module in model.named_modules() if isinstance(module, Conv1D))
    return Resolution(keys, tied, conv1d, frozenset(fused))


def meta_model(folder: Path, config: dict[str, Any], adapter: Adapter | None = None) -> Any:
    """The transformers model of a config.json, on the meta device: every module, no weight.

    Of the classes that the config, the adapter and its task name, the first that has all of the adapter's
    modules is taken.

    Raises:
        UnsupportedError: the model needs custom code.
        InputError: transformers does not know the model, or cannot build it.
        MismatchError: none of the classes has the adapter's modules.
    """
    import torch  # noqa: PLC0415 - seconds of import
    import transformers  # noqa: PLC0415
    from transformers import AutoConfig, AutoModel  # noqa: PLC0415

    if "auto_map" in config and config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            "base-custom-code",
            f"{folder}/config.json names custom model code (auto_map), which is not run",
            hint="use a base whose model_type transformers itself knows",
        )
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True)
        paths = set(adapter.modules) if adapter else set()
        model: Any = None
        for cls in (*_classes(config, adapter), AutoModel):
            with torch.device("meta"):
                model = cls.from_config(parsed) if hasattr(cls, "_model_mapping") else cls(parsed)
            if paths <= {name for name, _ in model.named_modules()}:
                return model
    except Exception as error:  # what transformers raises on a config that makes no sense is anything
        raise InputError(
            "base-config-unknown",
            f"transformers cannot build a model from {folder}/config.json: {first_line(error)}",
            hint="check model_type and architectures, or upgrade transformers",
        ) from error
    assert adapter is not None
    lacking = sorted(paths - {name for name, _ in model.named_modules()})
    raise MismatchError(
        "merge-no-such-module",
        f"the adapter {adapter.folder} changes {lacking[0]!r}, which the model in {folder} does not have",
        hint=adapter.config.base_hint,
    )


_TASK_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def _classes(config: dict[str, Any], adapter: Adapter | None) -> Iterable[Any]:
    """Transformers classes to try: the checkpoint's own first, then what the adapter was trained on."""
    import transformers  # noqa: PLC0415 - seconds of import

    architectures = config.get("architectures")
    names = [n for n in architectures if isinstance(n, str)] if isinstance(architectures, list) else []
    if adapter is not None:
        mapping = adapter.config.raw.get("auto_mapping")
        names.append(str(mapping.get("base_model_class")) if isinstance(mapping, dict) else "")
        names.append(_TASK_CLASSES.get(str(adapter.config.raw.get("task_type")), ""))
    for name in names:
        if name.isidentifier() and hasattr(transformers, name):
            yield getattr(transformers, name)
