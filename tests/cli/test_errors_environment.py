"""Failures that no input file can make: full disks, permissions, interrupts, files that change, the Python API."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import prolora_tools
from prolora_tools.cli import run
from prolora_tools.core.geometry import Geometry
from prolora_tools.errors import OutputError, ProloraError, RequestError, UnsupportedError
from prolora_tools.files.writer import staged
from tests.failing import build
from tests.support import model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ENVIRONMENT = {
    "calibrate-dora": "test_statistics_of_a_dora_adapter",
    "calibrate-memory": "test_a_device_with_too_little_memory",
    "calibrate-no-logits": "test_gradients_of_a_model_without_logits",
    "dtype-unknown": "test_names_that_click_would_refuse",
    "file-changed": "test_adapter_that_shrinks_while_it_is_read test_base_that_shrinks_while_it_is_copied",
    "file-shrunk": "test_base_that_shrinks_while_it_is_merged",
    "geometry-stride": "test_negative_stride",
    "lengthen-unknown": "test_names_that_click_would_refuse",
    "merge-no-space": "test_merge_too_large_for_the_disk test_full_disk",
    "method-unknown": "test_names_that_click_would_refuse",
    "output-disk-full": "test_full_disk test_file_size_limit test_failing_system_call",
    "output-unwritable": "test_failing_system_call test_no_permission_to_write",
    "stdout-unwritable": "test_stdout_is_full",
}
"""Slugs of errors without a folder of failing inputs, and the tests below that meet them."""

COMMANDS = {"compress": build.COMPRESS, "expand": build.EXPAND, "merge": build.MERGE}
WIDE = build.factors(dims=(64, 64))


pytestmark = pytest.mark.usefixtures("plain_terminal")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a sound adapter and its base."""
    wide = {f"{build.Q}.weight": build.numbers(64, 64), "model.norm.weight": build.numbers(64)}
    build.write(tmp_path, {**build.adapter(tensors=WIDE), **build.base(tensors=wide), "base/tokenizer.json": b"{}\n"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(command: str, code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with one error and one hint, and change no file. Returns the error."""
    before = build.files_in(Path())
    assert run(command.split()) == code
    out, err = capsys.readouterr()
    assert build.files_in(Path()) == before, "OUT, a stage or a changed input was left behind"
    assert out == ""
    lines = err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["Error", "Hint"], err
    return lines[0]


def raised(function: Callable[..., object], *arguments: object, **options: object) -> ProloraError:
    with pytest.raises(ProloraError) as caught:
        function(*arguments, **options)
    return caught.value


# --- full disks and failing system calls


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 16 kB."""
    mount = shutil.which("mount")
    with tempfile.TemporaryDirectory() as name:
        command = [mount or "mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", name]
        if mount is None or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("no tmpfs can be mounted here; test_file_size_limit shows the same")
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(name: str, folder: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.write(folder, build.adapter({"target_modules": [build.Q]}, build.factors(rank=2, dims=(4096, 64))))
    if name == "merge":
        build.write(folder, build.base(tensors={f"{build.Q}.weight": build.numbers(64, 4096)}))
    command = COMMANDS[name].replace("OUT", f"{small_disk}/OUT").replace("--chunks 2", "--chunks 1")
    message = fails(command, 1, capsys)
    assert ("free" if name == "merge" else os.strerror(errno.ENOSPC)) in message
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_file_size_limit(name: str, folder: Path) -> None:
    before = build.files_in(folder)
    done = subprocess.run(
        [sys.executable, "-m", "prolora_tools", *COMMANDS[name].split()],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)),
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: OUT cannot be written: {os.strerror(errno.EFBIG)}"), done.stderr
    assert "\nHint: free space there" in done.stderr
    assert build.files_in(folder) == before


def failing(monkeypatch: pytest.MonkeyPatch, where: str, error: int, at: int | None = None) -> list[object]:
    """Let a function of `os` fail, at its call number `at` or always. Returns the list of its calls."""
    real, seen = getattr(os, where), list[object]()

    def fail(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments)
        if at not in {None, len(seen)}:
            return real(*arguments, **options)
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, where, fail)
    return seen


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "where"),
    [(c, w) for c in ("compress", "expand") for w in ("fsync", "mkdir", "rename")]
    + [("merge", w) for w in ("pwrite", "fsync", "fdatasync", "posix_fallocate", "ftruncate", "mkdir", "rename")],
)
def test_failing_system_call(
    name: str,
    where: str,
    error: int,
    overwrite: bool,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if overwrite:
        build.write(folder, {**build.adapter(folder="OUT"), "OUT/README.md": b"the old one\n"})
    calls = failing(monkeypatch, where, error)
    message = fails(f"{COMMANDS[name]}{' --overwrite' if overwrite else ''}", 1, capsys)
    assert calls
    assert message.startswith(f"Error: OUT cannot be written: {os.strerror(error)}")


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", ["fsync", "rename", "mkdir", "open"])
def test_every_call_fails_in_turn(
    name: str, where: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever call is the first to fail, nothing is left; when none does, OUT is there."""
    before = build.files_in(folder)
    for calls in range(1, 100):
        with monkeypatch.context() as patch:
            made = failing(patch, where, errno.EIO, calls)
            code = run(COMMANDS[name].split())
        out, err = capsys.readouterr()
        if len(made) < calls:
            break
        if code == 0:  # an existing parent need not be made, and folders are synced where the file system can
            assert where != "rename"
            shutil.rmtree(folder / "OUT")
        else:
            assert (code, out) == (1, "")
            assert err.startswith("Error: ")
        assert build.files_in(folder) == before
    assert code == 0
    assert calls > 1
    assert (folder / "OUT").is_dir()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("folder")
def test_failing_write_of_a_file(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In merge this is the index, config.json or a tokenizer; a full disk is not blamed on what is read."""
    real = Path.open

    def opened(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if "x" in mode:
            return real(Path("/dev/full"), "wb", *arguments, **options)
        return real(self, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", opened)
    message = fails(COMMANDS[name], 1, capsys)
    assert message == f"Error: OUT cannot be written: {os.strerror(errno.ENOSPC)}"


def test_merge_too_large_for_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    assert "1,000 free" in fails(build.MERGE, 1, capsys)
    assert run([*build.MERGE.split(), "--dry-run"]) == 0
    assert not (folder / "OUT").exists()


def test_stdout_is_full(folder: Path) -> None:
    for options in ([], ["--json"]):
        with Path("/dev/full").open("wb") as full:
            command = [sys.executable, "-m", "prolora_tools", "stats", str(folder / "adapter"), *options]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("Error: the report cannot be written to stdout")
        assert done.stderr.count("\n") == 2


# --- permissions


@pytest.fixture
def unprivileged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory like `folder`, in which permission bits hold for us too."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        build.write(place, {**build.adapter(), **build.base(), "there/.keep": b""})
        monkeypatch.chdir(place)
        for command in COMMANDS.values():  # loads every module that is needed: none may be readable afterwards
            assert run([*command.split(), "--dry-run"]) == 0
        mine = os.geteuid()
        if mine == 0:
            for path in (place, *place.rglob("*")):
                os.chown(path, 65534, -1)
            os.seteuid(65534)
        try:
            yield place
        finally:
            if mine == 0:
                os.seteuid(0)
            for path in (place, *place.rglob("*")):
                path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "path", "mode"),
    [
        *((name, "adapter", mode) for name in COMMANDS for mode in (0o000, 0o444, 0o111)),
        *(
            (name, f"adapter/adapter_{file}", 0o000)
            for name in COMMANDS
            for file in ("config.json", "model.safetensors")
        ),
        *(("merge", path, 0o000) for path in ("base", "base/config.json", "base/model.safetensors")),
    ],
)
def test_no_permission_to_read(
    name: str, path: str, mode: int, unprivileged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    (unprivileged / path).chmod(mode)
    assert run(COMMANDS[name].split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Error: {path} cannot be read: {os.strerror(errno.EACCES)}\nHint: ")
    assert sorted(p.name for p in unprivileged.iterdir()) == ["adapter", "base", "there"]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(("mode", "dry_run"), [(0o000, False), (0o000, True), (0o555, False)])
def test_no_permission_to_write(
    name: str, dry_run: bool, mode: int, unprivileged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    (unprivileged / "there").chmod(mode)
    command = COMMANDS[name].replace("OUT", "there/OUT") + (" --dry-run" if dry_run else "")
    assert run(command.split()) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"Error: there/OUT cannot be written: {os.strerror(errno.EACCES)}")
    (unprivileged / "there").chmod(0o755)
    assert [p.name for p in (unprivileged / "there").iterdir()] == [".keep"]


# --- interrupts

SHIM = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
real = os.{where}
def slow(*arguments):
    pathlib.Path("middle").touch()
    for _ in range(round({seconds} / 0.05)):  # a signal just before one long sleep would wait for its end
        time.sleep(0.05)
    return real(*arguments)
os.{where} = slow
from prolora_tools.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("name", "where"), [("compress", "fsync"), ("expand", "fsync"), ("merge", "pwrite")])
def test_interrupt_in_the_middle(name: str, where: str, overwrite: bool, number: signal.Signals, folder: Path) -> None:
    if overwrite:
        build.write(folder, {**build.adapter(folder="OUT"), "OUT/README.md": b"the old one\n"})
    before = build.files_in(folder)
    seconds = 0.2 if name == "merge" else 60  # merge's threads end their piece, and the main thread waits for them
    command = [sys.executable, "-c", SHIM.format(where=where, seconds=seconds), *COMMANDS[name].split()]
    child = subprocess.Popen(
        [*command, *(["--overwrite"] if overwrite else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (folder / "middle").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert any(".prolora-stage" in path.name for path in folder.iterdir())
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    (folder / "middle").unlink()
    assert child.returncode == 130
    assert out == ""
    assert err.lstrip() == "Error: interrupted; no output was left behind\nHint: run the same command again\n"
    assert build.files_in(folder) == before


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("error", [errno.EIO, KeyboardInterrupt])
def test_overwrite_is_undone_between_its_renames(
    calls: int,
    error: int | type[BaseException],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build.write(folder, {**build.adapter(folder="OUT"), "OUT/README.md": b"the old one\n"})
    before = build.files_in(folder)
    real, seen = os.rename, list[object]()

    def rename(*arguments: Any) -> None:
        seen.append(arguments)
        if len(seen) == calls:
            raise OSError(error, os.strerror(error)) if isinstance(error, int) else error
        real(*arguments)

    monkeypatch.setattr(os, "rename", rename)
    assert run([*build.EXPAND.split(), "--overwrite"]) == (1 if isinstance(error, int) else 130)
    assert len(seen) == calls + (calls == 2)
    assert capsys.readouterr().err.lstrip().startswith("Error: ")
    assert build.files_in(folder) == before


# --- where OUT may stand


def test_overwrite_replaces_the_whole_folder(folder: Path) -> None:
    build.write(folder, {**build.adapter(folder="OUT"), "OUT/old": b"the old one\n"})
    assert run([*build.EXPAND.split(), "--overwrite", "--quiet"]) == 0
    assert not (folder / "OUT/old").exists()
    assert sorted(p.name for p in folder.iterdir()) == ["OUT", "adapter", "base"]


@pytest.mark.parametrize("name", COMMANDS)
def test_empty_folder_and_new_parents_are_accepted(name: str, folder: Path) -> None:
    (folder / "OUT").mkdir()
    assert run([*COMMANDS[name].split(), "--quiet"]) == 0
    assert run([*COMMANDS[name].replace("OUT", "new/er/OUT").split(), "--quiet"]) == 0
    assert build.files_in(folder / "OUT") == build.files_in(folder / "new/er/OUT")
    assert sorted(p.name for p in folder.iterdir()) == ["OUT", "adapter", "base", "new"]


def test_new_parents_go_with_the_failure(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, "fsync", errno.EIO)
    fails("expand adapter -o new/er/OUT", 1, capsys)
    assert not (folder / "new").exists()


@pytest.mark.parametrize("target", ["adapter", "adapter/..", "elsewhere", "nowhere"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_a_symlink(target: str, overwrite: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build.write(folder, build.adapter(folder="elsewhere"))
    (folder / "OUT").symlink_to(target)
    message = fails(f"{build.EXPAND}{' --overwrite' if overwrite else ''}", 1, capsys)
    assert ("contains the input" if "adapter" in target else "is not a folder") in message


def test_input_through_a_symlink_is_still_the_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "link").symlink_to("adapter")
    assert "contains the input link" in fails("expand link -o adapter --overwrite", 1, capsys)
    assert "contains the input adapter" in fails("expand adapter -o link/OUT", 1, capsys)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("out", ["x" * 300, "adapter/adapter_config.json/OUT", "/dev/null/OUT"])
def test_impossible_paths(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(f"expand base/../adapter -o {out}", 1, capsys)
    assert fails(f"expand {out} -o OUT", 1, capsys)


def fails_half_way(stage: Path) -> None:
    (stage / "half").write_bytes(b"half")
    raise ArithmeticError


def test_stage_is_left_by_no_error_of_the_caller(folder: Path) -> None:
    with pytest.raises(ArithmeticError), staged(folder / "OUT", [], overwrite=False) as stage:
        fails_half_way(stage)
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base"]


def test_stage_that_the_caller_removed(folder: Path) -> None:
    with pytest.raises(OutputError) as caught, staged(folder / "OUT", [], overwrite=False) as stage:
        stage.rmdir()
    assert caught.value.code == "output-unwritable"


# --- files that change while they are read


class Truncating:
    """Progress that cuts a file short when the work begins: after its header was read."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size

    def start(self, description: str, total: int, unit: str) -> None:  # noqa: ARG002 - the protocol's
        os.truncate(self.path, self.size)

    def advance(self, amount: int) -> None:
        pass


def test_adapter_that_shrinks_while_it_is_read(folder: Path) -> None:
    weights = folder / "adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    for use in (prolora_tools.expand, lambda *a, **o: prolora_tools.compress(*a, unshared=1, chunks=2, **o)):
        weights.write_bytes(whole)
        error = raised(use, folder / "adapter", folder / "OUT", progress=Truncating(weights, len(whole) - 1))
        assert error.code == "file-changed"
        assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("keep", [0, 300, 4000])
def test_base_that_shrinks_while_it_is_merged(keep: int, folder: Path) -> None:
    build.write(folder, build.base(tensors={f"{build.Q}.weight": build.numbers(64, 64)}))
    cut = Truncating(folder / "base/model.safetensors", keep)
    error = raised(prolora_tools.merge, folder / "adapter", folder / "OUT", base=folder / "base", progress=cut)
    assert error.code == "file-shrunk"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base"]


def test_base_that_shrinks_while_it_is_copied(folder: Path) -> None:
    size = (folder / "base/model.safetensors").stat().st_size
    cut = Truncating(folder / "base/model.safetensors", size - 1)  # the last tensor is one that is only copied
    error = raised(prolora_tools.merge, folder / "adapter", folder / "OUT", base=folder / "base", progress=cut)
    assert error.code == "file-changed"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "base"]


# --- the Python API


def test_negative_stride() -> None:
    assert raised(Geometry, 4, 1, 2, 2, -1).code == "geometry-stride"
    assert raised(Geometry, 4, 1, 2, 2, 1, -1).code == "geometry-stride"


def test_names_that_click_would_refuse(folder: Path) -> None:
    adapter, out = folder / "adapter", folder / "OUT"
    compress: dict[str, Any] = {"unshared": 1, "chunks": 2}
    assert raised(prolora_tools.compress, adapter, out, method="best", **compress).code == "method-unknown"
    assert raised(prolora_tools.compress, adapter, out, lengthen="all", **compress).code == "lengthen-unknown"
    averaged: dict[str, Any] = {**compress, "method": "align", "lengthen": "directions", "dry_run": True}
    assert raised(prolora_tools.compress, adapter, out, **averaged).code == "compress-lengthen"
    assert raised(prolora_tools.compress, adapter, out, dtype="int8", **compress).code == "dtype-unknown"
    assert raised(prolora_tools.expand, adapter, out, dtype="BF16").code == "dtype-unknown"
    assert raised(prolora_tools.merge, adapter, out, base=folder / "base", dtype="half").code == "dtype-unknown"
    assert not out.exists()


def test_statistics_of_a_dora_adapter(tmp_path: Path) -> None:
    """The command refuses it before the text is read."""
    from prolora_tools.operations.calibrate import calibrate

    dora = build.adapter({"use_dora": True}, {**build.factors(), f"{build.Q}.lora_magnitude_vector": build.numbers(4)})
    build.write(tmp_path, dora)
    error = raised(calibrate, tmp_path / "adapter", base=tmp_path, text=tmp_path / "text")
    assert (error.code, type(error)) == ("calibrate-dora", UnsupportedError)


def test_a_device_with_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch raises where a batch does not fit, with what to do about it."""
    import torch

    from prolora_tools.operations import calibrate as operation

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(operation, "_sampled_loss", full)
    (tmp_path / "text").write_text("word " * 999)
    found = model("gpt2-tiny-py-r8"), model("gpt2-tiny-en")
    error = raised(operation.calibrate, found[0], base=found[1], text=tmp_path / "text", outputs=True, length=16)
    assert (error.code, type(error)) == ("calibrate-memory", RequestError)
    assert "8 windows of 16 tokens" in str(error)
    assert "more" not in str(error)
    monkeypatch.setattr(torch.nn.Module, "to", full)
    error = raised(operation.calibrate, found[0], base=found[1], text=tmp_path / "text")
    assert (error.code, type(error)) == ("calibrate-memory", RequestError)
    assert "not enough memory for the model" in str(error)


def test_gradients_of_a_model_without_logits() -> None:
    """--calibrate-outputs on an encoder: there is no likelihood whose gradients could be collected."""
    import torch

    from prolora_tools.operations.calibrate import _sampled_loss

    class Encoder(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            return torch.nn.Embedding(3, 2)

        def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
            return inputs_embeds

    with pytest.raises(UnsupportedError, match="Encoder predicts no labels") as caught:
        _sampled_loss(Encoder(), torch.tensor([[0, 1]]), torch.Generator())
    assert caught.value.code == "calibrate-no-logits"
