"""The layer: a frozen linear layer and, for every adapter on it, the stored chunks.

The forward pass lays A and B out once, by a gather of the chunk's rows, and then runs LoRA's two products. That
costs r (in + out) numbers a call, beside tokens * (in + out) of the products, and was measured to be faster in
training than products with the chunk and rolled partial sums (benchmarks/training.md). It also makes the layer agree
bit for bit with PEFT's LoRA on the expanded factors.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from peft.utils.other import transpose
from torch import nn
from transformers.pytorch_utils import Conv1D

from prolora_tools.core.sharing import copy_rows
from prolora_tools.errors import InputError, RequestError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prolora_tools.core.geometry import Geometry, Sharing
    from prolora_tools.peft.config import ProLoraConfig

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names


def gather_rows(sharing: Sharing, dim: int) -> torch.Tensor:
    """The chunk's row behind each (rank, copy), flattened rank-major: int64 (r_s * copies,)."""
    # The device is said, so that a surrounding meta context does not take the numbers away.
    return torch.as_tensor(copy_rows(sharing, sharing.copies(dim)).T.reshape(-1).copy(), device="cpu")


def lay_out(chunk: torch.Tensor, rows: torch.Tensor, dim: int) -> torch.Tensor:
    """`core.sharing.expand` by one index_select, whose backward is faster than that of advanced indexing.

    Args:
        chunk: (r_s, ceil(dim / chunks)).
        rows: what gather_rows gives for this side.
        dim: in or out features.

    Returns:
        (r_s, dim).
    """
    ranks, width = chunk.shape
    columns = len(rows) // ranks * width if ranks else dim
    return chunk.index_select(0, rows).reshape(ranks, columns)[:, :dim]


class FactorDict(nn.ParameterDict):
    """A ParameterDict that keeps tensors without elements as buffers.

    They are saved and loaded as the others, and no optimiser, sharding or gradient reduction meets them: torch's
    Adafactor divides by the number of elements, and DistributedDataParallel waits for gradients of all parameters.
    """

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        """Store a factor under the adapter's name."""
        if value.numel():
            super().__setitem__(key, value)
        else:
            self._keys[key] = None
            self._parameters.pop(key, None)
            self.register_buffer(key, value.detach())


class ProLoraLayer(BaseTunerLayer):  # type: ignore[misc] # PEFT is untyped
    """What the adapters of one layer consist of.

    Attributes:
        prolora_A: adapter -> (r_s, ceil(in / m)).
        prolora_B: adapter -> (ceil(out / n), r_s).
        prolora_A_unshared: adapter -> (u, in).
        prolora_B_unshared: adapter -> (out, u).
        prolora_B_bias: adapter -> (out,), only under lora_bias.
        geometry: adapter -> its shape.
        scaling: adapter -> what B A is multiplied with.

    All four factors are always there, with a dim of 0 where nothing is shared or unshared: a reader of the file
    takes the true in and out features from the unshared ones.
    """

    adapter_layer_names = ("prolora_A", "prolora_B", "prolora_A_unshared", "prolora_B_unshared", "prolora_B_bias")
    other_param_names = (
        "geometry",
        "r",
        "lora_alpha",
        "scaling",
        "prolora_dropout",
        "prolora_rows_A",
        "prolora_rows_B",
    )

    if TYPE_CHECKING:  # PEFT is untyped, and nn.Module's __getattr__ would make tensors of these
        base_layer: nn.Module
        get_base_layer: Callable[[], Any]
        get_base_weight: Callable[[], torch.Tensor]
        set_base_weight: Callable[[torch.Tensor], None]
        _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
        active_adapters: list[str]

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        base = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(
            base, get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.in_features, self.out_features = _get_in_out_features(base)
        # PEFT's config field is changed by PEFT itself; the class of the layer cannot lie.
        self.fan_in_fan_out = isinstance(base, Conv1D)
        self.geometry: dict[str, Geometry] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.prolora_dropout = nn.ModuleDict()
        self.prolora_A = FactorDict()
        self.prolora_B = FactorDict()
        self.prolora_A_unshared = FactorDict()
        self.prolora_B_unshared = FactorDict()
        self.prolora_B_bias = FactorDict()
        # Not saved: the numbers follow from the geometry.
        self.prolora_rows_A = BufferDict(persistent=False)
        self.prolora_rows_B = BufferDict(persistent=False)
        self.cast_input_dtype_enabled = True  # what peft.helpers.disable_input_dtype_casting switches
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, *, geometry: Geometry, alpha: float, config: ProLoraConfig) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name.
            geometry: its shape on this layer.
            alpha: its alpha on this layer.
            config: the other options.
        """
        in_features, out_features = self.in_features, self.out_features
        self.geometry[adapter_name] = geometry
        self.r[adapter_name] = geometry.rank
        self.lora_alpha[adapter_name] = alpha
        self.scaling[adapter_name] = alpha / (math.sqrt(geometry.rank) if config.use_rslora else geometry.rank)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0.0 else nn.Identity()
        self.prolora_dropout[adapter_name] = dropout
        self.prolora_A[adapter_name] = torch.empty(geometry.shared, geometry.a.width(in_features))
        self.prolora_B[adapter_name] = torch.empty(geometry.b.width(out_features), geometry.shared)
        self.prolora_A_unshared[adapter_name] = torch.empty(geometry.unshared, in_features)
        self.prolora_B_unshared[adapter_name] = torch.empty(out_features, geometry.unshared)
        if config.lora_bias:
            self.prolora_B_bias[adapter_name] = torch.empty(out_features)
        self.prolora_rows_A[adapter_name] = gather_rows(geometry.a, in_features)
        self.prolora_rows_B[adapter_name] = gather_rows(geometry.b, out_features)
        self.reset_prolora_parameters(adapter_name, config.init_prolora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def reset_prolora_parameters(
        self, adapter_name: str, init: Literal["rectified", "unrectified", False] = "rectified"
    ) -> None:
        """Draw the initial values (arXiv 2402.16902, rectified initialisation; see ProLoraConfig).

        Kaiming-uniform with a = sqrt(5) has the bound 1 / sqrt(fan-in).
        """
        chunk, unshared = self.prolora_A[adapter_name], self.prolora_A_unshared[adapter_name]
        bound = self.in_features**-0.5
        own = chunk.shape[1] ** -0.5 if init == "unrectified" else bound
        if chunk.numel():
            chunk.uniform_(-own, own)
        if unshared.numel():
            unshared.uniform_(-bound, bound)
        other = 0.0 if init else self.r[adapter_name] ** -0.5
        for factors in (self.prolora_B, self.prolora_B_unshared, self.prolora_B_bias):
            if adapter_name in factors and factors[adapter_name].numel():
                factors[adapter_name].uniform_(-other, other)

    def factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The full factors in the official order, shared ranks first: A (r, in) and B (out, r), differentiable."""
        a_unshared, b_unshared = self.prolora_A_unshared[adapter_name], self.prolora_B_unshared[adapter_name]
        if self.geometry[adapter_name].shared == 0:
            return a_unshared, b_unshared
        a = lay_out(self.prolora_A[adapter_name], self.prolora_rows_A[adapter_name], self.in_features)
        bt = lay_out(self.prolora_B[adapter_name].t(), self.prolora_rows_B[adapter_name], self.out_features)
        # Without a part that is empty: it must not make the output ask for gradients. Joining copies even a single
        # part, which lays B out in memory as LoRA's is, so that the products are the same to the bit.
        parts_a, parts_b = [a], [bt.t()]
        if self.geometry[adapter_name].unshared:
            parts_a.append(a_unshared)
            parts_b.append(b_unshared)
        return torch.cat(parts_a), torch.cat(parts_b, dim=1)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is nothing but a delta weight."""
        return adapter_name not in self.prolora_B_bias


class ProLoraLinear(nn.Module, ProLoraLayer):
    """PRoLoRA on a Linear or Conv1D layer, or on a quantised one that PEFT knows.

    Args:
        base_layer: the frozen layer, or a tuner layer around it.
        adapter_name: the first adapter's name.
        geometry: its shape.
        alpha: its alpha.
        config: its other options.
        kwargs: what PEFT's quantisation backends ask for.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, *, geometry: Geometry, alpha: float, config: ProLoraConfig,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        ProLoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, geometry=geometry, alpha=alpha, config=config)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Scaling * B A in the layout of the base weight and the dtype of the factors.

        Half precision is multiplied in float32 and rounded once, as PEFT does on the CPU.
        """
        a, b = self.factors(adapter)
        dtype = a.dtype
        if dtype in {torch.float16, torch.bfloat16}:
            a, b = a.float(), b.float()
        delta: torch.Tensor = transpose(b @ a, self.fan_in_fan_out) * self.scaling[adapter]
        return delta.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, rounding once to its dtype.

        Args:
            safe_merge: leave the base as it is if the result is not finite.
            adapter_names: which; None is the active ones.

        Raises:
            InputError: safe_merge, and the result is not finite.
            RequestError: an adapter with a bias on a layer that has none.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.prolora_A:
                self._add_to_base(name, 1.0, safe=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract the merged adapters from the base weight; exact up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.prolora_A:
                self._add_to_base(name, -1.0, safe=False)

    @torch.no_grad()
    def _add_to_base(self, name: str, sign: float, *, safe: bool) -> None:
        base, bias = self.get_base_layer(), None
        if name in self.prolora_B_bias:
            if getattr(base, "bias", None) is None:
                raise RequestError(
                    "peft-merge-bias",
                    f"adapter {name!r} has a bias beside B, and the base layer has none to add it to",
                    hint="train without lora_bias, or keep the adapter unmerged",
                )
            bias = base.bias + self.prolora_B_bias[name] * self.scaling[name] * sign
        weight = self.get_base_weight()
        delta = self.get_delta_weight(name).to(weight.device) * sign
        if self.quantization_backend is not None:
            weight = weight.to(delta.dtype) + delta
        elif safe:
            weight = weight.clone().add_(delta)
        else:
            weight.add_(delta)
        if safe and not all(t.isfinite().all() for t in (weight, bias) if t is not None):
            raise InputError(
                "peft-merge-not-finite",
                f"merging adapter {name!r} gives inf or nan; the base weight was left as it was",
                hint="the training diverged: use an earlier checkpoint",
            )
        self.set_base_weight(weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)

    def _delta(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """What an adapter adds for the input x (..., in): (..., out), in the order of operations of PEFT's LoRA."""
        a, b = self.factors(adapter)
        x = self._cast_input_dtype(x, a.dtype)
        bias = self.prolora_B_bias.get(adapter)
        return F.linear(F.linear(self.prolora_dropout[adapter](x), a), b, bias) * self.scaling[adapter]

    def forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output plus that of the active adapters.

        Args:
            x: (..., in).
            args: handed to the base layer.
            adapter_names: one adapter for each sample, or "__base__"; PEFT passes it for mixed batches.
            kwargs: handed to the base layer.

        Returns:
            (..., out), in the dtype of the base layer's output.
        """
        if adapter_names is not None:
            self._check_mixed(x, adapter_names)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        if adapter_names is not None:
            return self._add_mixed(x, result, adapter_names)
        for adapter in self.active_adapters:
            if adapter in self.prolora_A:
                result = result + self._delta(x, adapter)
        return result.to(dtype)

    def _check_mixed(self, x: torch.Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise RequestError(
                "peft-mixed-length",
                f"adapter_names has {len(adapter_names)} names for a batch of {len(x)}",
                hint=f"give one name for each sample, {BASE!r} for none",
            )
        if self.merged:
            raise RequestError(
                "peft-mixed-merged",
                f"adapter_names is given while {', '.join(self.merged_adapters)} is merged",
                hint="call unmerge_adapter() first",
            )

    def _add_mixed(self, x: torch.Tensor, result: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        result = result.clone()
        for adapter in dict.fromkeys(adapter_names):
            if adapter in self.prolora_A:
                samples = [i for i, name in enumerate(adapter_names) if name == adapter]
                result[samples] += self._delta(x[samples], adapter).to(result.dtype)
        return result

    def extra_repr(self) -> str:
        """The shapes of the adapters, and the quantisation of the base."""
        parts = [f"{name}: {geometry}" for name, geometry in self.geometry.items()]
        return ", ".join([*parts, *filter(None, [quantization_extra_repr(self)])])

    def __repr__(self) -> str:
        return "prolora." + super().__repr__()


def layer_class(base_layer: nn.Module, path: str) -> type[ProLoraLinear]:
    """The tuner layer for a base layer.

    Raises:
        UnsupportedError: there is none.
    """
    if isinstance(base_layer, nn.Linear | Conv1D):
        return ProLoraLinear
    backend = resolve_quantization_backend(base_layer)
    if backend is not None and backend.layer_type == "linear":
        return ProLoraLinear
    raise UnsupportedError(
        "peft-target-layer",
        f"{path} is a {type(base_layer).__name__}, expected Linear, Conv1D or a quantised Linear",
        hint="name only such modules in target_modules, or leave this one out with exclude_modules",
    )
