"""Model cards: rendered from reports, and completed without touching what an author wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from prolora_tools.files.config import AdapterConfig
from prolora_tools.hub import card
from prolora_tools.operations.compress import compress
from prolora_tools.operations.expand import expand
from prolora_tools.operations.merge import merge
from prolora_tools.operations.stats import stats

from .conftest import BASE

if TYPE_CHECKING:
    from pathlib import Path

LORA = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": BASE}
WANTED = card.metadata(LORA, base=BASE, license_id=None)


def split(text: str) -> tuple[dict[str, Any], str]:
    empty, front, body = text.split("---\n", 2)
    assert empty == ""
    data: dict[str, Any] = yaml.safe_load(front)
    return data, body


def test_compression(lora: Path, tmp_path: Path) -> None:
    report = compress(lora, tmp_path / "out", unshared=1, chunks=2)
    text = card.render(report.to_json(), AdapterConfig.read(tmp_path / "out").raw, license_id="mit")
    data, body = split(text)
    assert data["tags"] == ["prolora", "lora", f"base_model:adapter:{BASE}"]
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (BASE, "adapter", "mit")
    assert "# PRoLoRA adapter\n" in body
    assert f"error of dW is {report.relative_error:.4f}" in body
    assert f"({report.svd_parameters:,} parameters) has {report.svd_relative_error:.4f}" in body
    for row in ("rank r | 4", "unshared rank u | 1", "chunks m of A | 2", f"parameters | {report.parameters:,}"):
        assert f"| {row} |" in body
    assert "import prolora_tools.peft" in body
    assert f"prolora-tools merge {card.PLACEHOLDER} --base {BASE} -o merged" in body
    assert str(tmp_path) not in text


def test_dry_run_has_no_errors_to_tell(lora: Path, tmp_path: Path) -> None:
    report = compress(lora, tmp_path / "out", unshared=1, chunks=2, dry_run=True)
    assert "relative error" not in card.render(report.to_json(), {**LORA, "peft_type": "PROLORA"})


def test_expansion(prolora: Path, tmp_path: Path) -> None:
    report = expand(prolora, tmp_path / "out", uniform=True).to_json()
    text = card.render(report | {"source": f"alice/x@{'a' * 40}"}, LORA)
    assert f"from alice/x at commit {'a' * 40}, which gives the same dW." in text
    assert "AutoModelForSequenceClassification" in text
    assert "prolora_tools.peft" not in text


def test_merge(lora: Path, model: Path, tmp_path: Path) -> None:
    report = merge(lora, tmp_path / "out", base=model).to_json()
    data, body = split(card.render(report | {"base": BASE}, {"model_type": "llama"}))
    assert (data["library_name"], data["base_model_relation"]) == ("transformers", "merge")
    assert data["tags"] == ["merge", f"base_model:merge:{BASE}"]
    assert "2 tensors took a change" in body
    local, _ = split(card.render(report, {"model_type": "llama"}))
    assert local == {"library_name": "transformers", "tags": ["merge"]}


def test_budget_of_a_lora(lora: Path) -> None:
    text = card.render(stats(lora).to_json(), LORA, repo="alice/it")
    assert "# it\n" in text
    assert "## How it was made" not in text
    assert "chunks" not in text
    assert 'PeftModel.from_pretrained(base, "alice/it")' in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b", "a/b"), ("hf://a/b@v1", "a/b"), ("a/b@" + "0" * 40, "a/b"), ("./a/b", None), ("/a/b", None),
        ("a/b/c", None), ("gpt2", None), ("C:\\a", None), (None, None), ("", None), ("~/a", None),
    ],
)  # fmt: skip
def test_hub_names_and_paths(name: str | None, expected: str | None) -> None:
    assert card.hub_id(name) == expected


def test_a_folder_of_that_name_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card.hub_id("a/b") is None
    assert card.hub_id("hf://a/b") == "a/b"


def test_a_complete_card_is_not_touched() -> None:
    text = (
        f"---\n# a comment\nlibrary_name:   peft\nbase_model: {BASE}\nbase_model_relation: adapter\n"
        f"tags: [lora, 'base_model:adapter:{BASE}']\n---\nProse\r\n"
    )
    assert card.completed(text, WANTED) == text


@pytest.mark.parametrize(
    "text", ["", "# Title\n\n---\nnot metadata\n---\n", "---\n---\nx", "---\nlicense: mit\n---\n\n# é\n"]
)
def test_prose_is_kept(text: str) -> None:
    made = card.completed(text, WANTED)
    data, body = split(made)
    assert body.lstrip("\n") == text.rpartition("---\n" if text.startswith("---\n") else "\0")[2].lstrip("\n")
    assert data["tags"] == WANTED["tags"]
    assert data["base_model"] == BASE
    assert card.completed(made, WANTED) == made


def test_what_the_author_said_wins() -> None:
    text = "---\nlicense: mit\nbase_model: other/base\ntags: [a]\nmodel-index: [{name: x}]\n---\n"
    data, _ = split(card.completed(text, WANTED))
    assert (data["license"], data["base_model"], data["tags"][0]) == ("mit", "other/base", "a")
    assert data["model-index"] == [{"name": "x"}]
    explicit, _ = split(card.completed(text, WANTED, license_id="apache-2.0"))
    assert explicit["license"] == "apache-2.0"


def test_local_paths_are_taken_out() -> None:
    text = "---\nbase_model: [/home/me/x, a/b]\ntags: ['base_model:adapter:/home/me/x', keep]\n---\n"
    data, _ = split(card.completed(text, WANTED))
    assert data["base_model"] == ["a/b"]
    assert data["tags"] == ["keep", "lora", f"base_model:adapter:{BASE}"]


@pytest.mark.parametrize("front", ["a: [", "- a list", "just text"])
def test_metadata_that_cannot_be_read(front: str) -> None:
    with pytest.raises(ValueError, match=r"metadata|flow|expected"):
        card.completed(f"---\n{front}\n---\n", WANTED)
