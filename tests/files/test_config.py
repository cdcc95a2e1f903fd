"""adapter_config.json: what is read, what is kept, what is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from prolora_tools.errors import ProloraError
from prolora_tools.files.adapter import Adapter
from prolora_tools.files.config import FILE, AdapterConfig, dump
from prolora_tools.operations.compress import compress
from prolora_tools.operations.expand import expand
from tests.failing import build

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
PROLORA = {**LORA, "peft_type": "PROLORA", "unshared_r": 1, "chunks_A": 2, "chunks_B": 4}


def parsed(**fields: Any) -> AdapterConfig:
    return AdapterConfig.from_json({**LORA, **fields}, Path(FILE))


def test_defaults_are_pefts() -> None:
    """Fields that an old or hand-made config lacks mean what PEFT takes them for."""
    config, peft = AdapterConfig.from_json({"peft_type": "LORA"}, Path(FILE)), LoraConfig()
    assert (config.r, config.alpha, config.use_rslora, config.use_dora) == (8, 8, False, False)
    assert (peft.r, peft.lora_alpha, peft.use_rslora, peft.use_dora) == (8, 8, False, False)
    assert config.bias == peft.bias == "none"
    assert config.rank_pattern == peft.rank_pattern == {}


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"], rank_pattern={"q_proj": 2}).save_pretrained(tmp_path)
    config = AdapterConfig.read(tmp_path)
    assert (config.r, config.alpha, config.rank("model.q_proj"), config.scaling("model.q_proj")) == (4, 3, 2, 1.5)


def test_scaling_uses_the_total_rank_of_the_module() -> None:
    patterns = {"rank_pattern": {"a": 4}, "alpha_pattern": {"b": 2}}
    plain = parsed(**patterns)
    assert [plain.scaling(p) for p in ("x.a", "x.b", "x.c")] == [4, 0.25, 2]
    rooted = parsed(use_rslora=True, **patterns)
    assert [rooted.scaling(p) for p in ("x.a", "x.b")] == [8, 2 / math.sqrt(8)]
    shared = AdapterConfig.from_json(PROLORA, Path(FILE))
    assert shared.scaling("q_proj") == 2


def test_first_pattern_in_file_order_holds() -> None:
    text = '{"peft_type": "LORA", "rank_pattern": {"z_proj": 2, "layers.1.z_proj": 4}, "target_modules": ["z_proj"]}'
    swapped = '{"peft_type": "LORA", "rank_pattern": {"layers.1.z_proj": 4, "z_proj": 2}, "target_modules": ["z_proj"]}'
    ranks = [AdapterConfig.from_json(json.loads(t), Path(FILE)).rank("layers.1.z_proj") for t in (text, swapped)]
    assert ranks == [2, 4]


names = st.text("abz.*", min_size=1, max_size=4).filter(lambda s: not s.startswith("*") and "**" not in s)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=2), inner, max_size=2)),
    max_leaves=4,
)


@settings(max_examples=200, deadline=None)
@given(
    pattern=st.dictionaries(names, st.integers(1, 9), max_size=4),
    unknown=st.dictionaries(st.text(max_size=3), json_values, max_size=3),
)
def test_dump_sorts_fields_and_keeps_the_order_inside(pattern: dict[str, int], unknown: dict[str, Any]) -> None:
    raw = {**unknown, "rank_pattern": pattern, "peft_type": "LORA"}
    written = dump(raw)
    again = json.loads(written)
    assert again == raw
    assert list(again) == sorted(raw)
    assert list(again["rank_pattern"]) == list(pattern)
    assert dump(dict(reversed(raw.items()))) == written
    assert written.endswith(b"}\n")


@pytest.mark.parametrize("order", [("self_attn.q_proj", "q_proj"), ("q_proj", "self_attn.q_proj")])
def test_pattern_order_survives_compress_and_expand(order: tuple[str, str], tmp_path: Path) -> None:
    ranks = {"self_attn.q_proj": 3, "q_proj": 2}
    alphas = {"self_attn.q_proj": 9.5, "q_proj": 1}
    config = {
        "rank_pattern": {k: ranks[k] for k in order},
        "alpha_pattern": {k: alphas[k] for k in order},
        "r": 1,
        "their_own_field": {"z": 1, "a": [2]},
    }
    build.write(tmp_path, build.adapter(config, build.factors(rank=ranks[order[0]])))
    compress(tmp_path / "adapter", tmp_path / "shared", unshared=1, chunks=2)
    expand(tmp_path / "shared", tmp_path / "again")
    for name in ("adapter", "shared", "again"):
        opened = Adapter.open(tmp_path / name)
        assert list(opened.config.rank_pattern) == list(order)
        assert list(opened.config.alpha_pattern) == list(order)
        assert opened.config.raw["their_own_field"] == {"z": 1, "a": [2]}
        assert opened.modules[build.Q].geometry.rank == ranks[order[0]]
        assert opened.modules[build.Q].scaling == alphas[order[0]] / ranks[order[0]]


def test_overlapping_alpha_patterns_are_told(tmp_path: Path) -> None:
    overlapping = {"alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 2}}
    build.write(tmp_path, build.adapter(overlapping))
    (note,) = Adapter.open(tmp_path / "adapter").notes
    assert "'q_proj' and 'self_attn.q_proj' both match" in note
    build.write(tmp_path, build.adapter({"alpha_pattern": {"q_proj": 1, "self_attn.q_proj": 1}}))
    assert Adapter.open(tmp_path / "adapter").notes == ()


def test_prolora_geometry_and_patterns() -> None:
    patterns = {
        "rank_pattern": {"k": 6},
        "unshared_pattern": {"k": 0},
        "chunks_A_pattern": {"k": 3},
        "chunks_B_pattern": {"v": 1},
        "stride_A_pattern": {"k": 5},
    }
    config = AdapterConfig.from_json({**PROLORA, "stride_B": 2, **patterns}, Path(FILE))
    found = {p: config.geometry(p) for p in ("q", "k", "v")}
    assert [(g.rank, g.unshared, g.chunks_a, g.chunks_b) for g in found.values()] == [
        (8, 1, 2, 4),
        (6, 0, 3, 4),
        (8, 1, 2, 1),
    ]
    assert [(g.a.stride, g.b.stride) for g in found.values()] == [(3, 2), (5, 2), (3, 2)]
    still = AdapterConfig.from_json({**PROLORA, "rotate": False, "stride_B": 2, **patterns}, Path(FILE))
    assert {(g.a.stride, g.b.stride) for g in map(still.geometry, "qkv")} == {(0, 0)}


def refusal(raw: dict[str, Any]) -> ProloraError | None:
    """Use a config as an adapter does; anything but a typed error fails the test."""
    try:
        config = AdapterConfig.from_json(raw, Path(FILE))
        config.geometry("model.q_proj")
    except ProloraError as error:
        return error
    assert math.isfinite(config.scaling("model.q_proj"))
    return None


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_value_in_any_field_is_read_or_refused(data: st.DataObject) -> None:
    """No field can make anything but a typed error, whatever JSON value stands in it."""
    field = data.draw(st.sampled_from(sorted({*LoraConfig().to_dict(), *PROLORA, "format_version", "rotate"})))
    odd = st.sampled_from([10**400, -1, 0, math.inf, math.nan, 1e308, "(", "(?i)x", "a{99999999999}", [[]], [None], {}])
    value = data.draw(st.one_of(json_values, odd, st.dictionaries(st.text(max_size=3), json_values, max_size=2)))
    for raw in ({**LORA, field: value}, {**PROLORA, field: value}):
        error = refusal(raw)
        assert error is None or (error.exit_code == 1 and len(error.message) < 600)
