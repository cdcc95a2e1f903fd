"""The config's checks, and that importing the tuner is the user's choice."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from peft import PeftType, mapping

from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import ProloraError, RequestError, UnsupportedError
from prolora_tools.peft import ProLoraConfig, ProLoraModel, _register

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"r": 0}, "geometry-rank"),
        ({"r": 4, "unshared_r": 5}, "geometry-unshared"),
        ({"chunks_A": 0}, "geometry-chunks"),
        ({"stride_B": -1}, "geometry-stride"),
        ({"bias": "prolora_only"}, "peft-option"),
        ({"init_prolora_weights": "kaiming"}, "peft-option"),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, "peft-layers-with-regex"),
        ({"target_modules": ["q"], "layers_pattern": "layers"}, "peft-layers-pattern"),
        ({"format_version": 2}, "peft-format-version"),
    ],
)
def test_refusals(options: dict[str, Any], code: str) -> None:
    with pytest.raises(ProloraError) as caught:
        ProLoraConfig(**options)
    assert caught.value.code == code


def test_geometry_by_options() -> None:
    assert ProLoraConfig(r=8, unshared_r=1, chunks_A=7, chunks_B=5).geometry("x") == Geometry(8, 1, 7, 5)
    assert ProLoraConfig(r=8, chunks_A=7, stride_A=2, rotate=False).geometry("x") == Geometry(8, 0, 7, 1, 0, 0)


def test_the_order_of_patterns_matters_only_where_it_changes_something() -> None:
    same = ProLoraConfig(rank_pattern={"q_proj": 2, "a.q_proj": 2})
    assert same.geometry("a.q_proj").rank == 2
    other = ProLoraConfig(rank_pattern={"q_proj": 2, "a.q_proj": 3})
    assert other.geometry("b.q_proj").rank == 2
    with pytest.raises(RequestError):
        other.geometry("a.q_proj")


def test_importing_the_package_imports_neither_peft_nor_torch() -> None:
    script = "import sys, prolora_tools{}; print([m for m in ('peft', 'torch', 'transformers') if m in sys.modules])"
    for extra, expected in (("", "[]"), (".peft", "['peft', 'torch', 'transformers']")):
        done = subprocess.run([sys.executable, "-c", script.format(extra)], check=True, capture_output=True, text=True)
        assert done.stdout.strip() == expected


def _missing(_: str) -> str:
    raise importlib.metadata.PackageNotFoundError


@pytest.mark.parametrize(
    ("version", "code"),
    [(_missing, "peft-missing"), (lambda _: "0.20.3", "peft-too-old"), (lambda _: "0.9.0", "peft-too-old")],
)
def test_a_missing_or_old_peft_is_named(
    monkeypatch: pytest.MonkeyPatch, version: Callable[[str], str], code: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UnsupportedError) as caught:
        _register.require_peft()
    assert caught.value.code == code
    assert "pip install 'prolora-tools[peft]'" in caught.value.hint


@pytest.mark.parametrize("version", ["0.21.0", "0.22.0.dev0", "1.0"])
def test_newer_peft_is_let_through(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    _register.require_peft()


def test_registering_again_replaces_and_does_not_fail() -> None:
    _register.register(ProLoraConfig, ProLoraModel)
    member = PeftType("PROLORA")
    assert list(PeftType).count(member) == 1
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[member] == "prolora_"
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[member] is ProLoraModel


def test_a_prolora_from_elsewhere_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = type("ProLoraConfig", (), {"__module__": "peft.tuners.prolora"})
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("PROLORA"), foreign)
    with pytest.raises(UnsupportedError) as caught:
        _register.register(ProLoraConfig, ProLoraModel)
    assert caught.value.code == "peft-name-taken"
