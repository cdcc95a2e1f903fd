"""Every fault of a network or a Hub: the right outcome or one clear error, no partial OUT, no commit twice."""

from __future__ import annotations

import http.server
import threading
import time
from typing import TYPE_CHECKING

import pytest

from .conftest import Cli, contents, finish, leftovers, write_lora

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .server import Hub

MODES = pytest.mark.parametrize(
    "xet", [pytest.param(True, id="xet"), pytest.param(False, id="lfs", marks=pytest.mark.slow)]
)


def assert_pushed_once(hub: Hub, folder: Path, *, commits: int = 2) -> None:
    files = hub.files("alice/it")
    assert {name: files[name] for name in contents(folder)} == contents(folder)
    assert len(hub.repos["alice/it"].history("main")) == commits


@MODES
def test_lost_answer_to_a_commit(hub: Hub, cli: Cli, lora: Path, *, xet: bool) -> None:
    hub.create("alice/it")
    hub.fault("POST /api/models/alice/it/commit/", "lost")
    result = cli("push", lora, "alice/it", xet=xet)
    commit = hub.repos["alice/it"].commit("main").oid
    assert (result.code, result.out) == (0, f"{hub.url}/alice/it/commit/{commit}\n")
    assert_pushed_once(hub, lora)


def test_lost_answer_and_somebody_elses_commit_on_top(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it")
    hub.fault("POST /api/models/alice/it/commit/", "lost")
    hub.fault("GET /api/models/alice/it/commits/", "pause", 1)
    process = cli.start("push", lora, "alice/it")
    while len(hub.repos["alice/it"].commits) < 2:
        time.sleep(0.01)
    ours = hub.repos["alice/it"].commit("main").oid
    hub.commit("alice/it", {"adapter_config.json": b"{}"})
    result = finish(process)
    assert (result.code, result.out) == (0, f"{hub.url}/alice/it/commit/{ours}\n")
    assert len(hub.repos["alice/it"].history("main")) == 3
    assert hub.files("alice/it")["adapter_config.json"] == b"{}"


def test_lost_answer_to_a_pull_request(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("bob/it")
    hub.fault("POST /api/models/bob/it/commit/", "lost")
    result = cli("push", lora, "bob/it", "--create-pr")
    assert (result.code, result.out) == (0, f"{hub.url}/bob/it/discussions/1\n")
    assert list(hub.repos["bob/it"].pulls) == [1]


def test_lost_answer_on_the_clients_large_folder_path(hub: Hub, cli: Cli, model: Path) -> None:
    """The client itself repeats the commit there, and is told 412."""
    for i in range(220):
        (model / "additional_chat_templates" / f"t{i}.jinja").write_text(f"{i}")
    hub.create("alice/it")
    hub.fault("POST /api/models/alice/it/commit/", "lost")
    assert cli("push", model, "alice/it").code == 0
    assert {r.status for r in hub.seen("POST /api/models/alice/it/commit/")} == {412}  # the lost one is not listed
    assert_pushed_once(hub, model)


@MODES
def test_overtaken_push_lands_on_top(hub: Hub, cli: Cli, lora: Path, *, xet: bool) -> None:
    hub.create("alice/it")
    hub.fault("POST /api/models/alice/it/commit/", "pause", 1)
    process = cli.start("push", lora, "alice/it", xet=xet)
    while not hub.seen("preupload"):
        time.sleep(0.01)
    hub.commit("alice/it", {"notes.txt": b"theirs"})
    assert finish(process).code == 0
    assert [r.status for r in hub.seen("POST .*/commit/")] == [412, 200]
    assert_pushed_once(hub, lora, commits=3)
    assert hub.files("alice/it")["notes.txt"] == b"theirs"


BUSY = {
    "preupload": ("POST .*/preupload/", True),
    "xet token": ("GET .*/xet-write-token/", True),
    "batch": ("POST .*/objects/batch", False),
    "upload": ("PUT /upload/", False),
    "verify": ("POST .*/lfs/verify", False),
    "commit": ("POST .*/commit/", True),
}
OTHERS = sorted(BUSY.keys() - {"upload", "commit"})


@pytest.mark.parametrize("where", ["upload", "commit", *(pytest.param(w, marks=pytest.mark.slow) for w in OTHERS)])
def test_busy_while_pushing(hub: Hub, cli: Cli, lora: Path, where: str) -> None:
    pattern, xet = BUSY[where]
    hub.create("alice/it")
    fault = hub.fault(pattern, "status", 503)
    assert cli("push", lora, "alice/it", xet=xet).code == 0
    assert fault.times == 0
    assert_pushed_once(hub, lora)


def test_dropped_upload_is_repeated(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it")
    fault = hub.fault("PUT /upload/", "drop")
    assert cli("push", lora, "alice/it", xet=False).code == 0
    assert fault.times == 0
    assert_pushed_once(hub, lora)


@MODES
def test_killed_push_goes_on_when_run_again(hub: Hub, cli: Cli, lora: Path, *, xet: bool) -> None:
    hub.create("alice/it")
    hub.fault("POST .*/commit/", "pause", 2)
    process = cli.start("push", lora, "alice/it", xet=xet)
    while not hub.seen("preupload" if xet else "lfs/verify"):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert cli("push", lora, "alice/it", xet=xet).code == 0
    assert len(hub.seen("PUT /upload/")) == (0 if xet else 1)
    assert_pushed_once(hub, lora)


@MODES
def test_unreachable_storage_is_one_error(hub: Hub, cli: Cli, lora: Path, *, xet: bool) -> None:
    hub.create("alice/it")
    hub.fault("xet-write-token|PUT /upload/", "status", 403, times=100)
    result = cli("push", lora, "alice/it", xet=xet)
    assert result.code == 1
    assert len(hub.repos["alice/it"].commits) == 1
    assert "Error:" in result.error


def test_a_file_that_changes_while_it_is_sent_is_reported(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it")
    hub.fault("POST .*/preupload/", "pause", 1)
    process = cli.start("push", lora, "alice/it")
    while not hub.seen("GET .*/tree/"):
        time.sleep(0.01)
    write_lora(lora, seed=9)
    result = finish(process)
    assert result.code == 1
    assert "changed while it was sent" in result.error


@pytest.mark.parametrize("kind", ["flip", "long"])
def test_wrong_bytes_are_caught(hub: Hub, cli: Cli, lora: Path, kind: str) -> None:
    hub.create("alice/it", contents(lora))
    hub.fault("GET /objects/", "flip" if kind == "flip" else "long", times=9)
    result = cli("pull", "alice/it", "-o", "out")
    assert result.code == 1
    assert ("other bytes" if kind == "flip" else "bytes the Hub lists") in result.error
    assert leftovers(cli.folder) == []


def test_wrong_bytes_of_a_small_file_are_caught(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    hub.fault("GET .*/resolve/.*/adapter_config.json", "flip")
    assert "other bytes" in cli("pull", "alice/it", "-o", "out").error
    assert leftovers(cli.folder) == []


def test_cut_download_is_resumed(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    fault = hub.fault("GET /objects/", "cut")
    assert cli("pull", "alice/it", "-o", "out").code == 0
    assert fault.times == 0
    assert [r.status for r in hub.seen("GET /objects/")] == [200, 206]  # cut, and the rest
    assert contents(cli.folder / "out") == contents(lora)


@pytest.mark.slow
def test_download_that_is_always_cut_is_one_error(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    hub.fault("GET /objects/", "cut", times=99)
    result = cli("pull", "alice/it", "-o", "out")
    assert result.code == 1
    assert "cannot be reached" in result.error
    assert leftovers(cli.folder) == []


@pytest.mark.parametrize("status", [429, pytest.param(503, marks=pytest.mark.slow)])
def test_busy_while_pulling(hub: Hub, cli: Cli, lora: Path, status: int) -> None:
    hub.create("alice/it", contents(lora))
    faults = [hub.fault(p, "status", status) for p in ("GET .*/tree/", "GET /objects/")]
    assert cli("pull", "alice/it", "-o", "out").code == 0
    assert [f.times for f in faults] == [0, 0]
    assert contents(cli.folder / "out") == contents(lora)


def test_killed_pull_leaves_no_out(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    hub.fault("GET /objects/", "pause", 3)
    process = cli.start("pull", "alice/it", "-o", "out")
    while not hub.seen("GET .*/resolve/.*safetensors"):
        time.sleep(0.01)
    process.terminate()
    result = finish(process)
    assert result.code == 130
    assert leftovers(cli.folder) == []


class _Thief(http.server.BaseHTTPRequestHandler):
    """Another origin: answers everything with an empty object and remembers the tokens it was given."""

    stolen: list[str | None]

    def do_GET(self) -> None:
        self.stolen.append(self.headers["Authorization"])
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815 - the base class's names

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def thief() -> Iterator[tuple[str, list[str | None]]]:
    _Thief.stolen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Thief)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", _Thief.stolen
    server.shutdown()
    server.server_close()


LURES = {
    "redirected info": ("pull", "GET /api/models/alice/it$", "redirect", "{}/x"),
    "redirected file": ("pull", "GET /alice/it/resolve", "redirect", "{}/x"),
    "next page": ("pull", "GET .*/tree/", "headers", {"Link": '<{}/x>; rel="next"'}),
    "redirected preupload": ("push", "POST .*/preupload", "redirect", "{}/x"),
    "storage token": (
        "expand",
        "HEAD /alice/it/resolve",
        "headers",
        {"Link": '<{}/x>; rel="xet-auth"', "X-Xet-Hash": "0" * 64},
    ),
}


@pytest.mark.parametrize("lure", LURES)
def test_no_token_goes_to_another_origin(
    hub: Hub, cli: Cli, lora: Path, thief: tuple[str, list[str | None]], lure: str
) -> None:
    url, stolen = thief
    hub.create("alice/it", contents(lora))
    command, pattern, kind, value = LURES[lure]
    value = {k: v.format(url) for k, v in value.items()} if isinstance(value, dict) else str(value).format(url)
    hub.fault(pattern, kind, value, times=9)  # type: ignore[arg-type] # a table of faults
    write_lora(lora, seed=1)
    table: dict[str, tuple[object, ...]] = {
        "pull": ("alice/it", "-o", "out"),
        "push": (lora, "alice/it"),
        "expand": ("hf://alice/it", "-o", "out"),
    }
    arguments = table[command]
    result = cli(command, *arguments)
    assert result.code != 70
    assert set(stolen) <= {None}
    assert stolen or command == "expand"


def test_no_token_goes_to_another_origin_from_lfs(
    hub: Hub, cli: Cli, lora: Path, thief: tuple[str, list[str | None]]
) -> None:
    """The verify address is the Hub's to choose, and the client sends the token there."""
    url, stolen = thief
    hub.create("alice/it")
    hub.verify_at = f"{url}/verify"
    result = cli("push", lora, "alice/it", xet=False)
    assert result.code == 0
    assert stolen == [None]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "C:\\evil", "\\\\server\\evil", ".git/config", "CONFIG.json"])
def test_hostile_names(hub: Hub, cli: Cli, model: Path, name: str) -> None:
    """More of them in test_names.py."""
    hub.create("alice/it", contents(model))
    repo = hub.repos["alice/it"]
    repo.commit("main").files[name] = hub.objects.add("x", b"evil")
    result = cli("pull", "alice/it", "-o", "out")
    assert result.code == 1
    assert "nothing was downloaded" in result.error
    assert not hub.seen("resolve")
    assert leftovers(cli.folder) == []


def header(json_text: bytes, data: bytes = b"") -> bytes:
    return len(json_text).to_bytes(8, "little") + json_text + data


BOMBS = {
    "huge header": (header(b"{" + b" " * 26_000_000 + b"}"), "at most 25,000,000"),
    "absurd length": (b"\xff" * 8 + b"{}", "at most 25,000,000"),
    "many tensors": (
        header(
            b"{%s}" % b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(200_001))
        ),
        "names 200,001 tensors",
    ),
    "same key twice": (
        header(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        "stands twice",
    ),
    "deep": (header(b"[" * 200_000), "the header"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_header_bombs(hub: Hub, cli: Cli, lora: Path, bomb: str) -> None:
    data, what = BOMBS[bomb]
    hub.create("alice/it", contents(lora) | {"adapter_model.safetensors": data})
    result = cli("pull", "alice/it", "-o", "out")
    assert result.code == 1
    assert what in result.error
    assert leftovers(cli.folder) == []


@pytest.mark.parametrize("etag", ["../../../../../evil", "/tmp/evil"])
@pytest.mark.parametrize("command", ["pull", "merge"])
def test_hostile_etag(hub: Hub, cli: Cli, lora: Path, model: Path, command: str, etag: str) -> None:
    hub.create("alice/it", contents(lora))
    hub.create("alice/base", contents(model))
    hub.fault("/resolve/.*safetensors", "headers", {"X-Linked-Etag": f'"{etag}"'}, times=99)
    arguments: list[object] = ["alice/it"] if command == "pull" else [lora, "--base", "hf://alice/base"]
    result = cli(command, *arguments, "-o", "out")
    assert "answers with a commit, an ETag" in result.error
    assert leftovers(cli.folder) == []
    names = [p.name for p in cli.folder.parent.rglob("*")]
    assert not [n for n in names if "evil" in n]


def test_a_listing_without_end_is_refused(hub: Hub, cli: Cli, lora: Path) -> None:
    hub.create("alice/it", contents(lora))
    endless = {"Link": f'<{hub.url}/api/models/alice/it/tree/main?recursive=True>; rel="next"'}
    hub.fault("GET .*/tree/", "headers", endless, times=100_000)
    files = hub.repos["alice/it"].commit("main").files
    files |= {f"{i}.txt": files["adapter_config.json"] for i in range(5_000)}
    hub.page_size = 5_000
    result = cli("pull", "alice/it", "-o", "out")
    assert "more than 20,000 files" in result.error
