"""The loopback Hub itself: the stock client works against it unchanged, and it refuses what the Hub refuses."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from .server import Hub

HF = str(Path(sys.executable).with_name("hf"))
MODES = {"A": (True, False), "B": (False, False), "C": (True, True)}


def call(hub: Hub, method: str, url: str, body: bytes | None = None, token: str | None = "hf_alice") -> tuple[int, Any]:
    """Status and JSON of one request."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url if "://" in url else hub.url + url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers) | json.loads(error.read() or b"{}")


def ndjson(*lines: tuple[str, dict[str, str]]) -> bytes:
    return b"\n".join(json.dumps({"key": k, "value": v}).encode() for k, v in lines)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    (made / "sub").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Hi\n")
    (made / "a.safetensors").write_bytes(bytes(range(256)) * 4000)
    (made / "sub" / "b.bin").write_bytes(b"\0\1" * 100)
    (made / "empty.txt").write_bytes(b"")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != ".gitattributes"}


@pytest.mark.parametrize("mode", MODES)
def test_stock_cli_roundtrip(tmp_path: Path, folder: Path, mode: str) -> None:
    xet, xet_downloads = MODES[mode]
    with Hub(tmp_path / "hub", xet_downloads=xet_downloads) as hub:
        hub.multipart_over, hub.part_size = 500_000, 300_000
        env = hub.environment(tmp_path / "home", xet=xet)

        def hf(*arguments: str) -> str:
            return subprocess.run([HF, *arguments], env=env, check=True, capture_output=True, text=True).stdout

        hf("upload", "alice/stock", str(folder), ".", "--commit-message", "first")
        assert hub.files("alice/stock") == contents(folder)
        assert bool(hub.seen("PUT /part/")) == (mode == "B")
        assert bool(hub.seen("GET .*xet-write-token")) == xet
        hub.page_size = 2
        hf("download", "alice/stock", "--local-dir", str(tmp_path / "got"))
        assert contents(tmp_path / "got") == contents(folder)
        assert bool(hub.seen("GET .*xet-read-token")) == xet_downloads
        assert not xet_downloads or not hub.seen("GET /objects/")
        assert not [r for r in hub.requests if r.origin == "cdn" and r.authorization]
        hf("upload", "alice/stock", str(folder), ".", "--commit-message", "again")
        assert len(hub.repos["alice/stock"].history("main")) == 2
        (folder / "new.safetensors").write_bytes(b"new" * 100)
        hf("upload", "alice/stock", str(folder), ".", "--create-pr")
        assert "new.safetensors" in hub.files("alice/stock", "refs/pr/1")
        assert "new.safetensors" not in hub.files("alice/stock")


def test_upload_of_other_bytes_than_promised_is_refused(hub: Hub) -> None:
    oid = hashlib.sha256(b"promised").hexdigest()
    assert call(hub, "PUT", f"{hub.cdn}/upload/{oid}", b"sent", token=None)[0] == 400
    assert not hub.objects.has(oid)
    assert call(hub, "PUT", f"{hub.cdn}/upload/{oid}", b"promised", token=None)[0] == 200


def test_commit_of_an_unknown_object_is_refused(hub: Hub) -> None:
    hub.create("alice/m")
    lines = ("header", {"summary": "s"}), ("lfsFile", {"path": "x.bin", "algo": "sha256", "oid": "0" * 64})
    status, answer = call(hub, "POST", "/api/models/alice/m/commit/main", ndjson(*lines))
    assert (status, len(hub.repos["alice/m"].commits)) == (400, 1)
    assert "Offending file: - x.bin" in answer["error"]


@pytest.mark.parametrize("path", ["/etc/x", "a/../../x", ".git/config"])
def test_commit_of_a_bad_path_is_refused(hub: Hub, path: str) -> None:
    hub.create("alice/m")
    file = {"path": path, "encoding": "base64", "content": base64.b64encode(b"x").decode()}
    assert (
        call(hub, "POST", "/api/models/alice/m/commit/main", ndjson(("header", {"summary": "s"}), ("file", file)))[0]
        == 400
    )


def test_stale_parent_and_missing_delete_are_refused(hub: Hub) -> None:
    hub.create("alice/m", {"a.txt": b"a"})
    url = "/api/models/alice/m/commit/main"
    first = hub.repos["alice/m"].history("main")[-1].oid
    gone = ("deletedFile", {"path": "nothing"})
    assert call(hub, "POST", url, ndjson(("header", {"summary": "s", "parentCommit": first})))[0] == 412
    assert call(hub, "POST", url, ndjson(("header", {"summary": "s"}), gone))[0] == 404


def test_cdn_refuses_a_token(tmp_path: Path) -> None:
    """The fixture's own check that a leak would be seen."""
    with Hub(tmp_path) as hub:
        entry = hub.objects.add("x.bin", b"\0abc")
        assert call(hub, "GET", f"{hub.cdn}/objects/{entry.sha256}")[0] == 400
        assert [r for r in hub.requests if r.origin == "cdn" and r.authorization]


def test_who_may_see_what(hub: Hub) -> None:
    hub.create("alice/private", private=True)
    hub.create("alice/gated", {"a.txt": b"a"}, gated=True)
    info, file = "/api/models/alice/private", "/alice/gated/resolve/main/a.txt"
    seen = {t: (call(hub, "GET", info, token=t), call(hub, "HEAD", file, token=t)) for t in (None, "hf_bob", "bad")}
    codes = {t: (a[0], a[1].get("X-Error-Code"), b[0]) for t, (a, b) in seen.items()}
    assert codes == {None: (401, "RepoNotFound", 401), "hf_bob": (404, "RepoNotFound", 403), "bad": (401, None, 401)}
    assert call(hub, "GET", info)[0] == 200
    assert call(hub, "POST", "/api/models/alice/private/branch/x", b"{}", token="hf_alice_read")[0] == 403
    assert call(hub, "GET", "/api/models/alice/gated", token="hf_bob")[0] == 200
    hub.repos["alice/gated"].granted.add("bob")
    assert call(hub, "HEAD", file, token="hf_bob")[0] == 200


def test_revisions(hub: Hub) -> None:
    repo = hub.create("alice/m", {"a.txt": b"a"})
    first = repo.commit("main").oid
    base = "/api/models/alice/m"
    assert call(hub, "POST", f"{base}/branch/dev%2Fa", b"{}")[0] == 200
    assert call(hub, "POST", f"{base}/branch/dev%2Fa", b"{}")[0] == 409
    assert call(hub, "POST", f"{base}/tag/main", b'{"tag": "v1"}')[0] == 200
    hub.commit("alice/m", {"a.txt": b"b"})
    for revision in ("dev%2Fa", "v1", first, first[:7]):
        assert call(hub, "GET", f"{base}/revision/{revision}")[1]["sha"] == first
    assert call(hub, "GET", f"{base}/revision/nope")[1]["X-Error-Code"] == "RevisionNotFound"
    assert call(hub, "DELETE", f"{base}/branch/dev%2Fa")[0] == 200
    assert [b["name"] for b in call(hub, "GET", f"{base}/refs")[1]["branches"]] == ["main"]
    assert call(hub, "DELETE", f"{base}/branch/main")[0] == 403


def test_ranges(hub: Hub) -> None:
    data = bytes(range(10))
    entry = hub.objects.add("x.bin", data)
    url = f"{hub.cdn}/objects/{entry.sha256}"

    def get(asked: str) -> tuple[int, bytes]:
        request = urllib.request.Request(url, headers={"Range": asked})
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, b""

    assert get("bytes=2-4") == (206, data[2:5])
    assert get("bytes=7-") == (206, data[7:])
    assert get("bytes=99-") == (416, b"")
