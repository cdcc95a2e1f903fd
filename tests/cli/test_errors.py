"""How an error is shown: one line each for message and hint, whatever the names in a file are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from prolora_tools.cli import run
from tests.failing import build

if TYPE_CHECKING:
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.mark.parametrize(
    "name", ["q\nError: all is well", "q\x1b[2J", "q\u202eq", "q\r", "[bold]q[/bold]", ":smile:", "ünï"]
)
def test_names_cannot_forge_lines_or_drive_the_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    half = {f"{name}.lora_A.weight": build.numbers(2, 4)}
    build.write(tmp_path, build.adapter({"target_modules": [name]}, half))
    assert run(["stats", "adapter"]) == 1
    err = capsys.readouterr().err
    assert [line.partition(": ")[0] for line in err.splitlines()] == ["Error", "Hint"]
    assert all(c.isprintable() or c == "\n" for c in err)
    if name.isprintable():
        assert f"{name} has A" in err


def test_long_messages_are_not_wrapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A path that is broken into lines cannot be copied."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "40")
    path = "/".join(["deep"] * 40)
    assert run(["stats", path]) == 1
    assert capsys.readouterr().err == f"Error: {path} does not exist\nHint: check the path\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--budget", "9" * 400 + "M"], 2),
        (["--budget", "0.1k"], 0),
        (["--budget", "5 M"], 0),
        (["--budget", "1e400"], 2),
        (["--budget", "-5"], 2),
        (["--budget", "5X"], 2),
        (["--rank", "1" * 5000], 2),
        (["--rank", "2", "--chunks", "1" * 5000], 2),
        (["--rank", "2", "--chunks", "2,"], 2),
    ],
)
def test_numbers_of_any_size(
    arguments: list[str], expected: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build.write(tmp_path, {"base/config.json": build.text(build.LLAMA)})
    assert run(["plan", str(tmp_path / "base"), *arguments]) == expected
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert ("Error: " in err) == (expected == 2)


def test_signalling_nan_makes_an_error_and_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """numpy warns of them when it converts, which would stand before the error."""
    monkeypatch.chdir(tmp_path)
    signalling = build.Tensor("F32", (4, 4), b"\x00\x00\x81\x7f" * 16)
    build.write(tmp_path, {**build.adapter(), **build.base(tensors={f"{build.Q}.weight": signalling})})
    for dtype in ("float16", "float64", "bfloat16", "float32"):
        assert run([*build.MERGE.split(), "--dtype", dtype]) == 1
        assert "would hold inf or nan after the merge" in capsys.readouterr().err
