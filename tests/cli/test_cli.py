"""The command line as users and scripts meet it: streams, JSON, exit codes, dry runs, reproducible bytes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prolora_tools import __version__
from prolora_tools.cli import cli, run
from tests.support import model

LLAMA, BASE = str(model("llama-tiny-py-r8")), str(model("llama-tiny-en"))
SHAPE = ["--unshared", "2", "--chunks", "4"]


@pytest.fixture
def out(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(list(arguments))
    streams = capsys.readouterr()
    return code, streams.out, streams.err


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    found, stdout, _ = call(capsys, *arguments, "--json")
    assert found == code
    parsed: dict[str, Any] = json.loads(stdout)
    assert parsed["schema_version"] == 1
    return parsed


MODULE_FIELDS = {"name", "in_features", "out_features", "rank", "unshared", "chunks_a", "chunks_b", "parameters"}


def test_stats_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = json_of(capsys, "stats", LLAMA, "--base", BASE)
    assert report["parameters"] == 224_256
    assert report["bytes"] == 4 * 224_256
    assert len(report["modules"]) == 42
    assert all(set(m) >= MODULE_FIELDS for m in report["modules"])
    assert report["base_share"] == pytest.approx(224_256 / 5_475_584)


def test_plan_json(capsys: pytest.CaptureFixture[str]) -> None:
    report = json_of(capsys, "plan", BASE, "--rank", "8", "--unshared", "1", "--chunks", "7")
    assert report["parameters"] == sum(m["parameters"] for m in report["modules"])
    assert all(set(m) >= MODULE_FIELDS for m in report["modules"])
    budget = json_of(capsys, "plan", BASE, "--budget", "56k")
    assert budget["candidates"]
    for candidate in budget["candidates"]:
        assert candidate["parameters"] <= 56_000
        assert candidate["bytes"] == 4 * candidate["parameters"]
        assert candidate["parameters"] == sum(m["parameters"] for m in candidate["modules"])
    like = json_of(capsys, "plan", BASE, "--like-lora-rank", "2", "--targets", "q_proj,v_proj")
    assert like["budget"] == 2 * 6 * (512 + 384)
    assert {m["name"].rpartition(".")[2] for m in like["candidates"][0]["modules"]} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}, (19_988_480, 4_999_520)),
        ({"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}, (31_293_440, 7_825_240)),
        (
            {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_key_value_heads": 8},
            (103_546_880, 25_891_120),
        ),
    ],
    ids=["7B", "13B", "70B"],
)
def test_plan_of_the_llama_2_family(
    config: dict[str, int], expected: tuple[int, int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A folder with nothing but config.json; METHOD.md's figures, GQA counted."""
    heads = {"num_attention_heads": 64 if config["hidden_size"] == 8192 else config["hidden_size"] // 128}
    full = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000} | heads | config
    (tmp_path / "config.json").write_text(json.dumps(full))
    lora = json_of(capsys, "plan", str(tmp_path), "--rank", "8", "--unshared", "8")
    paper = json_of(capsys, "plan", str(tmp_path), "--rank", "8", "--unshared", "1", "--chunks", "7")
    assert (lora["parameters"], paper["parameters"]) == expected


def test_compress_json_and_exit_3(capsys: pytest.CaptureFixture[str], out: str) -> None:
    report = json_of(capsys, "compress", LLAMA, "-o", out, *SHAPE, "--method", "align", "--max-error", "0.1", code=3)
    assert Path(out).is_dir(), "done, but outside the tolerance asked for"
    assert 0.1 < report["relative_error"] < 1
    assert 0 < report["svd_relative_error"] < report["relative_error"]
    assert all(set(m) >= MODULE_FIELDS | {"relative_error", "svd_relative_error"} for m in report["modules"])
    code, _, _ = call(capsys, "compress", LLAMA, "-o", out, *SHAPE, "--max-error", "0.9", "--overwrite")
    assert code == 0


def test_diff_exit_3(capsys: pytest.CaptureFixture[str], out: str) -> None:
    call(capsys, "compress", LLAMA, "-o", out, *SHAPE)
    assert json_of(capsys, "diff", LLAMA, out, "--max-error", "0.01", code=3)["relative_error"] > 0.01
    assert json_of(capsys, "diff", LLAMA, LLAMA, "--max-error", "0")["relative_error"] == 0


def test_verify_finds_one_wrong_number(capsys: pytest.CaptureFixture[str], out: str) -> None:
    call(capsys, "merge", LLAMA, "--base", BASE, "-o", out)
    assert json_of(capsys, "verify", out, "--base", BASE, "--adapter", LLAMA)["problems"] == []
    shard = Path(out) / "model-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x40
    shard.write_bytes(data)
    report = json_of(capsys, "verify", out, "--base", BASE, "--adapter", LLAMA, code=3)
    assert len(report["problems"]) == 1
    code, stdout, _ = call(capsys, "verify", out, "--base", BASE, "--adapter", LLAMA)
    assert code == 3
    assert "NOT base + adapter" in stdout


def test_verify_allows_an_ulp_in_merged_tensors_only(capsys: pytest.CaptureFixture[str], out: str) -> None:
    call(capsys, "merge", LLAMA, "--base", BASE, "-o", out)
    shard = Path(out) / "model-00001-of-00002.safetensors"
    original = shard.read_bytes()
    header = json.loads(original[8 : 8 + int.from_bytes(original[:8], "little")])
    start = 8 + int.from_bytes(original[:8], "little")
    for name, code in (("model.layers.0.mlp.down_proj.weight", 0), ("model.layers.0.input_layernorm.weight", 3)):
        data = bytearray(original)
        data[start + header[name]["data_offsets"][0]] ^= 1
        shard.write_bytes(data)
        report = json_of(capsys, "verify", out, "--base", BASE, "--adapter", LLAMA, code=code)
        if code == 0:
            assert report["max_ulps"] == 1
            assert report["exact_tensors"] == report["merged_tensors"] - 1


@pytest.mark.parametrize("command", ["compress", "expand", "merge"])
def test_dry_run_reports_the_same_and_writes_nothing(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = {"compress": [*SHAPE, "--strides", "official"], "expand": [], "merge": ["--base", BASE]}[command]
    out = str(tmp_path / "out")
    dry = json_of(capsys, command, LLAMA, "-o", out, *options, "--dry-run")
    assert list(tmp_path.iterdir()) == []
    real = json_of(capsys, command, LLAMA, "-o", out, *options)
    assert dry.pop("output") is None
    assert real.pop("output") == out
    for key in ("relative_error", "svd_relative_error", "bytes_free"):  # only the weights, or the clock, tell these
        dry.pop(key, None)
        real.pop(key, None)
    for key in ("modules",) if command == "compress" else ():
        kept = [
            {k: v for k, v in m.items() if k not in {"method", "relative_error", "svd_relative_error"}}
            for m in real[key]
        ]
        assert [{k: v for k, v in m.items() if k in kept[0]} for m in dry.pop(key)] == kept
        real.pop(key)
    assert dry == real


def test_a_dry_run_tells_that_strides_may_change(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for strides, told in (([], True), (["--strides", "official"], False), (["--method", "average"], False)):
        report = json_of(capsys, "compress", LLAMA, "-o", str(tmp_path / "out"), *SHAPE, *strides, "--dry-run")
        assert any("strides" in note for note in report["notes"]) == told


def test_results_go_to_stdout_and_notes_to_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import shutil

    both = tmp_path / "both"
    shutil.copytree(LLAMA, both)
    (both / "adapter_model.bin").write_bytes(b"not read")
    code, stdout, stderr = call(capsys, "stats", str(both))
    assert code == 0
    assert "224,256" in stdout
    assert "adapter_model.bin is there too and was not read" in stderr
    assert call(capsys, "stats", str(both), "--quiet")[2] == ""
    assert json.loads(call(capsys, "stats", str(both), "--json", "--quiet")[1])["notes"]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "--version") == (0, f"prolora-tools, version {__version__}\n", "")
    code, stdout, _ = call(capsys, "--help")
    assert code == 0
    import click

    for name in cli.list_commands(click.Context(cli)):
        assert name in stdout
        assert call(capsys, name, "--help")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["stats"],
        ["stats", LLAMA, "--nonsense"],
        ["compress", LLAMA, "-o", "x", "--unshared", "2", "--chunks", "4;2"],
        ["compress", LLAMA, "-o", "x", "--unshared", "9", "--chunks", "4"],
        ["compress", LLAMA, "-o", "x", "--unshared", "-1", "--chunks", "4"],
        ["plan", BASE],
        ["plan", BASE, "--rank", "8", "--budget", "5M"],
        ["plan", BASE, "--budget", "5Q"],
        ["merge", LLAMA, "--base", BASE, "-o", "x", "--max-shard-size", "many"],
    ],
)
def test_wrong_usage_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = call(capsys, *arguments)
    assert code == 2
    assert stderr.strip()
    assert not stdout
    assert list(tmp_path.iterdir()) == []


def test_a_bug_of_ours_exits_with_70(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("prolora_tools.operations.stats.stats", broken)
    code, stdout, stderr = call(capsys, "stats", LLAMA)
    assert (code, stdout) == (70, "")
    assert "ZeroDivisionError: oops" in stderr
    assert "PROLORA_TOOLS_DEBUG=1" in stderr
    assert "Traceback" not in stderr
    monkeypatch.setenv("PROLORA_TOOLS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run(["stats", LLAMA])


def test_a_reader_that_has_gone_is_no_bug(tmp_path: Path) -> None:
    command = f"{sys.executable} -m prolora_tools stats {LLAMA} --by module --json | head -c 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.stderr == ""


def test_no_color_and_no_control_codes_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b" not in call(capsys, "stats", LLAMA)[1]


@pytest.mark.parametrize("command", ["compress", "expand", "merge"])
def test_the_same_command_writes_the_same_bytes(command: str, tmp_path: Path) -> None:
    options = {"compress": SHAPE, "expand": ["--uniform"], "merge": ["--base", BASE, "--max-shard-size", "4MB"]}[
        command
    ]
    folders = []
    for seed in ("0", "1"):
        out = tmp_path / seed
        arguments = [sys.executable, "-m", "prolora_tools", command, LLAMA, "-o", str(out), *options]
        subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=subprocess.DEVNULL)
        folders.append({p.name: p.read_bytes() for p in sorted(out.iterdir())})
    assert folders[0] == folders[1]


def test_files_are_readable_for_servers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The safetensors library writes mode 0600, with which a server under another user finds no adapter."""
    mask = os.umask(0o022)
    try:
        for command, options in (("expand", []), ("merge", ["--base", BASE])):
            call(capsys, command, LLAMA, "-o", str(tmp_path / command), *options)
    finally:
        os.umask(mask)
    for folder in (tmp_path / "expand", tmp_path / "merge"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o755
        assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o644}


def test_max_shard_size_splits_and_the_index_is_true(capsys: pytest.CaptureFixture[str], out: str) -> None:
    report = json_of(capsys, "merge", LLAMA, "--base", BASE, "-o", out, "--max-shard-size", "4MB", "--dtype", "float16")
    assert len(report["shards"]) == 3
    index = json.loads((Path(out) / "model.safetensors.index.json").read_text())
    from safetensors import safe_open

    total, where = 0, {}
    for shard in report["shards"]:
        with safe_open(Path(out) / shard["name"], "pt") as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor = file.get_tensor(key)
                assert str(tensor.dtype) == "torch.float16"
                total += tensor.numel() * tensor.element_size()
                where[key] = shard["name"]
    assert index["weight_map"] == where
    assert index["metadata"]["total_size"] == total
    assert json.loads((Path(out) / "config.json").read_text())["dtype"] == "float16"
    assert json_of(capsys, "verify", out, "--base", BASE, "--adapter", LLAMA)["problems"] == []


def test_the_adapters_own_tokenizer_wins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import shutil

    adapter = tmp_path / "adapter"
    shutil.copytree(LLAMA, adapter)
    (adapter / "tokenizer.json").write_text('{"own": true}')
    (adapter / "chat_template.jinja").write_text("hello")
    call(capsys, "merge", str(adapter), "--base", BASE, "-o", str(tmp_path / "m"))
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert (tmp_path / "m/tokenizer.json").read_text() == '{"own": true}'
    assert "chat_template.jinja" in names
    assert "tokenizer_config.json" not in names, "a tokenizer is taken whole, from one folder"
    assert "generation_config.json" in names
    assert "adapter_config.json" not in names
