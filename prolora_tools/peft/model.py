"""The tuner: puts ProLoraLinear around the targeted modules and passes adapter_names on to them."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    AuxiliaryTrainingWrapper,
    get_quantization_kwargs,
)

from prolora_tools.errors import RequestError
from prolora_tools.peft.layer import BASE, ProLoraLayer, layer_class

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from prolora_tools.peft.config import ProLoraConfig


class ProLoraModel(BaseTuner):  # type: ignore[misc] # PEFT is untyped
    """A model with PRoLoRA adapters, as get_peft_model makes it from a ProLoraConfig."""

    prefix = "prolora_"
    tuner_layer_cls = ProLoraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # ensure_weight_tying for modules_to_save works on the config alone, the same for every tuner.
    _add_modules_to_save_to_tie = LoraModel._add_modules_to_save_to_tie  # noqa: SLF001 - PEFT's hook for tuners

    def _create_and_replace(
        self,
        peft_config: ProLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002 - PEFT's signature
    ) -> None:
        shape: dict[str, Any] = {"geometry": peft_config.geometry(current_key), "alpha": peft_config.alpha(current_key)}
        if isinstance(target, ProLoraLayer):
            target.update_layer(adapter_name, config=peft_config, **shape)
            return
        base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        cls = layer_class(base_layer, current_key)
        module = cls(target, adapter_name, config=peft_config, **shape, **get_quantization_kwargs(self.model))
        if module.fan_in_fan_out:
            peft_config.fan_in_fan_out = True  # spares readers of the saved config PEFT's warning
        if adapter_name not in self.active_adapters:
            module.requires_grad_(requires_grad=False)  # a further adapter does not become trainable by itself
        self._replace_module(parent, target_name, module, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Hand adapter_names, one adapter for each sample, to every layer for the time of a call."""
        names: list[str] | None = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        beams = kwargs.get("num_beams") or 1
        # Beam search repeats each sample; the encoder of an encoder-decoder model still sees each once.
        repeated = [name for name in names for _ in range(beams)]
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else None
        inside = set() if encoder is None or encoder is self.model else set(encoder.modules())
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_names, names=names if module in inside else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, ProLoraLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: list[str]) -> None:
        known = {name for m in self.modules() if isinstance(m, ProLoraLayer) for name in m.geometry}
        if self.training:
            raise RequestError(
                "peft-mixed-training",
                "adapter_names is given while the model is in training mode",
                hint="call model.eval(): mixed batches are for inference",
            )
        if unknown := sorted(set(names) - known - {BASE}):
            raise RequestError(
                "peft-mixed-unknown",
                f"adapter_names names {', '.join(unknown)}, and the model has {', '.join(sorted(known))}",
                hint="load the adapter first, or correct the name",
            )


def _pass_names(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}
