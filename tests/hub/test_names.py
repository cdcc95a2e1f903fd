"""Names of repositories and of files, without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prolora_tools.errors import InputError, RequestError
from prolora_tools.hub.names import RepoName, check_paths, is_ours

UNSAFE = (
    "../evil", "a/../../evil", "a/..", ".", "/etc/evil", "C:\\evil", "C:evil", "\\\\server\\share\\evil", "..\\evil",
    ".git/config", "sub/.GIT/config", ".git /config", "git~1/config", "evil\n", "evil\0", "evil\u202etxt", "\u200bx",
    "con", "aux.json", "sub/COM1.txt", "trailing.", "trailing ", "a//b", "", "x" * 300, "é" * 200, "a/" * 600 + "b",
    "a:b", "a?b",
)  # fmt: skip
COLLIDING = (
    ("config.json", "CONFIG.json"), ("config.json", "config.json/x"), ("a/x", "A/y"), ("\u00e9.txt", "e\u0301.txt"),
    ("stra\u00dfe.txt", "STRASSE.txt"), ("\ufb01le.txt", "file.txt"),
)  # fmt: skip
FINE = ("config.json", "a/b/c.txt", ".gitattributes", ".github/x.yml", "model-00001-of-00002.safetensors", "é b.txt")


@pytest.mark.parametrize("path", UNSAFE, ids=repr)
def test_unsafe_paths_are_refused(path: str) -> None:
    with pytest.raises(InputError) as caught:
        check_paths(["config.json", path], "x/y")
    assert caught.value.code == "hub-path-unsafe"


@pytest.mark.parametrize("paths", COLLIDING, ids=repr)
def test_colliding_paths_are_refused(paths: tuple[str, str]) -> None:
    for order in (paths, paths[::-1]):
        with pytest.raises(InputError) as caught:
            check_paths(order, "x/y")
        assert caught.value.code == "hub-path-collision"


def test_ordinary_paths_pass() -> None:
    check_paths(FINE, "x/y")


@given(st.text(st.sampled_from("ab./\\:\0\nG g"), max_size=12))
def test_a_path_that_passes_stays_inside(path: str) -> None:
    try:
        check_paths([path], "x/y")
    except InputError:
        return
    parts = path.split("/")
    assert all(p not in {"", ".", ".."} and not set(p) & set("\\:\0\n") for p in parts)


OURS = {
    "adapter_model.safetensors": True, "model-00001-of-00002.safetensors": True, "tokenizer.json": True,
    "additional_chat_templates/tool.jinja": True, "1_Pooling/config.json": True, "README.md": True,
    ".env": False, "adapter_model.bin": False, "sub/model.safetensors": False, "train.py": False,
    "consolidated.safetensors": False, ".x_Pooling/config.json": False, "credentials.json": False,
    "additional_chat_templates/a/b.jinja": False, ".safetensors": False,
}  # fmt: skip


@pytest.mark.parametrize("path", OURS)
def test_what_is_pushed_and_pulled(path: str) -> None:
    assert is_ours(path) == OURS[path]


def test_repository_names() -> None:
    assert RepoName.match("a/b") == RepoName("a/b")
    assert RepoName.match("hf://a/b@v1.0") == RepoName("a/b", "v1.0")
    assert RepoName.match("a/b@feature/x") == RepoName("a/b", "feature/x")
    assert RepoName.parse("b", bare=True) == RepoName("b")
    for text in (
        "b",
        "./a/b",
        "/a/b",
        "a/b/c",
        "a/b@",
        "a/..",
        "a/b@../x",
        "-a/b",
        "a/b.git/..",
        "a b/c",
        "hf://",
        "~/a",
    ):
        assert RepoName.match(text) is None, text
        with pytest.raises(RequestError):
            RepoName.parse(text)
