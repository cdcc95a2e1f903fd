"""The layering rules of docs/architecture.md, held."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import prolora_tools
from tests.support import model

PACKAGE = Path(prolora_tools.__file__).parent

# What each layer may import of ours; a layer may always import itself.
ALLOWED = {
    "core": {"errors"},
    "files": {"core", "errors", "progress"},
    "operations": {"core", "files", "errors", "progress", "reports"},
    "hub": {"core", "files", "operations", "errors", "progress", "reports"},
    "peft": {"core", "errors"},
    "cli": {"core", "files", "operations", "hub", "peft", "errors", "progress", "reports", "cli"},
}


def imports(path: Path) -> set[str]:
    """Full names of all modules a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """First part of every import of ours: core, files, errors, ..."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("prolora_tools.")}
    return names - {"__version__"}


@pytest.mark.parametrize("layer", sorted(ALLOWED))
def test_imports_go_downward_only(layer: str) -> None:
    files = list((PACKAGE / layer).glob("*.py"))
    assert files, "a layer that is not there holds no rule"
    for path in files:
        assert ours(path) <= ALLOWED[layer] | {layer}, path


def test_every_file_belongs_to_a_layer() -> None:
    top = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert top == set(ALLOWED)
    for name in ("errors", "progress", "reports"):
        assert not ours(PACKAGE / f"{name}.py")


def test_click_and_rich_live_in_cli_only() -> None:
    for path in PACKAGE.rglob("*.py"):
        console = {name.split(".")[0] for name in imports(path)} & {"click", "rich"}
        assert not console or path.parent.name == "cli", path


def test_nothing_prints_below_cli() -> None:
    for path in PACKAGE.rglob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not prints or path.parent.name == "cli", path


def loaded_by(*arguments: str) -> set[str]:
    """Top-level packages in sys.modules after a command has run in a process of its own."""
    code = (
        "import sys\nfrom prolora_tools.cli import run\n"
        f"code = run({list(arguments)!r})\nassert code == 0, code\n"
        "sys.stderr.write('\\n' + ' '.join(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stderr.splitlines()[-1].split())


HEAVY = {"torch", "transformers", "peft", "huggingface_hub"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["stats", "--help"],
        ["stats", str(model("llama-tiny-py-r8")), "--base", str(model("llama-tiny-en"))],
    ],
    ids=["help", "version", "stats-help", "stats"],
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    assert not loaded_by(*arguments) & HEAVY


def test_the_test_above_can_fail() -> None:
    assert {"torch", "transformers"} <= loaded_by("plan", str(model("llama-tiny-en")), "--rank", "2")


def test_compressing_and_merging_need_no_torch(tmp_path: Path) -> None:
    adapter, out = str(model("llama-tiny-py-r8")), str(tmp_path / "c")
    assert "torch" not in loaded_by("compress", adapter, "-o", out, "--unshared", "2", "--chunks", "4")
    assert "torch" not in loaded_by("expand", out, "-o", str(tmp_path / "e"))
    assert "torch" not in loaded_by("merge", out, "--base", str(model("llama-tiny-en")), "-o", str(tmp_path / "m"))


def test_importing_the_package_loads_none_of_it() -> None:
    code = (
        "import sys, prolora_tools; print(sorted(m for m in sys.modules if m.startswith(('prolora_tools', 'numpy'))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['prolora_tools']"


def test_public_names_are_sorted_and_resolve() -> None:
    assert prolora_tools.__all__ == sorted(prolora_tools.__all__)
    for name in prolora_tools.__all__:
        assert getattr(prolora_tools, name) is not None
        assert name in dir(prolora_tools)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        prolora_tools.nonsense  # noqa: B018 - the access is the test
