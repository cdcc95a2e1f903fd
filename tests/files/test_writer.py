"""The staged folder: what is seen of it and when. Its failures are in tests/cli/test_errors_environment.py."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from prolora_tools.errors import InputError, OutputError
from prolora_tools.files.writer import STAGE, check_target, copy_file, staged, write_file, write_safetensors
from tests.failing import build

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_out_appears_whole_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    with staged(out, [], overwrite=False) as stage:
        assert not out.exists()
        assert stage.parent == tmp_path  # one file system: the last step is a rename
        assert stage.name.startswith(".")
        assert STAGE in stage.name
        write_file(stage / "config.json", b"{}")
    assert build.files_in(tmp_path) == {"OUT/config.json": b"{}"}


def test_old_out_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    build.write(out, {"config.json": b"old", "old": b"old"})
    with staged(out, [], overwrite=True) as stage:
        write_file(stage / "config.json", b"new")
        assert build.files_in(out) == {"config.json": b"old", "old": b"old"}
    assert build.files_in(tmp_path) == {"OUT/config.json": b"new"}


def test_stages_of_earlier_crashes_go(tmp_path: Path) -> None:
    """Of any process id: a stage without a lock has no process. Live ones are in tests/operations/test_merge_safety."""
    build.write(tmp_path, {f".OUT{STAGE}-{os.getpid()}/half": b"half", f".OUT{STAGE}-1/half": b"half"})
    with staged(tmp_path / "OUT", [], overwrite=False) as stage:
        assert list(stage.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["OUT"]


def test_files_are_readable_by_servers(umask: int, tmp_path: Path) -> None:
    """The library's own writer gives 0600, whatever the umask."""
    build.write(tmp_path, {"source": b"x"})
    (tmp_path / "source").chmod(0o600)
    write_safetensors(tmp_path / "a.safetensors", [("a", "U8", (2,))], lambda _: b"ab")
    write_file(tmp_path / "a.json", b"{}")
    copy_file(tmp_path / "source", tmp_path / "copied")
    for name in ("a.safetensors", "a.json", "copied"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    assert (tmp_path / "copied").read_bytes() == b"x"


def test_files_are_never_written_over(tmp_path: Path) -> None:
    build.write(tmp_path, {"a": b"old", "source": b"new"})
    for write in (
        lambda: write_file(tmp_path / "a", b"new"),
        lambda: copy_file(tmp_path / "source", tmp_path / "a"),
        lambda: write_safetensors(tmp_path / "a", [], lambda _: b""),
    ):
        with pytest.raises(FileExistsError):
            write()
    assert (tmp_path / "a").read_bytes() == b"old"


def test_copy_blames_the_source_for_what_is_its_fault(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        copy_file(tmp_path / "nowhere", tmp_path / "copied")
    assert caught.value.code == "file-missing"
    assert not (tmp_path / "copied").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_targets(overwrite: bool, tmp_path: Path) -> None:
    build.write(tmp_path, {"in/config.json": b"{}", "model/config.json": b"{}", "mine/thesis.txt": b"x", "file": b"x"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "broken").symlink_to("nowhere")
    (tmp_path / "to-input").symlink_to("in")
    expected = {
        "new": None,
        "new/er": None,
        "empty": None,
        "in-and-more": None,  # a name that begins like an input's
        "model": None if overwrite else "output-exists",
        "mine": "output-not-model" if overwrite else "output-exists",
        "file": "output-not-folder",
        "link": "output-not-folder",
        "broken": "output-not-folder",
        "in": "output-overlaps-input",
        "in/deep/er": "output-overlaps-input",
        "new/../in": "output-overlaps-input",
        "to-input": "output-overlaps-input",
        "to-input/new": "output-overlaps-input",
        ".": "output-overlaps-input",
    }
    for name, code in expected.items():
        try:
            check_target(tmp_path / name, [tmp_path / "in"], overwrite=overwrite)
            found = None
        except OutputError as error:
            found = error.code
        assert found == code, name
