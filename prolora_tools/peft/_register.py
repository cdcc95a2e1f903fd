"""Make PEFT know PRoLoRA from outside: the enum member first, then PEFT's own registration.

`register_peft_method` refuses names that `PeftType` does not have, so the member is added by hand.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from prolora_tools.errors import UnsupportedError

NAME = "PROLORA"
MINIMUM = (0, 21)


def require_peft() -> None:
    """Check that PEFT is installed and not older than the tuner was tested with.

    Raises:
        UnsupportedError: it is not.
    """
    hint = f"pip install 'prolora-tools[peft]' (PEFT {'.'.join(map(str, MINIMUM))} or newer)"
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnsupportedError(
            "peft-missing", "prolora_tools.peft needs PEFT, which is not installed", hint=hint
        ) from error
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < MINIMUM:
        raise UnsupportedError(
            "peft-too-old",
            f"PEFT {version} is installed, prolora_tools.peft needs {'.'.join(map(str, MINIMUM))} or newer",
            hint=hint,
        )


def member() -> Any:
    """The member `PeftType.PROLORA`, added where it is missing."""
    from peft.utils import PeftType  # noqa: PLC0415 - only after require_peft

    if NAME not in PeftType.__members__:
        made = str.__new__(PeftType, NAME)
        made._name_ = made._value_ = NAME
        made.__objclass__ = PeftType
        made._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = made
        PeftType._value2member_map_[NAME] = made
        type.__setattr__(PeftType, NAME, made)  # EnumType's own refuses to set members
    return PeftType(NAME)


def register(config: type, model: type) -> None:
    """Register the tuner; a second import of this package replaces the first.

    Raises:
        UnsupportedError: PEFT has a PRoLoRA from elsewhere already.
    """
    from peft import mapping  # noqa: PLC0415 - only after require_peft
    from peft.utils import register_peft_method  # noqa: PLC0415

    peft_type = member()
    present = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if present is not None and present.__module__ != config.__module__:
        raise UnsupportedError(
            "peft-name-taken",
            f"PEFT has the method {NAME} already, from {present.__module__}",
            hint="import only one of the two in a process",
        )
    for name in ("CONFIG", "TUNER", "PREFIX"):
        getattr(mapping, f"PEFT_TYPE_TO_{name}_MAPPING").pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config, model_cls=model)
