"""Models of transformers on the meta device: every module, no weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prolora_tools.errors import InputError, MismatchError, UnsupportedError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from prolora_tools.files.adapter import Adapter


def meta_model(folder: Path, config: dict[str, Any], adapter: Adapter | None = None) -> Any:
    """The transformers model of a config.json, on the meta device: every module, no weight.

    Of the classes that the config, the adapter and its task name, the first that has all of the adapter's
    modules is taken.

    Raises:
        UnsupportedError: the model needs custom code.
        InputError: transformers does not know the model, or cannot build it.
        MismatchError: none of the classes has the adapter's modules.
    """
    paths, lacking = list(adapter.modules) if adapter else [], ""
    for model in models_of(folder, config, adapter):
        names = {name for name, _ in model.named_modules()}
        lacking = next((path for path in paths if path not in names), "")
        if not lacking:
            return model
    assert adapter is not None
    raise no_module(adapter, folder, lacking)


def no_module(adapter: Adapter, folder: Path, path: str) -> MismatchError:
    """The error for a module that no class of the model has."""
    return MismatchError(
        "merge-no-such-module",
        f"the adapter {adapter.folder} changes {path!r}, which the model in {folder} does not have",
        hint=adapter.config.base_hint,
    )


def models_of(folder: Path, config: dict[str, Any], adapter: Adapter | None) -> Iterator[Any]:
    """The model of each class that may be meant, on the meta device."""
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
        for cls in (*_classes(config, adapter), AutoModel):
            with torch.device("meta"):
                model = cls.from_config(parsed) if hasattr(cls, "_model_mapping") else cls(parsed)
            yield model
    except Exception as error:  # what transformers raises on a config that makes no sense is anything
        raise InputError(
            "base-config-unknown",
            f"transformers cannot build a model from {folder}/config.json: {first_line(error)}",
            hint="check model_type and architectures, or upgrade transformers",
        ) from error


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
