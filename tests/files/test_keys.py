"""Names of tensors and modules, with PEFT's own functions as the oracle."""

from __future__ import annotations

import re
import string
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from prolora_tools.files import keys

parts = st.sampled_from(["model", "layers", "0", "1", "11", "self_attn", "q_proj", "k_proj", "proj", "q", "lm_head"])
paths = st.lists(parts, min_size=1, max_size=5).map(".".join)
names = st.one_of(paths, st.sampled_from(["oj", "_proj", "j", "", ".q_proj", "q_proj.", "1.q_proj"]))
regexes = st.one_of(
    paths,
    paths.map(re.escape),
    st.sampled_from(
        [
            r".*\.q_proj",
            r"q_proj|k_proj",
            r"^model\.layers\.[01]\..*",
            r"layers\.1",
            r".*",
            r"",
            r"(q|k)_proj",
            r"layers\.\d+\.self_attn\.q_proj",
            r"(?:model\.)?lm_head$",
            r"^q_proj",
            r"\.q_proj",
            r"model.layers.(?!0).*q_proj",
        ]
    ),
)


@settings(max_examples=500, deadline=None)
@given(patterns=st.lists(regexes, max_size=4), path=paths)
def test_pattern_key_is_pefts(patterns: list[str], path: str) -> None:
    found = keys.pattern_key(dict.fromkeys(patterns), path)
    expected = get_pattern_key(list(dict.fromkeys(patterns)), path)
    # PEFT gives the path itself where nothing matches, which the caller then does not find in the pattern.
    assert found == (expected if expected in patterns else None)


def test_the_first_entry_in_file_order_holds() -> None:
    both = {"q_proj": 1, "layers.1.q_proj": 2}
    assert keys.pattern_key(both, "layers.1.q_proj") == "q_proj"
    assert keys.pattern_key(dict(reversed(both.items())), "layers.1.q_proj") == "layers.1.q_proj"


def test_a_pattern_is_matched_from_a_dot_to_the_end() -> None:
    assert keys.pattern_key({"proj": 1}, "layers.0.q_proj") is None
    assert keys.pattern_key({"q_proj": 1}, "layers.0.q_proj.extra") is None
    assert keys.pattern_key({"layers.0": 1}, "layers.0.q_proj") is None
    assert keys.pattern_key({"^layers.0.q_proj": 1}, "model.layers.0.q_proj") is None


@settings(max_examples=500, deadline=None)
@given(targets=st.one_of(st.lists(names, max_size=4), regexes), path=paths)
def test_target_matching_is_pefts(targets: list[str] | str, path: str) -> None:
    config = SimpleNamespace(target_modules=targets, target_parameters=None, exclude_modules=None, modules_to_save=None)
    assert keys.matches_target(targets, path) == bool(check_target_module_exists(config, path))


def test_all_linear_picks_everything_and_none_nothing() -> None:
    assert keys.matches_target("all-linear", "model.q_proj")
    assert keys.matches_target("All-Linear", "model.q_proj")
    assert not keys.matches_target(None, "model.q_proj")


SUFFIXES = [
    *((suffix, role, False) for suffix, role in keys.LORA_ROLES.items()),
    *((suffix, role, True) for suffix, role in keys.PROLORA_ROLES.items()),
]
modules = st.lists(st.text(string.ascii_lowercase + "_" + string.digits, min_size=1), min_size=1, max_size=4)


@given(path=modules.map(".".join), case=st.sampled_from(SUFFIXES))
def test_parse_finds_path_and_role(path: str, case: tuple[str, str, bool]) -> None:
    suffix, role, prolora = case
    assert keys.parse(path + suffix, prolora=prolora) == (path, role)
    made = (keys.prolora_key if prolora else keys.lora_key)(path, role)
    assert keys.parse(made.removeprefix(keys.PREFIX), prolora=prolora) == (path, role)


def test_substrings_do_not_count() -> None:
    """`lora_A` is in `prolora_A`, and in the names of other tuners' tensors."""
    for name in (
        "q.prolora_A",
        "q.prolora_A_unshared",
        "q.lora_A",
        "q.lora_A.weights",
        "qlora_A.weight",
        "q.xlora_A.weight",
    ):
        assert keys.parse(name, prolora=False) is None
    for name in ("q.lora_A.weight", "q.prolora_A.weight", "q.prolora_C", "qprolora_A"):
        assert keys.parse(name, prolora=True) is None


@pytest.mark.parametrize("prolora", [False, True])
def test_trainable_tokens(prolora: bool) -> None:
    for name in ("m.embed.token_adapter.trainable_tokens_delta", "m.embed.trainable_tokens_delta"):
        assert keys.parse(name, prolora=prolora) == ("m.embed", "tokens")


def test_only_a_lora_bias_changes_its_name() -> None:
    lora, prolora = "base_model.model.q.lora_B.bias", "base_model.model.q.prolora_B_bias"
    assert keys.renamed(lora, prolora=True) == prolora
    assert keys.renamed(prolora, prolora=False) == lora
    assert keys.renamed(lora, prolora=False) == lora
    assert keys.renamed(prolora, prolora=True) == prolora
    for name in ("base_model.model.lm_head.weight", "base_model.model.q.base_layer.bias", "base_model.model.norm.bias"):
        assert keys.renamed(name, prolora=True) == keys.renamed(name, prolora=False) == name
