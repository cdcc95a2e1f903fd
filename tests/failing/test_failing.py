"""Every error message has an input that makes it, and every such input fails in the same orderly way."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import prolora_tools
from tests.cli import test_errors_environment as environment
from tests.failing import build

CASES = build.cases()
PACKAGE = Path(prolora_tools.__file__).parent
EXEMPT = {"hub", "peft"}
"""Packages whose errors have tests of their own: they need a server or a model."""

ERRORS = {"ProloraError", "RequestError", "InputError", "UnsupportedError", "MismatchError", "OutputError"}


pytestmark = pytest.mark.usefixtures("plain_terminal")


def same_text(expected: str, found: str) -> bool:
    """Equal, `...` standing for anything in one line."""
    pattern = ".*".join(re.escape(part) for part in expected.split("..."))
    return re.fullmatch(pattern, found) is not None


@pytest.mark.parametrize("name", CASES)
def test_input_fails_with_its_message_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    build.write(tmp_path, case.files)
    before = build.files_in(tmp_path)
    code, out, err = build.run(case, tmp_path)
    assert build.files_in(tmp_path) == before, "OUT, a stage or a changed input was left behind"
    assert out == ""
    lines = err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["Error", "Hint"], err
    assert all(line.partition(": ")[2].strip() for line in lines)
    assert code == case.exit
    assert same_text((build.HERE / name / "stderr").read_text(), err), err


@pytest.mark.parametrize("name", CASES)
def test_committed_files_are_those_that_build_makes(name: str) -> None:
    found = build.files_in(build.HERE / name)
    assert found.pop("stderr", b"").endswith(b"\n")
    assert found == CASES[name].all_files()


def test_no_folder_is_without_a_case() -> None:
    folders = {path.name for path in build.HERE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(CASES)


def raise_sites() -> Counter[str]:
    """Every slug that an error is made with, counted; a site that chooses between two counts for both."""
    found: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        if EXEMPT & set(path.relative_to(PACKAGE).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", None) not in ERRORS:
                continue
            first = node.args[0]
            slugs = [first.body, first.orelse] if isinstance(first, ast.IfExp) else [first]
            for slug in slugs:
                assert isinstance(slug, ast.Constant), f"{path.name}:{node.lineno}: the slug is no literal"
                assert isinstance(slug.value, str)
                found[slug.value] += 1
    return found


def test_every_slug_has_one_raise_site_and_a_case() -> None:
    sites = raise_sites()
    assert len(sites) > 50  # the walk sees the package
    assert {slug for slug, count in sites.items() if count > 1} == set()
    covered = {case.slug for case in CASES.values()} | set(environment.ENVIRONMENT)
    assert covered == set(sites)


def test_environment_names_real_tests() -> None:
    for names in environment.ENVIRONMENT.values():
        for name in names.split():
            assert callable(getattr(environment, name))


def test_evil_pickle_is_one(tmp_path: Path) -> None:
    """Without weights_only the file does run code, so that the cases above show something."""
    (tmp_path / "evil.bin").write_bytes(build.evil_bin())
    load = "import torch; torch.load('evil.bin', weights_only=False)"
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, check=False, capture_output=True)
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "name",
    [
        "base-config-unknown--no-heads",
        "merge-no-such-module",
        "bin-unreadable--code",
        "factor-overflow--compress",
        "compress-range",
    ],
)
def test_other_libraries_add_nothing_to_stderr(name: str, tmp_path: Path) -> None:
    """In a process of its own, where warnings and logs of numpy, torch and transformers go to stderr."""
    case = CASES[name]
    build.write(tmp_path, case.files)
    command = [sys.executable, "-m", "prolora_tools", *case.command.split()]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == case.exit
    assert done.stdout == ""
    assert same_text((build.HERE / name / "stderr").read_text(), build.shown(case, tmp_path, done.stderr)), done.stderr
