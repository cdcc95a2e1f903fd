"""pull: what is asked for is what is written, or nothing is."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import pytest

from .conftest import Cli, contents, leftovers, write_lora, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from .server import Hub


def test_revisions(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    old, new = (contents(write_lora(tmp_path / f"{seed}", seed=seed)) for seed in (1, 2))
    repo = hub.create("alice/it", old)
    first = repo.commit("main").oid
    repo.refs["refs/tags/v1"] = first
    hub.commit("alice/it", new)
    for i, name in enumerate(("alice/it@v1", f"hf://alice/it@{first}", f"alice/it@{first[:8]}")):
        result = cli("pull", name, "-o", f"out{i}")
        assert (result.code, result.out) == (0, f"{first} out{i}\n")
        assert contents(cli.folder / f"out{i}") == old
    assert cli("pull", "alice/it", "-o", "new").code == 0
    assert contents(cli.folder / "new") == new
    report = json.loads(cli("pull", "alice/it", "--revision", "v1", "-o", "json", "--json").out)
    assert (report["commit"], report["revision"], report["repo"]) == (first, "v1", "alice/it")
    weights = hashlib.sha256(old["adapter_model.safetensors"]).hexdigest()
    assert {f["name"]: f["sha256"] for f in report["files"]}["adapter_model.safetensors"] == weights


def test_only_the_model_is_taken(hub: Hub, cli: Cli, model: Path) -> None:
    others = {"optimizer.pt": b"x", "train.py": b"x", ".github/x.yml": b"x", "checkpoint-1/config.json": b"{}"}
    hub.create("alice/it", contents(model) | others | {"training_args.bin": b"x"})
    result = cli("pull", "alice/it", "-o", "out")
    assert (result.code, result.err) == (0, "Note: train.py (code) was not downloaded\n")
    assert contents(cli.folder / "out") == contents(model)


def test_many_pages(hub: Hub, cli: Cli, model: Path) -> None:
    hub.create("alice/it", contents(model))
    hub.page_size = 2
    assert cli("pull", "alice/it", "-o", "out").code == 0
    assert contents(cli.folder / "out") == contents(model)


def test_dry_run_downloads_nothing(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    result = cli("pull", "alice/it", "-o", "out", "--dry-run")
    assert "adapter_model.safetensors" in result.out
    assert leftovers(cli.folder) == []
    assert not hub.seen("resolve")


def test_an_existing_folder_is_replaced_when_told(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    write_model(cli.folder / "out")
    before = contents(cli.folder / "out")
    result = cli("pull", "alice/it", "-o", "out")
    assert "exists" in result.error
    assert contents(cli.folder / "out") == before
    assert not hub.requests
    assert cli("pull", "alice/it", "-o", "out", "--overwrite").code == 0
    assert contents(cli.folder / "out") == contents(lora)
    assert leftovers(cli.folder) == ["out"]


def test_a_link_inside_the_old_folder_is_not_followed(hub: Hub, cli: Cli, model: Path, tmp_path: Path) -> None:
    hub.create("alice/it", contents(model))
    write_model(cli.folder / "out")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "tool_use.jinja").write_text("untouched")
    templates = cli.folder / "out" / "additional_chat_templates"
    (templates / "tool_use.jinja").unlink()
    templates.rmdir()
    templates.symlink_to(outside, target_is_directory=True)
    assert cli("pull", "alice/it", "-o", "out", "--overwrite").code == 0
    assert contents(outside) == {"tool_use.jinja": b"untouched"}
    assert contents(cli.folder / "out") == contents(model)
    assert not templates.is_symlink()


def test_expectations(hub: Hub, cli: Cli, lora: Path) -> None:
    files = contents(lora)
    commit = hub.create("alice/it", files).commit("main").oid
    good = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
    config = hashlib.sha256(files["adapter_config.json"]).hexdigest()
    wrong = {
        "--expect-revision 0000000": "expected 0000000",
        f"--sha256 adapter_model.safetensors={'0' * 64}": "expected 0000",
        f"--sha256 adapter_config.json={'0' * 64}": "expected 0000",
        f"--sha256 nothing={good}": "no file 'nothing'",
        "--sha256 x=abc": "64 hexadecimal digits",
    }
    for options, what in wrong.items():
        result = cli("pull", "alice/it", "-o", "out", *options.split())
        assert result.code in {1, 2}
        assert what in result.error
        assert leftovers(cli.folder) == []
    right = (
        f"--sha256 adapter_model.safetensors={good} --sha256 adapter_config.json={config} --expect-revision {commit}"
    )
    assert cli("pull", "alice/it", "-o", "out", *right.split()).code == 0


def test_pickles(hub: Hub, cli: Cli, lora: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(lora / "adapter_model.safetensors"), lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    hub.create("alice/it", contents(lora))
    result = cli("pull", "alice/it", "-o", "out")
    assert result.code == 1
    assert "can hold code" in result.error
    assert "--allow-pickle" in result.error
    assert cli("pull", "alice/it", "-o", "out", "--allow-pickle").code == 0
    assert contents(cli.folder / "out") == contents(lora)


def test_a_pickle_with_code_is_refused_even_when_allowed(hub: Hub, cli: Cli, lora: Path) -> None:
    import os
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(cli.folder / "owned"),)

    files = contents(lora)
    del files["adapter_model.safetensors"]
    hub.create("alice/it", files | {"adapter_model.bin": pickle.dumps(Evil(), protocol=2)})
    result = cli("pull", "alice/it", "-o", "out", "--allow-pickle")
    assert result.code == 1
    assert "refuses it" in result.error
    assert leftovers(cli.folder) == []


def test_code_is_refused(hub: Hub, cli: Cli, model: Path) -> None:
    config = {"model_type": "x", "auto_map": {"AutoModel": "modeling_x.X"}}
    hub.create("alice/it", contents(model) | {"config.json": json.dumps(config).encode(), "modeling_x.py": b"x"})
    result = cli("pull", "alice/it", "-o", "out")
    assert "auto_map" in result.error
    assert leftovers(cli.folder) == []


def test_an_incomplete_model_is_refused(hub: Hub, cli: Cli, model: Path) -> None:
    files = contents(model)
    del files["model-00002-of-00002.safetensors"]
    hub.create("alice/it", files)
    result = cli("pull", "alice/it", "-o", "out")
    assert "alice/it/model-00002-of-00002.safetensors is missing" in result.error
    assert leftovers(cli.folder) == []


ERRORS = {
    "missing": ({}, "alice/nothing", "there is no repository alice/nothing", "check the name"),
    "missing, anonymous": ({"token": None}, "alice/nothing", "there is no repository", "hf auth login"),
    "private": ({"token": "hf_bob"}, "alice/private", "there is no repository", "hf auth login"),
    "gated": ({"token": "hf_bob"}, "alice/gated", "is gated", "ask for access at"),
    "gated, anonymous": ({"token": None}, "alice/gated", "is gated", "ask for access at"),
    "bad token": ({"token": "hf_wrong"}, "alice/it", "does not know this access token", "hf auth login"),
    "revision": ({}, "alice/it@nope", "has no revision 'nope'", "branches"),
    "empty": ({}, "alice/empty", "no adapter_model.safetensors", "check the name"),
    "unreachable": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "alice/it", "cannot be reached", "network"),
    "offline": ({"HF_HUB_OFFLINE": "1"}, "alice/it", "may not or cannot be asked", "HF_HUB_OFFLINE"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_line_says_what_to_do(hub: Hub, cli: Cli, lora: Path, case: str) -> None:
    files = contents(lora)
    hub.create("alice/it", files)
    hub.create("alice/empty")
    hub.create("alice/private", files, private=True)
    hub.create("alice/gated", files, gated=True)
    options, repo, what, hint = ERRORS[case]
    result = cli("pull", repo, "-o", "out", **options)  # type: ignore[arg-type] # a table of options
    error, _, advice = result.error.partition("\n")
    assert result.code == 1
    assert what in error
    assert hint in advice
    assert leftovers(cli.folder) == []
