"""PEFT's own warnings kept out of warnings-as-errors, and one cache of the bundled models."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent

PEFT_NOISE = (
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # PEFT reads what transformers 5.23 deprecates
    "ignore:Could not find a config file in:UserWarning",  # no hub in tests: PEFT cannot look the base up
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # what the variants are about
    "ignore:Model has `tie_word_embeddings=True`:UserWarning",  # the same
    "ignore:.*tied.*:UserWarning",  # the same
    "ignore:Adapter 'default'.*lora_B.bias:UserWarning",  # PEFT takes lora_bias's own vector for a damaged tensor
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",  # PEFT corrects the flag
    "ignore:The following .*_pattern keys did not match:RuntimeWarning",  # PEFT looks at modules, not at parameters
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            for noise in PEFT_NOISE:
                item.add_marker(pytest.mark.filterwarnings(noise))
