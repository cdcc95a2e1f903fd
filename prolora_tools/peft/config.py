"""The fields of adapter_config.json that a PRoLoRA adapter is trained with and saved under."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key

from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import RequestError, UnsupportedError
from prolora_tools.peft._register import member

FORMAT_VERSION = 1


@dataclass
class ProLoraConfig(PeftConfig):  # type: ignore[misc] # PEFT is untyped
    """Configuration of a PRoLoRA adapter (arXiv 2402.16902).

    The four parts of the method and how each is switched off: broadcast reduction (`chunks_A = chunks_B = 1`),
    rotation (`rotate=False`), partial sharing (`unshared_r=0`), rectified initialisation
    (`init_prolora_weights="unrectified"`). Without rotation and unshared ranks it is CLoRA, with rotation only
    RoLoRA, and with `unshared_r=r` plain LoRA.

    Args:
        r: total rank.
        unshared_r: u, the ranks that are kept whole; r - u are shared.
        chunks_A: m, the pieces A is cut into along the input dim.
        chunks_B: n, the pieces B is cut into along the output dim.
        stride_A: rank steps from one copy of A to the next; None takes max(floor((r - u) / m), 1).
        stride_B: the same for B.
        rotate: False sets both strides to 0, whatever else says.
        lora_alpha: the scaling is alpha / r, with the total r.
        use_rslora: the scaling is alpha / sqrt(r).
        lora_dropout: dropout before A.
        lora_bias: learn a bias beside B, scaled as B A is.
        init_prolora_weights: "rectified" draws both parts of A from U(-1/sqrt(in), 1/sqrt(in)), with the whole
            input dim; "unrectified" gives the chunk the bound of its own width, the paper's ablation "-i"; B is 0 in
            both. False draws B too, so that the adapter does something before it is trained: for tests.
        target_modules: names, a regex, or "all-linear".
        exclude_modules: names or a regex of modules to leave out.
        layers_to_transform: indices of the layers to adapt.
        layers_pattern: the name of the list that those indices count.
        bias: which biases of the base are trained: "none", "all", or "lora_only" for the adapted modules'.
        modules_to_save: further modules to train and save whole.
        fan_in_fan_out: written for other readers; the tuner goes by the class of the layer.
        trainable_token_indices: rows of the embedding to train, as for PEFT's LoRA.
        ensure_weight_tying: keep tied modules tied where one of them is in modules_to_save.
        rank_pattern: module name or regex -> r.
        alpha_pattern: module name or regex -> lora_alpha.
        unshared_pattern: module name or regex -> unshared_r.
        chunks_A_pattern: module name or regex -> chunks_A.
        chunks_B_pattern: module name or regex -> chunks_B.
        stride_A_pattern: module name or regex -> stride_A.
        stride_B_pattern: module name or regex -> stride_B.
        format_version: version of the format on disk.

    Raises:
        RequestError: a number is out of its range, or options contradict each other.
        UnsupportedError: the folder is of a newer format.
    """

    r: int = 8
    unshared_r: int = 0
    chunks_A: int = 1  # noqa: N815 - as in the file
    chunks_B: int = 1  # noqa: N815
    stride_A: int | None = None  # noqa: N815
    stride_B: int | None = None  # noqa: N815
    rotate: bool = True
    lora_alpha: float = 8
    use_rslora: bool = False
    lora_dropout: float = 0.0
    lora_bias: bool = False
    init_prolora_weights: Literal["rectified", "unrectified", False] = "rectified"
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    unshared_pattern: dict[str, int] = field(default_factory=dict)
    chunks_A_pattern: dict[str, int] = field(default_factory=dict)  # noqa: N815
    chunks_B_pattern: dict[str, int] = field(default_factory=dict)  # noqa: N815
    stride_A_pattern: dict[str, int] = field(default_factory=dict)  # noqa: N815
    stride_B_pattern: dict[str, int] = field(default_factory=dict)  # noqa: N815
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        super().__post_init__()
        self.peft_type = member()
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for name in _PATTERNS:
            setattr(self, name, getattr(self, name) or {})
        if self.format_version != FORMAT_VERSION:
            raise UnsupportedError(
                "peft-format-version",
                f"format_version is {self.format_version}, this release reads {FORMAT_VERSION}",
                hint="pip install --upgrade prolora-tools",
            )
        choices: dict[str, tuple[object, ...]] = {
            "bias": ("none", "all", "lora_only"),
            "init_prolora_weights": ("rectified", "unrectified", False),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise RequestError(
                    "peft-option",
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(map(repr, allowed))}",
                    hint=f"ProLoraConfig({name}={allowed[0]!r})",
                )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise RequestError(
                "peft-layers-with-regex",
                f"layers_to_transform is given, and target_modules is the string {self.target_modules!r}",
                hint="give target_modules as a list of names, or say the layers in the regex",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise RequestError(
                "peft-layers-pattern",
                f"layers_pattern is {self.layers_pattern!r}, and layers_to_transform is not given",
                hint="give layers_to_transform the indices that are to be adapted",
            )
        self.geometry("")

    def _value(self, name: str, default: Any, path: str) -> Any:
        """What the pattern `name` says for the module: its first entry that matches, by PEFT's rule.

        Raises:
            RequestError: another entry would be the first in the saved file, which PEFT sorts.
        """
        patterns: dict[str, Any] = getattr(self, name)
        value, saved = (
            patterns.get(get_pattern_key(keys, path), default) for keys in (list(patterns), sorted(patterns))
        )
        if value != saved:
            raise RequestError(
                "peft-pattern-order",
                f"{name} has several entries for {path}: the first says {value}, and in the saved file, which is "
                f"sorted, {saved} comes first",
                hint="make the entries exclude each other, such as by naming the layer in the regex",
            )
        return value

    def geometry(self, path: str) -> Geometry:
        """The shape of the module at `path` in the base model.

        Raises:
            RequestError: the numbers that hold for this module do not fit together.
        """
        strides = (
            self._value("stride_A_pattern", self.stride_A, path) if self.rotate else 0,
            self._value("stride_B_pattern", self.stride_B, path) if self.rotate else 0,
        )
        return Geometry(
            self._value("rank_pattern", self.r, path),
            self._value("unshared_pattern", self.unshared_r, path),
            self._value("chunks_A_pattern", self.chunks_A, path),
            self._value("chunks_B_pattern", self.chunks_B, path),
            *strides,
        )

    def alpha(self, path: str) -> float:
        """The alpha of the module at `path`."""
        alpha: float = self._value("alpha_pattern", self.lora_alpha, path)
        return alpha

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved; sets become sorted lists, so that the same config is the same file."""
        fields: dict[str, Any] = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}


_PATTERNS = (
    "rank_pattern", "alpha_pattern", "unshared_pattern",
    "chunks_A_pattern", "chunks_B_pattern", "stride_A_pattern", "stride_B_pattern",
)  # fmt: skip
