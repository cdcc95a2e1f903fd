"""push: roundtrips in both upload modes, what is sent, and who may."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml

from .conftest import Cli, contents, finish, write_lora, write_model

if TYPE_CHECKING:
    from pathlib import Path

    from .server import Hub

MODES = pytest.mark.parametrize("xet", [True, False], ids=["xet", "lfs"])
MOSTLY_XET = pytest.mark.parametrize(
    "xet", [pytest.param(True, id="xet"), pytest.param(False, id="lfs", marks=pytest.mark.slow)]
)


@MODES
@pytest.mark.parametrize("kind", ["lora", "prolora", "model"])
def test_roundtrip_is_byte_identical(
    hub: Hub, cli: Cli, kind: str, request: pytest.FixtureRequest, *, xet: bool
) -> None:
    folder: Path = request.getfixturevalue(kind)
    hub.multipart_over, hub.part_size = 3_000, 2_500
    pushed = cli("push", folder, "alice/it", xet=xet)
    assert (pushed.code, pushed.err) == (0, "")
    commit = hub.repos["alice/it"].commit("main").oid
    assert pushed.out == f"{hub.url}/alice/it/commit/{commit}\n"
    assert bool(hub.seen("xet-write-token")) == xet
    assert bool(hub.seen("PUT /part/")) != xet
    pulled = cli("pull", "alice/it", "-o", "out", xet=xet)
    assert (pulled.code, pulled.out, pulled.err) == (0, f"{commit} out\n", "")
    got = contents(cli.folder / "out")
    assert "prolora-tools" in got.pop("README.md").decode() or kind == "model"
    assert got == contents(folder)
    again = cli("push", folder, "alice/it", xet=xet)
    assert again.out == f"{pushed.out.strip()} (unchanged)\n"
    assert len(hub.repos["alice/it"].history("main")) == 2


def test_only_the_adapter_is_sent(hub: Hub, cli: Cli, lora: Path) -> None:
    for name in (".env", "training_args.bin", "optimizer.pt", "notes.txt", "other.safetensors", ".git/config"):
        (lora / name).parent.mkdir(exist_ok=True)
        (lora / name).write_text("SECRET")
    report = json.loads(cli("push", lora, "alice/it", "--json").out)
    assert sorted(hub.files("alice/it")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert not any(b"SECRET" in data for data in hub.files("alice/it").values())
    assert {s.split()[0] for s in report["skipped"]} >= {
        ".env",
        "training_args.bin",
        "other.safetensors",
        ".git/config",
    }
    assert report["report"] == "PushReport"


@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_that_lead_out_are_refused(hub: Hub, cli: Cli, model: Path, tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jinja").write_text("SECRET")
    if what == "file":
        (model / "merges.txt").symlink_to(outside / "secret.jinja")
    else:
        (model / "additional_chat_templates" / "tool_use.jinja").unlink()
        (model / "additional_chat_templates").rmdir()
        (model / "additional_chat_templates").symlink_to(outside, target_is_directory=True)
    result = cli("push", model, "alice/it")
    assert result.code == 1
    assert "no regular file in" in result.error
    assert not hub.repos


def test_links_inside_are_followed(hub: Hub, cli: Cli, model: Path) -> None:
    (model / "LICENSE").symlink_to("config.json")
    assert cli("push", model, "alice/it").code == 0
    assert hub.files("alice/it")["LICENSE"] == (model / "config.json").read_bytes()


def test_a_broken_folder_is_not_sent(hub: Hub, cli: Cli, lora: Path) -> None:
    weights = lora / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = cli("push", lora, "alice/it")
    assert result.code == 1
    assert "bytes long" in result.error
    assert not hub.requests


def test_new_shards_replace_the_old_weights(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    old = {"model.safetensors": b"old", "pytorch_model.bin": b"old", "model-00001-of-00003.safetensors": b"old"}
    hub.create("alice/it", old | {"notes.txt": b"kept"})
    folder = write_model(tmp_path / "new")
    assert cli("push", folder, "alice/it").code == 0
    assert set(hub.files("alice/it")) == set(contents(folder)) | {"README.md", "notes.txt"}


@MOSTLY_XET
def test_pull_request(hub: Hub, cli: Cli, lora: Path, *, xet: bool) -> None:
    hub.create("bob/it")
    first = cli("push", lora, "bob/it", "--create-pr", "--commit-message", "Better", xet=xet)
    assert (first.code, first.out) == (0, f"{hub.url}/bob/it/discussions/1\n")
    assert hub.files("bob/it") == {}
    assert "adapter_model.safetensors" in hub.files("bob/it", "refs/pr/1")
    again = cli("push", lora, "bob/it", "--create-pr", "--commit-message", "Better", xet=xet)
    assert again.out == f"{first.out.strip()} (unchanged)\n"
    assert list(hub.repos["bob/it"].pulls) == [1]
    more = cli("push", write_lora(lora, seed=1), "bob/it", "--create-pr", "--commit-message", "Better", xet=xet)
    assert more.out == f"{hub.url}/bob/it/discussions/2\n"


def test_branch_is_made(hub: Hub, cli: Cli, lora: Path) -> None:
    text = ("--commit-message", "A title", "--commit-description", "A text")
    assert cli("push", lora, "alice/it", "--revision", "dev/a", *text).code == 0
    repo = hub.repos["alice/it"]
    assert hub.files("alice/it") == {}
    assert "adapter_model.safetensors" in hub.files("alice/it", "dev/a")
    assert (repo.commit("dev/a").title, repo.commit("dev/a").message) == ("A title", "A text")
    assert cli("pull", "alice/it@dev/a", "-o", "out").code == 0


def test_own_namespace_and_private(hub: Hub, cli: Cli, lora: Path) -> None:
    report = json.loads(cli("push", lora, "it", "--private", "--json").out)
    assert (report["repo"], report["private"], report["created"]) == ("alice/it", True, True)
    assert hub.repos["alice/it"].private
    hub.create("alice/public")
    result = cli("push", lora, "alice/public", "--private")
    assert result.code == 1
    assert "public already" in result.error
    assert len(hub.repos["alice/public"].commits) == 1


def test_dry_run_sends_nothing(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", {"adapter_config.json": (lora / "adapter_config.json").read_bytes()})
    result = cli("push", lora, "alice/it", "--dry-run")
    assert result.code == 0
    changes = {line.split()[2]: line.split()[0] for line in result.out.splitlines()}
    assert changes["adapter_config.json"] == "unchanged"
    assert changes["adapter_model.safetensors"] == "added"
    assert cli("push", lora, "alice/new", "--dry-run").code == 0
    assert {r.method for r in hub.requests} <= {"GET", "HEAD"}
    assert list(hub.repos) == ["alice/it"]


def test_large_folders_take_the_clients_path(hub: Hub, cli: Cli, model: Path) -> None:
    for i in range(220):
        (model / "additional_chat_templates" / f"t{i}.jinja").write_text(f"{i}")
    hub.create("alice/it", {"model.safetensors": b"old"})
    assert cli("push", model, "alice/it").code == 0
    assert set(hub.files("alice/it")) == set(contents(model)) | {"README.md"}
    assert hub.repos["alice/it"].history("main")[0].title == "Upload merged model"


@MOSTLY_XET
def test_six_pushes_at_once_all_land(hub: Hub, cli: Cli, tmp_path: Path, *, xet: bool) -> None:
    folders = [write_lora(tmp_path / f"lora{i}", seed=i) for i in range(6)]
    started = [cli.start("push", f, "alice/it", "--commit-message", f.name, xet=xet) for f in folders]
    results = [finish(process) for process in started]
    assert [r.code for r in results] == [0] * 6, [r.err for r in results]
    history = hub.repos["alice/it"].history("main")
    assert sorted(c.title for c in history) == ["initial commit", *(f.name for f in folders)]
    for commit in history[:-1]:
        sent = (tmp_path / commit.title / "adapter_model.safetensors").read_bytes()
        assert hub.files("alice/it", commit.oid)["adapter_model.safetensors"] == sent
    assert {r.out.strip().rpartition("/")[2] for r in results} == {c.oid for c in history[:-1]}


ERRORS = {
    "no token": ({"token": None}, "alice/it", "no access token", "hf auth login"),
    "bad token": ({"token": "hf_wrong"}, "alice/it", "does not know this access token", "hf auth login"),
    "read-only token": ({"token": "hf_alice_read"}, "alice/it", "may not do that", "write access"),
    "read-only token, new": ({"token": "hf_alice_read"}, "alice/new", "may not do that", "write access"),
    "foreign repository": ({}, "bob/it", "may not do that", "--create-pr"),
    "foreign namespace": ({}, "bob/new", "may not do that", "write access"),
    "malformed": ({}, "https://x/y", "is not the name of a repository", "owner/name"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_line_says_what_to_do(hub: Hub, cli: Cli, lora: Path, case: str) -> None:
    hub.create("alice/it")
    hub.create("bob/it")
    options, repo, what, hint = ERRORS[case]
    result = cli("push", lora, repo, **options)  # type: ignore[arg-type] # a table of options
    error, _, advice = result.error.partition("\n")
    assert result.code in {1, 2}
    assert what in error
    assert hint in advice


def test_token_never_goes_over_the_network_in_the_clear(cli: Cli, lora: Path) -> None:
    result = cli("push", lora, "alice/it", HF_ENDPOINT="http://hub.invalid")
    assert result.code == 2
    assert "in the clear" in result.error


def test_card_is_written_and_prose_is_kept(hub: Hub, cli: Cli, prolora: Path) -> None:
    assert cli("push", prolora, "alice/new", "--license", "mit").code == 0
    text = hub.files("alice/new")["README.md"].decode()
    data = yaml.safe_load(text.split("---")[1])
    assert data == {
        "library_name": "peft",
        "base_model": "alice/base",
        "base_model_relation": "adapter",
        "license": "mit",
        "tags": ["prolora", "lora", "base_model:adapter:alice/base"],
    }
    assert "prolora-tools expand alice/new" in text
    assert "| unshared rank u | 1 |" in text
    (prolora / "README.md").write_text("---\ntags: [mine]\nlicense: apache-2.0\n---\n\n# Mine\n\nProse.\n")
    assert cli("push", prolora, "alice/old").code == 0
    text = hub.files("alice/old")["README.md"].decode()
    data = yaml.safe_load(text.split("---")[1])
    assert text.endswith("---\n\n# Mine\n\nProse.\n")
    assert (data["license"], data["tags"][:2], data["base_model"]) == ("apache-2.0", ["mine", "prolora"], "alice/base")
    assert (prolora / "README.md").read_text().startswith("---\ntags: [mine]")


def test_the_hubs_own_card_is_kept(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", {"README.md": b"---\nlicense: mit\n---\nHand-written.\n"})
    assert cli("push", lora, "alice/it").code == 0
    text = hub.files("alice/it")["README.md"].decode()
    assert text.endswith("---\nHand-written.\n")
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"


def test_no_local_path_is_a_base_model(hub: Hub, cli: Cli, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora", base="/home/me/llama")
    (folder / "README.md").write_text(
        "---\nbase_model: /home/me/llama\ntags:\n- base_model:adapter:/home/me/llama\n- x\n---\nHi\n"
    )
    result = cli("push", folder, "alice/it")
    assert result.code == 0
    assert "names no base model" in result.err
    data = yaml.safe_load(hub.files("alice/it")["README.md"].decode().split("---")[1])
    assert data == {"tags": ["x", "lora"], "library_name": "peft"}
