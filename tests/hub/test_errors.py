"""The errors that no other test here meets: each from its cause, one line and what to do."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from .conftest import Cli, contents, finish, leftovers
from .repos import Entry, lfs_entry

if TYPE_CHECKING:
    from pathlib import Path

    from .server import Hub

STATUSES = {
    401: ("GET .*/tree/", "wants an access token", "hf auth login"),
    404: ("GET .*/resolve/", "answers 404", "run the command again"),
    429: ("GET /api/models/alice/it$", "asks to slow down", "wait"),
    500: ("GET /api/models/alice/it$", "answers 500", "run the command again"),
}


@pytest.mark.parametrize("status", STATUSES)
def test_statuses(hub: Hub, cli: Cli, lora: Path, status: int) -> None:
    hub.create("alice/it", contents(lora))
    pattern, what, hint = STATUSES[status]
    hub.fault(pattern, "status", status, times=99)
    error, _, advice = cli("pull", "alice/it", "-o", "out").error.partition("\n")
    assert what in error
    assert hint in advice
    assert leftovers(cli.folder) == []


def test_a_file_that_is_gone(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    hub.fault("GET .*/resolve/", "status", 404, times=9)
    hub.fault("GET .*/resolve/", "headers", {"X-Error-Code": "EntryNotFound"}, times=9)
    assert "a file that was listed is gone" in cli("pull", "alice/it", "-o", "out").error


def test_a_disabled_repository(hub: Hub, cli: Cli) -> None:
    hub.create("alice/it")
    hub.fault("GET /api/models/alice/it$", "status", 403)
    hub.fault("GET /api/models/alice/it$", "headers", {"X-Error-Message": "Access to this resource is disabled."})
    assert "disabled by the Hub's moderators" in cli("pull", "alice/it", "-o", "out").error


LISTINGS: dict[str, tuple[dict[str, Entry], str]] = {
    "odd hash": ({"config.json": Entry(2, "../x")}, "hashes or sizes that no Hub gives"),
    "odd sha256": ({"model.safetensors": Entry(2, "0" * 40, "x")}, "hashes or sizes that no Hub gives"),
    "negative": ({"config.json": Entry(-1, "0" * 40)}, "at most"),
    "large weights": ({"model.safetensors": lfs_entry("0" * 64, 65 << 30)}, "at most 68,719,476,736"),
    "large text": ({"config.json": Entry(300 << 20, "0" * 40)}, "at most 268,435,456"),
    "full disk": ({f"model-{i:05d}.safetensors": lfs_entry("0" * 64, 60 << 30) for i in range(500)}, "bytes, /"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_listings(hub: Hub, cli: Cli, lora: Path, case: str) -> None:
    files, what = LISTINGS[case]
    hub.create("alice/it", contents(lora)).commit("main").files.update(files)
    assert what in cli("pull", "alice/it", "-o", "out").error
    assert not hub.seen("resolve")
    assert leftovers(cli.folder) == []


def test_a_commit_that_is_none(hub: Hub, cli: Cli, lora: Path) -> None:
    repo = hub.create("alice/it", contents(lora))
    repo.commits["../../x"] = replace(repo.commit("main"), oid="../../x")
    repo.refs["refs/heads/main"] = "../../x"
    assert "which is no commit" in cli("pull", "alice/it", "-o", "out").error


def test_a_branch_that_moves_while_it_is_read(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    hub.fault("GET .*/tree/", "pause", 1)
    process = cli.start("expand", "alice/it", "-o", "out")
    while not hub.seen("GET /api/models/alice/it$"):
        time.sleep(0.01)
    hub.commit("alice/it", {"notes.txt": b"x"})
    assert "moved on from commit" in finish(process).error
    assert leftovers(cli.folder) == []


def test_a_proxys_page_instead_of_an_answer(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    for body in (b"<html>Log in</html>", b"{}"):
        hub.fault("GET /api/models/alice/it$", "body", body)
        result = cli("pull", "alice/it", "-o", "out")
        assert result.code == 1
        assert "an answer that is not a Hub's" in result.error


PULLS = {
    "two revisions": (("alice/it@a", "--revision", "b"), "both name a revision"),
    "refused by the client": (("alice/it.git",), "alice/it.git: "),
    "short commit": (("alice/it", "--expect-revision", "abc"), "7 to 40 hexadecimal digits"),
}


@pytest.mark.parametrize("case", PULLS)
def test_pull_requests_that_make_no_sense(cli: Cli, case: str) -> None:
    arguments, what = PULLS[case]
    assert what in cli("pull", *arguments, "-o", "out").error


PUSHES = {
    "two branches": (("alice/it@a", "--revision", "b"), "both name a branch"),
    "pull request on a branch": (("alice/it", "--create-pr", "--revision", "b"), "a pull request goes to main"),
    "pull request to nothing": (("alice/new", "--create-pr"), "no repository alice/new to open a pull request in"),
    "to a tag": (("alice/it", "--revision", "v1"), "v1 of alice/it is no branch"),
    "to a missing pull request": (("alice/it", "--revision", "refs/pr/9"), "is no branch to commit to"),
}


@pytest.mark.parametrize("case", PUSHES)
def test_push_requests_that_make_no_sense(hub: Hub, cli: Cli, lora: Path, case: str) -> None:
    repo = hub.create("alice/it")
    repo.refs["refs/tags/v1"] = repo.commit("main").oid
    arguments, what = PUSHES[case]
    assert what in cli("push", lora, *arguments).error
    assert len(repo.commits) == 1


def test_a_card_that_cannot_be_read(hub: Hub, cli: Cli, lora: Path) -> None:
    for data in (b"---\na: [\n---\n", b"\xff\xfe"):
        (lora / "README.md").write_bytes(data)
        assert "metadata that cannot be read" in cli("push", lora, "alice/it").error
    assert not hub.requests


def test_pickles_are_not_pushed(hub: Hub, cli: Cli, lora: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    torch.save(load_file(lora / "adapter_model.safetensors"), lora / "adapter_model.bin")
    (lora / "adapter_model.safetensors").unlink()
    result = cli("push", lora, "alice/it")
    assert "a pickle" in result.error
    assert "prolora-tools expand" in result.error
    assert not hub.repos
