"""Names: of repositories, as the command line takes them, and of files that may go to a Hub or come from one."""

from __future__ import annotations

import os
import re
import unicodedata
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from prolora_tools.errors import InputError, RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable

SCHEME = "hf://"
_SEGMENT = r"[A-Za-z0-9](?:[\w.-]{0,94}[\w])?"
_REPO = re.compile(rf"(?P<id>(?:{_SEGMENT}/)?{_SEGMENT})(?:@(?P<revision>[\w./-]+))?", re.ASCII)
SHA1 = re.compile("[0-9a-f]{40}")
SHA256 = re.compile("[0-9a-f]{64}")

FILES = (
    "adapter_config.json", "config.json", "generation_config.json", "*.safetensors", "model.safetensors.index.json",
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "vocab.bpe", "merges.txt", "spiece.model", "sentencepiece*.model", "source.spm", "target.spm",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "*_Pooling/config.json",
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "USE_POLICY.md",
)  # fmt: skip
"""The files of an adapter or a model: what is pushed and pulled, as globs. Everything else stays where it is."""

_OTHER_COPIES = ("consolidated", "optimizer")
"""Beginnings of safetensors files that are no part of a transformers model."""
ADAPTER_PICKLE = "adapter_model.bin"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy")
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class RepoName:
    """A repository on the Hub, at a revision or (None) at its main branch."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    @classmethod
    def match(cls, text: str) -> RepoName | None:
        """Read `owner/name[@revision]` or `hf://owner/name[@revision]`; None if `text` is neither."""
        found = _REPO.fullmatch(text.removeprefix(SCHEME))
        if not found or "/" not in found["id"] or ".." in text or "--" in found["id"]:
            return None
        return cls(found["id"], found["revision"])

    @classmethod
    def parse(cls, text: str, *, bare: bool = False) -> RepoName:
        """Like `match`, but `text` must be one.

        Args:
            text: what the user gave.
            bare: allow `name` without an owner.

        Raises:
            RequestError: it is no such name.
        """
        found = cls.match(text)
        if found is None and bare and (name := re.fullmatch(_SEGMENT, text, re.ASCII)) and ".." not in text:
            found = cls(name[0])
        if found is None:
            raise RequestError(
                "hub-name",
                f"{text!r} is not the name of a repository on the Hub",
                hint="write it as owner/name, owner/name@revision or hf://owner/name@revision",
            )
        return found


def on_hub(given: str | Path) -> RepoName | None:
    """The repository that `given` names; None for a path. A local folder of that name wins, `hf://` is the Hub's.

    Raises:
        RequestError: `hf://` is followed by no repository's name.
    """
    text = str(given)
    if text.startswith(SCHEME):
        return RepoName.parse(text)
    name = None if isinstance(given, Path) else RepoName.match(text)
    return None if name is None or os.path.lexists(text) else name


def is_ours(path: str) -> bool:
    """Whether a file of a repository or folder is one that is pushed and pulled."""
    if any(part.startswith(".") for part in path.split("/")) or path.startswith(_OTHER_COPIES):
        return False
    return any(fnmatchcase(path, glob) and path.count("/") == glob.count("/") for glob in FILES)


def why_not(path: str) -> str:
    """In a word, why a file is left where it is."""
    suffix = path[path.rfind(".") :].lower() if "." in path else ""
    if suffix in _PICKLES:
        return "pickle"
    if suffix in {".py", ".so", ".dll", ".sh", ".exe", ".ipynb"}:
        return "code"
    return "hidden" if any(part.startswith(".") for part in path.split("/")) else "no part of an adapter or model"


def check_paths(paths: Iterable[str], where: str) -> None:
    """Refuse a listing with names that no honest repository has, or that are not safe on every file system.

    Raises:
        InputError: a name is absolute, climbs, lies in .git, holds control characters or backslashes, is reserved
            somewhere, is too long, or collides with another where case or Unicode form does not count.
    """
    seen: dict[str, str] = {}
    for path in paths:
        if trouble := _trouble(path):
            raise InputError(
                "hub-path-unsafe",
                f"{where} lists the file {path!r}: {trouble}",
                hint="do not trust this repository; nothing was downloaded",
            )
        parts = path.split("/")
        for i in range(1, len(parts) + 1):
            prefix = "/".join(parts[:i])
            mark = "" if i == len(parts) else "/"  # a file and a folder of one name collide too
            key = unicodedata.normalize("NFKC", prefix).casefold()
            other = seen.setdefault(key, prefix + mark)
            if other != prefix + mark:
                raise InputError(
                    "hub-path-collision",
                    f"{where} lists {other!r} and {prefix + mark!r}, which are one file on some file systems",
                    hint="ask the repository's owner to rename one; nothing was downloaded",
                )


def _trouble(path: str) -> str | None:
    """What is wrong with a path, if anything."""
    parts = path.split("/")
    in_git = any(part.casefold().rstrip(". ") == ".git" or part.lower().startswith("git~") for part in parts)
    reserved = any(_RESERVED.fullmatch(p) or p.endswith((".", " ")) or set(p) & set('<>:"|?*') for p in parts)
    found = {
        "it holds control characters": any(unicodedata.category(c) in _UNPRINTABLE for c in path),
        "it is an absolute, drive or network path": path.startswith("/") or bool(re.search(r"\\|^[A-Za-z]:", path)),
        "it has an empty or climbing segment": bool({"", ".", ".."} & set(parts)),
        "it lies in a .git folder": in_git,
        "it is reserved on some systems": reserved,
        "it is too long": len(path) > 1024 or any(len(p.encode(errors="replace")) > 255 for p in parts),
    }
    return next((trouble for trouble, holds in found.items() if holds), None)
