"""From a folder to the Hub: one commit that holds exactly the folder, or none.

A commit whose answer is lost may have been made, and one that another push overtook is refused (412). Either way the
branch is looked at again: if the commit is there it is the result, otherwise it is made on top of the new head.
"""

from __future__ import annotations

import glob
import random
import stat
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from prolora_tools.errors import InputError, MismatchError, ProloraError, RequestError
from prolora_tools.files.adapter import SAFETENSORS, Adapter
from prolora_tools.files.checkpoint import INDEX, Checkpoint, require_folder
from prolora_tools.files.tensors import reading
from prolora_tools.hub import card, client
from prolora_tools.hub.listing import Digest, RemoteFile, read_digest
from prolora_tools.hub.names import RepoName, is_ours, why_not
from prolora_tools.hub.reports import HubFile, PushReport
from prolora_tools.operations.stats import stats
from prolora_tools.progress import SILENT, Progress

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from huggingface_hub import CommitInfo, HfApi

LARGE_FILES, LARGE_BYTES = 200, 50_000_000_000
"""From here on a folder goes through the client's large-folder path, which commits in steps and resumes."""

_TRIES = 12
_CARD = "README.md"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class _LocalFile:
    """A file to send: on disk, or (a model card that was completed) in memory."""

    path: Path | bytes
    digest: Digest

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.digest.size

    def operation(self, name: str) -> CommitOperationAdd:
        """The client's view of it."""
        return CommitOperationAdd(name, self.path)


@dataclass(frozen=True)
class _Target:
    """Where a push goes. `branch` is None for a pull request, which starts at main."""

    name: RepoName
    branch: str | None
    title: str
    description: str | None

    @property
    def base(self) -> str:
        """The revision a commit goes on top of."""
        return self.branch or constants.DEFAULT_REVISION


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
    license: str | None = None,  # noqa: A002 - the option's name
    dry_run: bool = False,
    progress: Progress = SILENT,
    progress_bars: bool = False,
) -> PushReport:
    """Upload a LoRA, PRoLoRA or merged-model folder, with a model card.

    Args:
        folder: the folder; this package must be able to open it.
        repo: `owner/name`, or `name` for one's own; made if it is missing.
        private: make it private; refused for a repository that is public.
        revision: branch to commit to, made from main if it is missing.
        create_pr: open a pull request instead.
        commit_message: title of the commit or pull request.
        commit_description: its text.
        license: the license to put in the model card, as the Hub spells it.
        dry_run: compare and report, send nothing.
        progress: told of bytes hashed before the upload.
        progress_bars: let the client show its uploads.

    Raises:
        RequestError: a wrong name or combination, or no access token.
        InputError: the folder is not sound, or the Hub refuses or cannot be reached.
        MismatchError: `private` for a public repository.
        UnsupportedError: a kind of adapter or model that is refused.
    """
    name = RepoName.parse(repo, bare=True)
    if name.revision and revision:
        raise RequestError("push-revision-twice", f"{repo} and {revision!r} both name a branch", hint="give one")
    revision = revision or name.revision
    if create_pr and revision not in {None, constants.DEFAULT_REVISION}:
        raise RequestError(
            "push-pr-revision", "a pull request goes to main", hint="leave out --revision, or leave out --create-pr"
        )
    local, skipped, config = _collect(Path(folder), progress)
    if not dry_run:
        client.require_token()
    hub = client.api(progress_bars=progress_bars)
    with client.talking(name):
        if "/" not in name.id:
            client.require_token()
            name = RepoName(f"{hub.whoami()['name']}/{name.id}")
    target = _Target(
        RepoName(name.id, revision),
        None if create_pr else revision or constants.DEFAULT_REVISION,
        (commit_message or "").strip() or f"Upload {_kind(config)}",
        commit_description,
    )
    with client.talking(target.name):
        return _Push(hub, target, Path(folder), local, config, license_id=license, private=private).run(
            skipped, dry_run=dry_run
        )


def _kind(config: Mapping[str, Any]) -> str:
    return {"PROLORA": "PRoLoRA adapter", "LORA": "LoRA adapter"}.get(str(config.get("peft_type")), "merged model")


def _collect(folder: Path, progress: Progress) -> tuple[dict[str, _LocalFile], tuple[str, ...], dict[str, Any]]:
    """Open the folder with our own reader and hash the files that go.

    Returns:
        The files by name, what is left out and why, and the config.
    """
    require_folder(folder)
    if (folder / "adapter_config.json").is_file():
        adapter = Adapter.open(folder)
        weights, config = {adapter.file.name}, adapter.config.raw
        if adapter.file.name != SAFETENSORS:
            raise InputError(
                "push-pickle",
                f"{folder} has its weights in {adapter.file.name}, a pickle, which others should not have to trust",
                hint=f"prolora-tools expand {folder} -o OUT writes the same adapter as safetensors",
            )
    else:
        checkpoint = Checkpoint.open(folder)
        weights = {*checkpoint.shards, INDEX} if (folder / INDEX).is_file() else set(checkpoint.shards)
        config = checkpoint.config
    root, names, skipped = folder.resolve(), [], []
    for path in sorted(p for p in [*folder.iterdir(), *folder.glob("*/*")] if not p.is_dir()):
        name = path.relative_to(folder).as_posix()
        wanted = name in weights if name.endswith((".safetensors", INDEX)) else is_ours(name)
        if not wanted:
            skipped.append(f"{name} ({why_not(name)})")
            continue
        _require_inside(path, root)
        names.append(name)
    progress.start("hash", sum((folder / n).stat().st_size for n in names), "bytes")
    files = {}
    for name in names:
        with reading(folder / name):
            files[name] = _LocalFile((folder / name).resolve(), read_digest(folder / name, progress))
    return files, tuple(skipped), dict(config)


def _require_inside(path: Path, root: Path) -> None:
    real = path.resolve()
    with reading(path):
        regular = stat.S_ISREG(real.stat().st_mode)
    if root not in real.parents or not regular:
        raise InputError(
            "push-outside",
            f"{path} leads to {real}, which is no regular file in {root}",
            hint="copy the folder with its links resolved: cp -rL FOLDER COPY",
        )


class _Push:
    """One push, from looking at the repository to the commit that holds the folder."""

    def __init__(
        self,
        hub: HfApi,
        target: _Target,
        folder: Path,
        local: dict[str, _LocalFile],
        config: dict[str, Any],
        *,
        license_id: str | None,
        private: bool,
    ) -> None:
        self.hub, self.target, self.folder, self.local, self.config = hub, target, folder, local, config
        self.license_id, self.private = license_id, private
        self.id = target.name.id
        self.notes: list[str] = []

    def run(self, skipped: tuple[str, ...], *, dry_run: bool) -> PushReport:
        """Push, or tell what a push would do."""
        given_card = _CARD in self.local
        if given_card:  # before anything is made on the Hub: it may not be readable
            self.complete_card(None)
        private = self.visibility()
        created = private is None
        if created and not dry_run:
            private = self.create()
        head = self.head(create_branch=not dry_run and not created) if private is not None else None
        if not given_card:
            self.complete_card(head)
        remote = self.remote_files(head)
        files = self.changes(remote)
        unchanged = all(f.change == "unchanged" for f in files)
        commit, url, reference = head if unchanged else None, f"{constants.ENDPOINT}/{self.id}", self.target.base
        if unchanged:
            url = f"{url}/commit/{head}"
        elif not dry_run:
            assert head is not None
            commit, url, reference, unchanged = self.send(head)
        return PushReport(
            folder=str(self.folder),
            repo=self.id,
            revision=reference,
            commit=commit,
            url=url,
            created=created,
            private=self.private if private is None else private,
            unchanged=unchanged,
            dry_run=dry_run,
            bytes=sum(f.size for f in self.local.values()),
            files=tuple(files),
            skipped=skipped,
            notes=tuple(self.notes),
        )

    def visibility(self) -> bool | None:
        """Whether the repository is private; None if it is missing."""
        try:
            private = bool(self.hub.model_info(self.id).private)
        except RepositoryNotFoundError as error:
            if error.response.status_code != 404:
                raise
            return None
        if self.private and not private:
            raise MismatchError(
                "push-public",
                f"{self.id} is public already, and --private would not change that",
                hint="make it private in its settings on the Hub first, or leave out --private",
            )
        return private

    def create(self) -> bool:
        """Make the repository. Returns whether it is private, whoever made it first."""
        if self.target.branch is None:
            raise InputError(
                "push-pr-missing",
                f"there is no repository {self.id} to open a pull request in",
                hint="check the name, or leave out --create-pr to make it",
            )
        self.hub.create_repo(self.id, private=self.private or None, exist_ok=True)
        private = self.visibility()
        assert private is not None
        if self.target.base != constants.DEFAULT_REVISION:
            self.hub.create_branch(self.id, branch=self.target.base, exist_ok=True)
        return private

    def head(self, *, create_branch: bool) -> str | None:
        """The commit the branch is at, or will start from; None where there is no main either."""
        refs = self.hub.list_repo_refs(self.id, include_pull_requests=True)
        found = {b.name: b.target_commit for b in refs.branches}
        found |= {r.ref: r.target_commit for r in refs.pull_requests or []}
        if self.target.base in found:
            return found[self.target.base]
        if self.target.base.startswith("refs/") or self.target.base in {t.name for t in refs.tags}:
            raise InputError(
                "push-no-branch",
                f"{self.target.base} of {self.id} is no branch to commit to",
                hint=f"give --revision one of {', '.join(sorted(found))}, or a new name",
            )
        if not create_branch:
            return found.get(constants.DEFAULT_REVISION)
        self.hub.create_branch(self.id, branch=self.target.base, exist_ok=True)
        return self.head(create_branch=False)

    def remote_files(self, commit: str | None) -> dict[str, RemoteFile]:
        """The folder's files, and weights of its kind, as a commit has them."""
        if commit is None:
            return {}
        entries = self.hub.list_repo_tree(self.id, revision=commit)
        tops = {n.split("/")[0] for n in self.local if "/" in n}
        nested = [n for n in self.local if n.split("/")[0] in tops]
        found = [e for e in entries if isinstance(e, RepoFile)]
        if nested:
            found += [e for e in self.hub.get_paths_info(self.id, nested, revision=commit) if isinstance(e, RepoFile)]
        return {f.path: RemoteFile(f.path, f.size, f.blob_id, f.lfs.sha256 if f.lfs else None) for f in found}

    def changes(self, remote: Mapping[str, RemoteFile]) -> list[HubFile]:
        """What a commit on top of `remote` has to do."""
        files = []
        for name, file in sorted(self.local.items()):
            same = name in remote and file.digest.is_of(remote[name])
            change = "unchanged" if same else "changed" if name in remote else "added"
            files.append(HubFile(name, file.size, file.digest.sha256, change))
        replaced = [f for n, f in sorted(remote.items()) if n not in self.local and self.replaces(n)]
        return files + [HubFile(f.path, f.size, f.sha256, "removed") for f in replaced]

    def replaces(self, name: str) -> bool:
        """Whether a file is weights of the pushed kind: left beside new ones, readers would take the wrong ones."""
        if "peft_type" in self.config:
            return name in _ADAPTER_WEIGHTS
        model = name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin"))
        return "/" not in name and (model or name in {INDEX, "pytorch_model.bin.index.json"})

    def complete_card(self, head: str | None) -> None:
        """Put a model card among the files: the folder's or the Hub's with what it lacks, or a new one."""
        base = card.hub_id(self.config.get("base_model_name_or_path"))
        wanted = card.metadata(self.config, base=base, license_id=self.license_id)
        given = self.local.get(_CARD)
        try:
            old = given.path.read_text("utf-8") if given and isinstance(given.path, Path) else self.remote_card(head)
            text = self.new_card() if old is None else card.completed(old, wanted, license_id=self.license_id)
        except ValueError as error:  # UnicodeDecodeError is one
            raise InputError(
                "push-card", f"{_CARD} has metadata that cannot be read: {error}", hint=f"repair the top of {_CARD}"
            ) from error
        data = text.replace(card.PLACEHOLDER, self.id).encode()
        if not given or old is None or data != old.encode():
            digest = Digest(len(data))
            digest.update(data)
            self.local[_CARD] = _LocalFile(data, digest)
        if base is None and "peft_type" in self.config:
            named = self.config.get("base_model_name_or_path")
            self.notes.append(f"the model card names no base model: {named!r} is not the name of one on the Hub")

    def remote_card(self, head: str | None) -> str | None:
        """The Hub's README.md, None without one."""
        if head is None or not self.hub.file_exists(self.id, _CARD, revision=head):
            return None
        with tempfile.TemporaryDirectory() as cache:
            return Path(self.hub.hf_hub_download(self.id, _CARD, revision=head, cache_dir=cache)).read_text("utf-8")

    def new_card(self) -> str:
        """A card for a folder without one; how the model was made is not known here."""
        if "peft_type" in self.config:
            report = stats(self.folder).to_json()
        else:
            model = Checkpoint.open(self.folder)
            report = {"parameters": model.parameters, "bytes": model.n_bytes}
        return card.render(report, self.config, license_id=self.license_id, repo=self.id)

    def send(self, first: str) -> tuple[str, str, str, bool]:
        """Commit on top of the branch until that has worked.

        Returns:
            The commit, its (or the pull request's) URL, its branch, and whether it was there before.
        """
        if self.target.branch is None and (there := self.find_pull()):
            return (*there, True)
        head, overtaken = first, 0
        while True:
            changes = self.changes(self.remote_files(head))
            if all(f.change == "unchanged" for f in changes):  # another push of the same has overtaken this one
                return head, f"{constants.ENDPOINT}/{self.id}/commit/{head}", self.target.base, True
            try:
                made = self.commit(head, changes)
            except client.TransportError as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
                if status not in {0, 412} and status < 500:
                    raise
                if there := self.find(first):
                    return (*there, False)
                overtaken += 1
                if overtaken > (_TRIES if status == 412 else 2):
                    raise self.not_landed(error) from error
                time.sleep(random.uniform(0.1, 0.5) * min(overtaken, 4))  # noqa: S311 - to get out of step
                latest = self.head(create_branch=False)
                assert latest is not None
                head = latest
                continue
            except (RuntimeError, ValueError, OSError) as error:  # what the client wraps storage errors in
                raise self.not_landed(error) from error
            self.check_landed(made.oid)
            reference = made.pr_revision if self.target.branch is None else self.target.branch
            return made.oid, made.pr_url or made.commit_url, reference or self.target.base, False

    def commit(self, head: str, files: list[HubFile]) -> CommitInfo:
        """Send what differs from `head`, as one commit on top of it."""
        changed = {f.name for f in files if f.change in {"added", "changed"}}
        gone = [f.name for f in files if f.change == "removed"]
        common: dict[str, Any] = {
            "commit_message": self.target.title,
            "commit_description": self.target.description,
            "revision": self.target.base,
            "create_pr": self.target.branch is None,
            "parent_commit": head,
        }
        if len(self.local) > LARGE_FILES or sum(f.size for f in self.local.values()) > LARGE_BYTES:
            return self.commit_large(changed, gone, common)
        operations: list[Any] = [CommitOperationDelete(name, is_folder=False) for name in gone]
        operations += [self.local[name].operation(name) for name in sorted(changed)]
        made: CommitInfo = self.hub.create_commit(self.id, operations, **common)
        return made

    def commit_large(self, changed: Iterable[str], gone: list[str], common: dict[str, Any]) -> CommitInfo:
        """The client's large-folder path, over a folder of links to just the files that go."""
        with tempfile.TemporaryDirectory() as links:
            for name in changed:
                link, source = Path(links, name), self.local[name].path
                link.parent.mkdir(exist_ok=True)
                if isinstance(source, bytes):
                    link.write_bytes(source)
                else:
                    link.symlink_to(source)
            patterns = [glob.escape(name) for name in gone]
            made: CommitInfo = self.hub.upload_folder(
                repo_id=self.id, folder_path=links, delete_patterns=patterns or None, **common
            )
            return made

    def holds_all(self, commit: str) -> bool:
        """Whether a commit has exactly our files, and no other weights."""
        return all(f.change == "unchanged" for f in self.changes(self.remote_files(commit)))

    def find(self, first: str) -> tuple[str, str, str] | None:
        """Our commit, if it was made after `first` although no answer came."""
        if self.target.branch is None:
            return self.find_pull()
        for made in self.hub.list_repo_commits(self.id, revision=self.target.base):
            if made.commit_id == first:
                break
            if made.title == self.target.title and self.holds_all(made.commit_id):
                return made.commit_id, f"{constants.ENDPOINT}/{self.id}/commit/{made.commit_id}", self.target.base
        return None

    def find_pull(self) -> tuple[str, str, str] | None:
        """An open pull request of ours with this title that holds the folder."""
        heads = {
            r.ref: r.target_commit
            for r in self.hub.list_repo_refs(self.id, include_pull_requests=True).pull_requests or []
        }
        me = self.hub.whoami()["name"]
        for pull in self.hub.get_repo_discussions(self.id, author=me, discussion_type="pull_request"):
            reference = f"refs/pr/{pull.num}"
            ours = pull.title == self.target.title and pull.status in {"open", "draft"} and reference in heads
            if ours and self.holds_all(heads[reference]):
                return heads[reference], f"{constants.ENDPOINT}/{self.id}/discussions/{pull.num}", reference
        return None

    def check_landed(self, commit: str) -> None:
        """Compare what the Hub lists at a new commit with what was hashed before it was sent."""
        wrong = [f.name for f in self.changes(self.remote_files(commit)) if f.change != "unchanged"]
        if wrong:
            raise InputError(
                "push-changed",
                f"{self.id} at commit {commit} holds other bytes of {wrong[0]} than {self.folder} had",
                hint="the folder changed while it was sent; run the command again",
            )

    def not_landed(self, error: Exception) -> ProloraError:
        """Nothing was committed; what was stored already is not sent again."""
        return InputError(
            "push-failed",
            f"{self.id}: the upload did not go through, no commit was made: {client.line(error)}",
            hint="run the same command again; it goes on where this one stopped",
        )
