"""PRoLoRA as a PEFT tuner: `get_peft_model(model, ProLoraConfig(...))` trains, saves and loads our format.

PEFT does not load plugins by itself: `import prolora_tools.peft` once, before an adapter of this kind is loaded.
The import registers the method, in memory only. Needs the extra `prolora-tools[peft]`.
"""

from __future__ import annotations

from prolora_tools.peft._register import register, require_peft

require_peft()

# The tuner's modules import PEFT, so they come after the check that gives a missing or old PEFT a clear error.
from prolora_tools.peft.config import ProLoraConfig  # noqa: E402
from prolora_tools.peft.layer import ProLoraLayer, ProLoraLinear  # noqa: E402
from prolora_tools.peft.model import ProLoraModel  # noqa: E402

register(ProLoraConfig, ProLoraModel)

__all__ = ["ProLoraConfig", "ProLoraLayer", "ProLoraLinear", "ProLoraModel"]
