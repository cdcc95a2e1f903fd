"""Hub names as inputs of every command: snapshots in the cache, and headers by range requests."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import pytest

from .conftest import BASE, Cli, contents, leftovers, write_lora, write_model
from .server import Hub

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .repos import Entry


@pytest.fixture
def both(hub: Hub, lora: Path, model: Path) -> dict[str, str]:
    """An adapter and its base on the Hub, and their commits."""
    files = {"alice/lora": contents(lora), BASE: contents(model)}
    return {name: hub.create(name, data).commit("main").oid for name, data in files.items()}


def test_every_command_takes_hub_names(cli: Cli, both: dict[str, str], lora: Path, model: Path) -> None:
    """Each twice: from the Hub and from local folders, with the same result."""
    commands = {
        "stats": ["{lora}", "--base", "{base}"],
        "compress": ["{lora}", "--unshared", "1", "--chunks", "2", "-o", "{out}"],
        "expand": ["{lora}", "-o", "{out}", "--uniform"],
        "merge": ["{lora}", "--base", "{base}", "-o", "{out}"],
        "diff": ["{lora}", "{lora}"],
    }
    for command, template in commands.items():
        reports = []
        for where, names in {
            "hub": {"lora": "alice/lora", "base": BASE},
            "local": {"lora": str(lora), "base": str(model)},
        }.items():
            out = f"{command}-{where}"
            result = cli(command, *(a.format(**names, out=out) for a in template), "--json")
            assert result.code == 0, result.err
            if where == "hub":
                assert f"alice/lora@{both['alice/lora']}" in result.out
            reports.append(json.loads(result.out))
            if (cli.folder / out).exists():
                assert (cli.folder / out / "README.md").is_file()
        varying = ("subject", "source", "adapter", "base", "output", "a", "b", "bytes_free", "notes")
        kept = [{k: v for k, v in r.items() if k not in varying} for r in reports]
        assert kept[0] == kept[1]
    for out in ("compress", "expand", "merge"):
        there, here = (contents(cli.folder / f"{out}-{where}") for where in ("hub", "local"))
        card = there.pop("README.md").decode()
        assert f"from alice/lora at commit {both['alice/lora']}" in card
        assert f"base_model: {BASE}" in card
        here.pop("README.md")
        assert there == here
    verified = cli("verify", "merge-hub", "--base", f"hf://{BASE}", "--adapter", "alice/lora")
    assert verified.code == 0, verified.err


def test_a_local_folder_wins_unless_the_scheme_is_given(hub: Hub, cli: Cli, both: dict[str, str]) -> None:
    write_lora(cli.folder / "alice" / "lora", seed=5, width=32)
    here = json.loads(cli("stats", "alice/lora", "--json").out)
    assert here["subject"] == "alice/lora"
    assert not hub.requests
    there = json.loads(cli("stats", "hf://alice/lora", "--json").out)
    assert there["subject"] == f"alice/lora@{both['alice/lora']}"
    assert there["parameters"] == 2 * here["parameters"]


def test_revisions(hub: Hub, cli: Cli, both: dict[str, str], tmp_path: Path) -> None:
    hub.commit("alice/lora", contents(write_lora(tmp_path / "new", width=32)))
    first = both["alice/lora"]
    old = [json.loads(cli("stats", f"alice/lora@{r}", "--json").out) for r in (first, first[:7])]
    assert [r["subject"] for r in old] == [f"alice/lora@{first}"] * 2
    assert json.loads(cli("stats", "alice/lora", "--json").out)["parameters"] * 2 == old[0]["parameters"]


def test_offline_uses_the_cache(hub: Hub, cli: Cli, both: dict[str, str]) -> None:
    never = cli("expand", "alice/lora", "-o", "x", HF_HUB_OFFLINE="1")
    assert never.code == 1
    assert "HF_HUB_OFFLINE" in never.error
    assert cli("expand", "alice/lora", "-o", "online").code == 0
    count = len(hub.requests)
    assert cli("expand", "alice/lora", "-o", "offline", HF_HUB_OFFLINE="1").code == 0
    result = cli("stats", f"alice/lora@{both['alice/lora']}", "--json", HF_HUB_OFFLINE="1")
    assert json.loads(result.out)["subject"] == f"alice/lora@{both['alice/lora']}"
    assert contents(cli.folder / "offline") == contents(cli.folder / "online")
    assert len(hub.requests) == count


@pytest.mark.usefixtures("both")
def test_the_cache_is_used_and_checked(hub: Hub, cli: Cli) -> None:
    hub.fault("GET /objects/", "flip")
    result = cli("expand", "alice/lora", "-o", "out")
    assert result.code == 1
    assert "other bytes" in result.error
    assert leftovers(cli.folder) == []
    assert cli("expand", "alice/lora", "-o", "out").code == 0
    assert len(hub.seen("GET /objects/")) == 2
    assert cli("expand", "alice/lora", "-o", "again").code == 0
    assert len(hub.seen("GET /objects/")) == 2


def header_of(tensors: Mapping[str, tuple[int, ...]]) -> tuple[bytes, int]:
    """The header of a bfloat16 file, and the file's size."""
    at, entries = 0, {}
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(entries).encode()
    return len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + at


def seven_billion(hub: Hub) -> int:
    """LLaMA2-7B's weights by shape, as 3 sparse shards. Returns its parameters."""
    layer = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
             "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096),
             "mlp.down_proj": (4096, 11008), "input_layernorm": (4096,),
             "post_attention_layernorm": (4096,)}  # fmt: skip
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096)}
    tensors["model.norm.weight"] = (4096,)
    tensors |= {f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in layer.items()}
    repo = hub.create("meta/llama")
    files: dict[str, Entry] = dict(repo.commit("main").files)
    weight_map: dict[str, str] = {}
    for i in range(3):
        name = f"model-{i + 1:05d}-of-00003.safetensors"
        part = {n: s for j, (n, s) in enumerate(tensors.items()) if j * 3 // len(tensors) == i}
        files[name] = hub.objects.add_sparse(*header_of(part))
        weight_map |= dict.fromkeys(part, name)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096,
              "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
              "tie_word_embeddings": False}  # fmt: skip
    files["config.json"] = hub.objects.add("config.json", json.dumps(config).encode())
    index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    files["model.safetensors.index.json"] = hub.objects.add("model.safetensors.index.json", index)
    repo.add_commit("refs/heads/main", files, "weights", "", "meta")
    return sum(math.prod(s) for s in tensors.values())


def test_headers_of_a_7b_model_cost_little(hub: Hub, cli: Cli, lora: Path) -> None:
    parameters = seven_billion(hub)
    assert parameters == 6_738_415_616
    report = json.loads(cli("stats", lora, "--base", "meta/llama", "--json").out)
    assert report["base_parameters"] == parameters
    assert sum(r.sent for r in hub.requests) < 200_000
    assert len(hub.seen("GET /objects/")) <= 2 * 3
    hub.requests.clear()
    plan = ("plan", "meta/llama", "--rank", "8", "--unshared", "1", "--chunks", "7", "--json")
    report = json.loads(cli(*plan).out)
    assert report["parameters"] == 4_999_520
    assert report["subject"] == f"meta/llama@{hub.repos['meta/llama'].commit('main').oid}"
    assert not hub.seen("GET /objects/")


def test_a_long_header_is_read_to_its_end(hub: Hub, cli: Cli, lora: Path) -> None:
    repo = hub.create("alice/wide", contents(write_model(lora.parent / "wide", shards=1)))
    tensors = {f"model.layers.{i}.some.rather.long.name.weight": (8, 8) for i in range(2000)}
    head, size = header_of(tensors)
    assert len(head) > 100_000
    name = "model-00001-of-00001.safetensors"
    repo.commit("main").files[name] = hub.objects.add_sparse(head, size)
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}).encode()
    repo.commit("main").files["model.safetensors.index.json"] = hub.objects.add("index.json", index)
    result = cli("stats", lora, "--base", "alice/wide", "--json")
    assert json.loads(result.out)["base_parameters"] == 2000 * 64
    assert [r.sent for r in hub.seen("GET /objects/")] == [32 << 10, len(head) - (32 << 10)]


def test_dry_runs_read_headers_only(hub: Hub, cli: Cli, both: dict[str, str]) -> None:
    result = cli("merge", "alice/lora", "--base", BASE, "-o", "out", "--dry-run", "--json")
    report = json.loads(result.out)
    assert report["adapter"] == f"alice/lora@{both['alice/lora']}"
    assert leftovers(cli.folder) == []
    ranges = hub.seen("GET /objects/")
    assert {r.status for r in ranges} == {206}
    assert cli("merge", "alice/lora", "--base", BASE, "-o", "out", "--json").code == 0
    real = json.loads(cli("merge", "alice/lora", "--base", BASE, "-o", "out", "--json", "--overwrite").out)
    varying = ("output", "bytes_free", "notes")
    assert {k: v for k, v in real.items() if k not in varying} == {k: v for k, v in report.items() if k not in varying}


def test_header_bomb_in_a_remote_file(hub: Hub, cli: Cli, lora: Path) -> None:
    bomb = (30_000_000).to_bytes(8, "little") + b"{" + b" " * 40_000_000
    hub.create("alice/it", contents(lora) | {"adapter_model.safetensors": bomb})
    result = cli("stats", "alice/it")
    assert "at most 25,000,000" in result.error
    assert sum(r.sent for r in hub.requests) < 100_000


@pytest.mark.usefixtures("both")
def test_a_server_without_ranges(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends the whole file; what is needed is taken."""
    from . import server

    whole = server._file

    def ignoring(handler: server._Handler, path: Path, headers: dict[str, str]) -> server.Reply:
        del handler.headers["Range"]
        return whole(handler, path, headers)

    monkeypatch.setattr(server, "_file", ignoring)
    assert json.loads(cli("stats", "alice/lora", "--json").out)["parameters"] == 2 * 2 * 4 * 64


def test_errors_name_the_repository(hub: Hub, cli: Cli, lora: Path) -> None:
    files = contents(lora)
    hub.create("alice/it", files | {"adapter_config.json": b'{"peft_type": "IA3"}'})
    result = cli("stats", "alice/it")
    assert (
        f"alice/it@{hub.repos['alice/it'].commit('main').oid}/adapter_config.json: peft_type is 'IA3'" in result.error
    )
    assert "a folder no/where does not exist here" in cli("stats", "no/where").error
    assert "is not the name of a repository" in cli("stats", "hf://x").error


def test_files_that_are_in_xet_storage(tmp_path: Path, lora: Path) -> None:
    """Mode C: the client downloads into its cache over Xet; pull takes the same bytes over HTTP."""
    (tmp_path / "work").mkdir()
    with Hub(tmp_path / "hub", xet_downloads=True) as hub:
        cli = Cli(hub, tmp_path / "work")
        assert cli("push", lora, "alice/lora").code == 0
        assert cli("expand", "alice/lora", "-o", "over-xet").code == 0
        assert hub.seen("xet-read-token")
        assert not hub.seen("GET /objects/")
        assert cli("pull", "alice/lora", "-o", "over-http").code == 0
        assert hub.seen("GET /objects/")
        weights = (lora / "adapter_model.safetensors").read_bytes()
        assert contents(cli.folder / "over-http")["adapter_model.safetensors"] == weights
        assert cli("expand", lora, "-o", "local").code == 0
        made = [contents(cli.folder / name)["adapter_model.safetensors"] for name in ("over-xet", "local")]
        assert made[0] == made[1]
