"""A Hub on 127.0.0.1 for tests, speaking what huggingface_hub 2.4 and hf-xet 1.8 speak; a CDN listens on a second port.

In a test: `with Hub(folder) as hub: ...` and `hub.environment()` for the client's process. By hand:
`python -m tests.hub.server`. Faults are asked for with `hub.fault(...)`; what clients did is in `hub.requests`.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from .repos import Commit, Entry, Objects, Refusal, Repo, apply_operations, is_lfs, with_xet
from .xet import Xet

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

DATE = "2026-01-01T00:00:00.000Z"
FaultKind = Literal["status", "drop", "lost", "cut", "long", "flip", "redirect", "headers", "body", "pause"]


@dataclass
class Fault:
    """What goes wrong with the next `times` requests whose "METHOD path" matches.

    status: answer `value` and do nothing. drop: cut the connection in the request's body. lost: do it, then cut.
    cut: send half the body. long: send more than the file has. flip: change one byte of the body. redirect: 302 to the
    URL `value`. headers: set the headers `value`. body: answer with the bytes `value` instead.
    pause: wait `value` seconds first.
    """

    pattern: str
    kind: FaultKind
    value: Any = None
    times: int = 1


@dataclass(frozen=True)
class Seen:
    """One request, as it came; `sent` is the length of the answer's body."""

    origin: Literal["hub", "cdn"]
    method: str
    path: str
    authorization: str | None
    status: int
    sent: int


@dataclass
class Reply:
    """An answer: JSON, bytes, or a part of a file."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    span: tuple[Path, int, int] | None = None


class Hub:
    """The two servers and all they hold.

    Args:
        folder: for objects and Xet storages.
        xet_downloads: offer files over Xet too (mode C).
    """

    def __init__(self, folder: Path, *, xet_downloads: bool = False, port: int = 0) -> None:
        self.objects = Objects(folder / "objects")
        self.xet = Xet(folder / "xet")
        self.xet_downloads = xet_downloads
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, tuple[str, str]] = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write")}
        self.tokens["hf_alice_read"] = ("alice", "read")
        self.faults: list[Fault] = []
        self.requests: list[Seen] = []
        self.page_size = 1000
        self.multipart_over = 64 << 20
        self.part_size = 8_000_000
        self.verify_at: str | None = None  # for a Hub that sends the client elsewhere
        self.lock = threading.RLock()
        self.servers = [_Server(port, self, "hub"), _Server(0, self, "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in self.servers)

    def __enter__(self) -> Self:
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def environment(self, home: Path, token: str | None = "hf_alice", *, xet: bool = True) -> dict[str, str]:
        """Variables for a client's process; huggingface_hub reads them when it is imported."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"(?i)hf_|huggingface|\w+_proxy$", k)}
        names = ("TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")
        ours = {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | {f"HF_HUB_DISABLE_{n}": "1" for n in names}
        return kept | ours | ({"HF_TOKEN": token} if token else {}) | ({} if xet else {"HF_HUB_DISABLE_XET": "1"})

    def fault(self, pattern: str, kind: FaultKind, value: Any = None, times: int = 1) -> Fault:
        """Ask for a fault."""
        self.faults.append(Fault(pattern, kind, value, times))
        return self.faults[-1]

    def create(self, name: str, files: dict[str, bytes] | None = None, **settings: Any) -> Repo:
        """A new repository, as POST /api/repos/create makes it, with one more commit if files are given."""
        repo = self.repos[name] = Repo(name, **settings)
        first = {".gitattributes": self.objects.add(".gitattributes", b"*.safetensors filter=lfs diff=lfs merge=lfs\n")}
        repo.add_commit("refs/heads/main", first, "initial commit", "", repo.owner)
        if files:
            self.commit(name, files)
        return repo

    def commit(self, name: str, files: dict[str, bytes], revision: str = "refs/heads/main") -> Commit:
        """Somebody's commit."""
        repo = self.repos[name]
        tree = dict(repo.commits[repo.refs[revision]].files)
        tree |= {path: self.objects.add(path, data) for path, data in files.items()}
        return repo.add_commit(revision, tree, "Somebody's commit", "", repo.owner)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds, .gitattributes aside."""
        files = self.repos[name].commit(revision).files
        return {p: self.objects.path(e.key).read_bytes() for p, e in files.items() if p != ".gitattributes"}

    def seen(self, pattern: str) -> list[Seen]:
        """The requests whose "METHOD path" matches."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, hub: Hub, origin: Literal["hub", "cdn"]) -> None:
        self.hub, self.origin = hub, origin
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error; everything else is shown."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type] # as the base has it


_ROUTES: dict[str, list[tuple[str, re.Pattern[str], Callable[..., Reply]]]] = {"hub": [], "cdn": []}
_ID = r"(?P<id>[^/]+/[^/]+)"


def _route(methods: str, path: str, origin: str = "hub") -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Serve a raw path; its named groups come unquoted."""

    def add(function: Callable[..., Reply]) -> Callable[..., Reply]:
        pattern = re.compile(path.replace("{id}", _ID).replace("{rev}", "(?P<rev>[^/]+)"))
        _ROUTES[origin] += [(method, pattern, function) for method in methods.split()]
        return function

    return add


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        self.hub, url = self.server.hub, urlsplit(self.path)
        self.raw_path, self.query = url.path, {k: v[-1] for k, v in parse_qs(url.query).items()}
        self.left = int(self.headers.get("Content-Length") or 0)
        self.faults = self._faults()
        try:
            reply = self._fault_before() or self._dispatch()
        except Refusal as refusal:
            reply = Reply({"error": refusal.message}, refusal.status, refusal.headers)
        self._drain()
        self._answer(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - the base class's names

    def _faults(self) -> dict[str, Any]:
        with self.hub.lock:
            request = f"{self.command} {self.path}"
            due = [f for f in self.hub.faults if f.times and re.search(f.pattern, request)]
            for fault in due:
                fault.times -= 1
        return {f.kind: f.value for f in due}

    def _fault_before(self) -> Reply | None:
        if "pause" in self.faults:
            time.sleep(self.faults["pause"])
        if "drop" in self.faults:
            self.rfile.read(min(self.left, 1000))
            self._cut()
        if "redirect" in self.faults:
            return Reply(status=302, headers={"Location": self.faults["redirect"]})
        if "status" in self.faults:
            raise Refusal(self.faults["status"], "fault asked for by the test", **{"Retry-After": "0"})
        return None

    def _cut(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def _dispatch(self) -> Reply:
        if self.server.origin == "cdn" and self.headers["Authorization"]:
            raise Refusal(400, "only one auth mechanism allowed")  # as S3 says
        for method, pattern, function in _ROUTES[self.server.origin]:
            if method == self.command and (match := pattern.fullmatch(self.raw_path)):
                return function(self, **{k: v and unquote(v) for k, v in match.groupdict().items()})
        raise Refusal(404, f"no such route: {self.command} {self.path}")

    def _answer(self, reply: Reply) -> None:
        if "lost" in self.faults:
            self._cut()
        reply.body = self.faults.get("body", reply.body)
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        size = reply.span[2] - reply.span[1] if reply.span else len(body)
        announced = size + (1000 if "long" in self.faults else 0)
        headers = {"Content-Length": str(announced), "Content-Type": "application/json", "X-Request-Id": "loopback"}
        sent, path, authorization = 0 if self.command == "HEAD" else size, self.path, self.headers["Authorization"]
        # Before the answer: a client that has it may look at once.
        self.hub.requests.append(Seen(self.server.origin, self.command, path, authorization, reply.status, sent))
        self.send_response(reply.status)
        for name, value in (headers | reply.headers | self.faults.get("headers", {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(reply.span, body, size)

    def _send(self, span: tuple[Path, int, int] | None, body: bytes, size: int) -> None:
        if span is None:
            data = body
        else:
            with span[0].open("rb") as f:
                f.seek(span[1])
                data = f.read(size)
        if "flip" in self.faults:
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        if "cut" in self.faults:
            self.wfile.write(data[: len(data) // 2])
            self._cut()
        self.wfile.write(data + b"x" * 1000 if "long" in self.faults else data)

    def read(self, size: int = -1) -> bytes:
        """The request's body, up to its announced length."""
        data = self.rfile.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        if self.left and not data:
            self._cut()
        return data

    def json(self) -> dict[str, Any]:
        """The body as an object."""
        parsed: dict[str, Any] = json.loads(self.read() or b"{}")
        return parsed

    def _drain(self) -> None:
        while self.left:
            self.read(1 << 20)

    def user(self) -> tuple[str | None, str]:
        """(name, role) of the caller; (None, "read") without a token."""
        given = self.headers["Authorization"]
        if not given:
            return None, "read"
        known = self.hub.tokens.get(given.removeprefix("Bearer "))
        if known is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return known

    def repo(self, name: str, *, write: bool = False, content: bool = False) -> Repo:
        """A repository, if the caller may do this to it."""
        user, role = self.user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user != repo.owner):
            if user is None:  # the code is a deviation: the client maps a bare 401 on https:// only
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if content and repo.gated and user != repo.owner and user not in repo.granted:
            message = f"Access to model {name} is restricted. Visit {self.hub.url}/{name} to ask for access."
            raise Refusal(403 if user else 401, message, "GatedRepo")
        if write and user is None:
            raise Refusal(401, "Invalid username or password.")
        if write and (role != "write" or user != repo.owner):
            raise Refusal(403, f"You don't have the rights to write to {name} with this token")
        return repo


# The hub: accounts and repositories


@_route("GET", "/api/agent-harnesses")
def _harnesses(_: _Handler) -> Reply:
    return Reply({"standardEnvVars": [], "harnesses": {}})


@_route("GET", "/api/whoami-v2")
def _whoami(h: _Handler) -> Reply:
    user, role = h.user()
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    auth = {"accessToken": {"displayName": "t", "role": role}}
    return Reply({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": auth})


@_route("POST", "/api/repos/create")
def _create(h: _Handler) -> Reply:
    user, role = h.user()
    asked = h.json()
    if user is None:
        raise Refusal(401, "Invalid username or password.")
    owner = asked.get("organization") or user
    name = f"{owner}/{asked['name']}"
    if owner != user or role != "write":
        raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
    with h.hub.lock:
        if name in h.hub.repos:
            message = "You already created this model repo"
            return Reply({"error": message, "url": f"{h.hub.url}/{name}"}, 409, {"X-Error-Message": message})
        h.hub.create(name, private=asked.get("visibility") == "private")
    return Reply({"url": f"{h.hub.url}/{name}", "name": name, "id": "0" * 24})


@_route("DELETE", "/api/repos/delete")
def _delete(h: _Handler) -> Reply:
    asked = h.json()
    repo = h.repo(f"{asked.get('organization') or h.user()[0]}/{asked['name']}", write=True)
    del h.hub.repos[repo.id]
    return Reply({})


@_route("PUT", "/api/models/{id}/settings")
def _settings(h: _Handler, id: str) -> Reply:  # noqa: A002 - the route's group
    repo, asked = h.repo(id, write=True), h.json()
    repo.private = asked.get("visibility", "private" if repo.private else "public") == "private"
    repo.gated = bool(asked.get("gated", repo.gated))
    return Reply(asked)


@_route("GET", "/api/models/{id}/auth-check(?P<write>/write)?")
def _auth_check(h: _Handler, id: str, write: str | None) -> Reply:  # noqa: A002 - the route's group
    h.repo(id, write=bool(write), content=True)
    return Reply({})


# Reading


@_route("GET", "/api/models/{id}(?:/revision/{rev})?")
def _info(h: _Handler, id: str, rev: str | None) -> Reply:  # noqa: A002 - the route's group
    repo = h.repo(id)
    commit = repo.commit(rev or "main")
    card = commit.files.get("README.md")
    text = h.hub.objects.path(card.key).read_text() if card else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    siblings: list[dict[str, object]] = []
    for path, entry in commit.files.items():
        blobs = {"size": entry.size, "blobId": entry.oid, "lfs": entry.info(path).get("lfs")} if h.query else {}
        siblings.append({"rfilename": path} | {k: v for k, v in blobs.items() if v is not None})
    facts = {"sha": commit.oid, "private": repo.private, "gated": "manual" if repo.gated else False}
    fixed = {"disabled": False, "tags": [], "createdAt": DATE, "lastModified": DATE, "downloads": 0, "likes": 0}
    who = {"id": id, "modelId": id, "author": repo.owner, "cardData": yaml.safe_load(front[1]) if front else None}
    return Reply(who | facts | fixed | {"siblings": siblings})


@_route("GET", "/api/models/{id}/tree/{rev}(?:/(?P<path>.*))?")
def _tree(h: _Handler, id: str, rev: str, path: str | None) -> Reply:  # noqa: A002 - the route's group
    files = h.repo(id, content=True).commit(rev).files
    top = f"{path.strip('/')}/" if path else ""
    entries: dict[str, dict[str, object]] = {}
    for name, entry in sorted(files.items()):
        if not name.startswith(top):
            continue
        deep = h.query.get("recursive", "false").lower() == "true"
        parts = name[len(top) :].split("/")
        for i in range(1, len(parts) if deep else min(len(parts), 2)):
            folder = top + "/".join(parts[:i])
            entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
        if deep or len(parts) == 1:
            entries[name] = entry.info(name)
    if path and not entries:
        raise Refusal(404, f"{path} does not exist on {rev!r}", "EntryNotFound")
    start, size = int(h.query.get("cursor", 0)), h.hub.page_size
    page = list(entries.values())[start : start + size]
    more = f'<{h.hub.url}{h.raw_path}?recursive={h.query.get("recursive", "")}&cursor={start + size}>; rel="next"'
    return Reply(page, headers={"Link": more} if start + size < len(entries) else {})


@_route("POST", "/api/models/{id}/paths-info/{rev}")
def _paths_info(h: _Handler, id: str, rev: str) -> Reply:  # noqa: A002 - the route's group
    files = h.repo(id, content=True).commit(rev).files
    asked = parse_qs(h.read().decode()).get("paths", [])
    return Reply([files[p].info(p) for p in asked if p in files])


@_route("GET", "/api/models/{id}/refs")
def _refs(h: _Handler, id: str) -> Reply:  # noqa: A002 - the route's group
    refs = h.repo(id).refs
    kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
    lists = {
        kind: [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in refs.items()
            if ref.startswith(prefix)
        ]
        for kind, prefix in kinds.items()
    }
    return Reply(lists | {"converts": []})


@_route("GET", "/api/models/{id}/commits/{rev}")
def _commits(h: _Handler, id: str, rev: str) -> Reply:  # noqa: A002 - the route's group
    history = h.repo(id, content=True).history(rev)
    listed = [(c.oid, c.title, c.message, c.user) for c in history]
    return Reply([{"id": o, "title": t, "message": m, "date": DATE, "authors": [{"user": u}]} for o, t, m, u in listed])


@_route("GET HEAD", "/{id}/resolve/{rev}/(?P<path>.+)")
def _resolve(h: _Handler, id: str, rev: str, path: str) -> Reply:  # noqa: A002 - the route's group
    repo = h.repo(id, content=True)
    commit = repo.commit(rev)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    entry = commit.files.get(path)
    if entry is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", **headers)
    if entry.sha256 is None:
        return _file(h, h.hub.objects.path(entry.oid), headers | {"ETag": f'"{entry.oid}"'})
    etag = f'"{entry.sha256}"'
    headers |= {"ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(entry.size)}
    if entry.xet_hash:
        token_url = f"{h.hub.url}/api/models/{id}/xet-read-token/{commit.oid}"
        headers |= {"X-Xet-Hash": entry.xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
    return Reply(status=302, headers=headers | {"Location": f"{h.hub.cdn}/objects/{entry.sha256}"})


def _file(h: _Handler, path: Path, headers: dict[str, str]) -> Reply:
    size = path.stat().st_size
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers["Range"] or "")
    if not asked:
        return Reply(headers=headers, span=(path, 0, size))
    start, end = int(asked[1]), min(int(asked[2] or size), size - 1) + 1
    if start >= size:
        raise Refusal(416, "Range not satisfiable", **{"Content-Range": f"bytes */{size}"})
    content_range = {"Content-Range": f"bytes {start}-{end - 1}/{size}"}
    return Reply(status=206, headers=headers | content_range, span=(path, start, end))


# Branches, tags, pull requests


@_route("POST DELETE", "/api/models/{id}/branch/(?P<name>[^/]+)")
def _branch(h: _Handler, id: str, name: str) -> Reply:  # noqa: A002 - the route's group
    return _change_ref(h, h.repo(id, write=True), f"refs/heads/{name}", h.json().get("startingPoint") or "main")


@_route("POST DELETE", "/api/models/{id}/tag/(?P<name>[^/]+)")
def _tag(h: _Handler, id: str, name: str) -> Reply:  # noqa: A002 - the route's group
    repo, asked = h.repo(id, write=True), h.json()
    return _change_ref(h, repo, f"refs/tags/{asked.get('tag', name)}", name)  # created at a revision, deleted by name


def _change_ref(h: _Handler, repo: Repo, ref: str, at: str) -> Reply:
    if "refs/heads/refs/" in ref:
        raise Refusal(400, f"Invalid branch name: {ref}")
    with repo.lock:
        if h.command == "POST":
            if ref in repo.refs:
                raise Refusal(409, "Reference already exists")
            repo.refs[ref] = repo.commit(at).oid
        elif ref == "refs/heads/main":
            raise Refusal(403, "Cannot delete the main branch")
        else:
            del repo.refs[repo.ref(ref)]
    return Reply({})


def _pull_info(repo: Repo, number: int) -> dict[str, object]:
    pull = repo.pulls[number]
    facts = {"title": pull["title"], "num": number, "author": {"name": pull["user"]}, "createdAt": DATE}
    details = {"events": [], "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}, "diff": ""}
    kind = {"status": pull["status"], "isPullRequest": True, "repo": {"name": repo.id, "type": "model"}}
    return facts | kind | details


@_route("GET POST", "/api/models/{id}/discussions")
def _discussions(h: _Handler, id: str) -> Reply:  # noqa: A002 - the route's group
    repo = h.repo(id)
    if h.command == "POST":
        user, role = h.user()
        if user is None or role != "write":
            raise Refusal(403, "This token may not open pull requests")
        return Reply({"num": repo.open_pull(h.json()["title"], user, repo.commit("main").oid)})
    pulls = [_pull_info(repo, n) for n in reversed(repo.pulls)]
    return Reply({"discussions": pulls, "count": len(pulls), "start": 0})


@_route("GET", r"/api/models/{id}/discussions/(?P<number>\d+)")
def _discussion(h: _Handler, id: str, number: str) -> Reply:  # noqa: A002 - the route's group
    return Reply(_pull_info(h.repo(id), int(number)))


# Uploading


@_route("POST", "/api/validate-yaml")
def _validate_yaml(h: _Handler) -> Reply:
    front = re.match(r"---\n(.*?)\n---", h.json()["content"], re.DOTALL)
    try:
        parsed = yaml.safe_load(front[1]) if front else {}
    except yaml.YAMLError as error:
        return Reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
    relations = {"adapter", "merge", "finetune", "quantized", None}
    if not isinstance(parsed, dict) or parsed.get("base_model_relation") not in relations:
        return Reply({"errors": [{"message": "bad metadata"}], "warnings": []}, 400)
    return Reply({"errors": [], "warnings": []})


def _writable(h: _Handler, name: str) -> Repo:
    """Whoever may read a public repository may propose changes to it."""
    if not h.query.get("create_pr"):
        return h.repo(name, write=True)
    if h.user()[1] != "write":
        raise Refusal(403, "This token may not open pull requests")
    return h.repo(name)


@_route("POST", "/api/models/{id}/preupload/{rev}")
def _preupload(h: _Handler, id: str, rev: str) -> Reply:  # noqa: A002 - the route's group
    commit = _writable(h, id).commit(rev)
    files: list[dict[str, object]] = []
    for asked in h.json()["files"]:
        lfs = is_lfs(asked["path"], base64.b64decode(asked["sample"]), asked["size"])
        file = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        old = commit.files.get(asked["path"])
        files.append(file | ({"oid": old.key} if old else {}))
    return Reply({"commitOid": commit.oid, "files": files})


@_route("GET", "/api/models/{id}/xet-(?P<kind>write|read)-token/{rev}")
def _xet_token(h: _Handler, id: str, kind: str, rev: str) -> Reply:  # noqa: A002, ARG001 - the route's groups
    if kind == "write":
        _writable(h, id)
        storage = h.hub.xet.new_storage()
    else:
        h.repo(id, content=True)
        storage = h.hub.xet.clone(h.hub.xet.published)
    token, expiry, url = "xet-token", int(time.time()) + 3600, f"local://{storage}"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expiry), "X-Xet-Cas-Url": url}
    return Reply({"accessToken": token, "exp": expiry, "casUrl": url}, headers=headers)


@_route("POST", r"/{id}\.git/info/lfs/objects/batch")
def _batch(h: _Handler, id: str) -> Reply:  # noqa: A002 - the route's group
    h.repo(id)
    if h.user()[1] != "write":
        raise Refusal(403, "This token may not upload")
    answers = []
    for asked in h.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        upload: dict[str, Any] = {"href": f"{h.hub.cdn}/upload/{oid}"}
        if size > h.hub.multipart_over:
            parts = range(1, -(-size // h.hub.part_size) + 1)
            urls = {str(n): f"{h.hub.cdn}/part/{oid}/{n}" for n in parts}
            upload |= {"href": f"{h.hub.cdn}/complete/{oid}", "header": {"chunk_size": str(h.hub.part_size), **urls}}
        actions = {"upload": upload, "verify": {"href": h.hub.verify_at or f"{h.hub.url}/{id}.git/info/lfs/verify"}}
        answers.append({"oid": oid, "size": size} | ({} if h.hub.objects.has(oid) else {"actions": actions}))
    return Reply({"transfer": "basic", "objects": answers})


@_route("POST", r"/{id}\.git/info/lfs/verify")
def _verify(h: _Handler, id: str) -> Reply:  # noqa: A002 - the route's group
    h.repo(id)
    asked = h.json()
    stored = h.hub.objects.path(asked["oid"])
    if not stored.is_file() or stored.stat().st_size != asked["size"]:
        raise Refusal(404, "Object does not exist")
    return Reply({})


@_route("POST", "/api/models/{id}/commit/{rev}")
def _commit(h: _Handler, id: str, rev: str) -> Reply:  # noqa: A002 - the route's group
    repo, as_pull = _writable(h, id), bool(h.query.get("create_pr"))
    user, _ = h.user()
    assert user is not None
    lines = [json.loads(line) for line in h.read().splitlines()]
    header = lines[0]["value"]
    operations = [(line["key"], line["value"]) for line in lines[1:]]
    with repo.lock:
        head = repo.commit(header.get("parentCommit", rev) if as_pull else rev)
        if not head.oid.startswith(header.get("parentCommit", "")):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        entries = dict(head.files)
        for oid in [v["oid"] for k, v in operations if k == "lfsFile" and not h.hub.objects.has(v["oid"])]:
            h.hub.xet.take(oid, h.hub.objects.path(oid))
        apply_operations(entries, operations, h.hub.objects)
        if h.hub.xet_downloads:
            entries = {p: _offer(h.hub, e) for p, e in entries.items()}
        number = repo.open_pull(header["summary"], user, head.oid) if as_pull else None
        ref = f"refs/pr/{number}" if number else repo.ref(rev)
        commit = repo.add_commit(ref, entries, header["summary"], header.get("description", ""), user)
    made = {"success": True, "commitOid": commit.oid, "commitUrl": f"{h.hub.url}/{id}/commit/{commit.oid}"}
    pull = {"pullRequestUrl": f"{h.hub.url}/{id}/discussions/{number}"} if number else {}
    return Reply(made | {"hookOutput": ""} | pull)


def _offer(hub: Hub, entry: Entry) -> Entry:
    if entry.sha256 is None or entry.xet_hash:
        return entry
    return with_xet(entry, hub.xet.publish(hub.objects.path(entry.sha256), entry.sha256))


# The CDN: no accounts, and a token is an error


@_route("PUT", "/upload/(?P<oid>[0-9a-f]{64})", "cdn")
def _upload(h: _Handler, oid: str) -> Reply:
    h.hub.objects.receive(iter(lambda: h.read(1 << 20), b""), oid)
    return Reply()


@_route("PUT", r"/part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", "cdn")
def _part(h: _Handler, oid: str, number: str) -> Reply:
    h.hub.objects.path(f"{oid}.{number}").write_bytes(h.read())
    return Reply(headers={"ETag": f'"part-{number}"'})


@_route("POST", "/complete/(?P<oid>[0-9a-f]{64})", "cdn")
def _complete(h: _Handler, oid: str) -> Reply:
    numbers = [p["partNumber"] for p in h.json()["parts"]]
    h.hub.objects.receive((h.hub.objects.path(f"{oid}.{n}").read_bytes() for n in numbers), oid)
    return Reply({})


@_route("GET HEAD", "/objects/(?P<oid>[0-9a-f]{64})", "cdn")
def _object(h: _Handler, oid: str) -> Reply:
    return _file(h, h.hub.objects.path(oid), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def main() -> None:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="the hub's port (default: a free one)")
    parser.add_argument("--xet-downloads", action="store_true", help="offer files over Xet too")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        Hub(Path(folder), xet_downloads=options.xet_downloads, port=options.port) as hub,
        suppress(KeyboardInterrupt),
    ):
        sys.stdout.write(f"export HF_ENDPOINT={hub.url} HF_TOKEN=hf_alice   # or {', '.join(hub.tokens)}\n")
        sys.stdout.flush()
        threading.Event().wait()


if __name__ == "__main__":
    main()
