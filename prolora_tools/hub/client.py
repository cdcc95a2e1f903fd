"""Talking to a Hub through huggingface_hub: where the token may go, and what the client's errors mean.

The token comes from the environment or the client's login, never from an argument, and is never shown.
"""

from __future__ import annotations

import ipaddress
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import _http
from huggingface_hub.utils.tqdm import disable_progress_bars

from prolora_tools.errors import InputError, ProloraError, RequestError
from prolora_tools.hub.names import SHA1, SHA256

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prolora_tools.hub.names import RepoName

TransportError: type[Exception] = errors.HfHubHTTPError.__bases__[0]
"""The HTTPError of whichever HTTP library this huggingface_hub is built on; HfHubHTTPError is one too."""

_LOCK = threading.Lock()
_GUARDED = "_prolora_tools_guarded"


def api(*, progress_bars: bool = False) -> huggingface_hub.HfApi:
    """The client, made safe.

    Args:
        progress_bars: let the client draw its own.

    Raises:
        RequestError: the token would go over the network in the clear.
    """
    _require_private_wire()
    _guard_sessions()
    if not progress_bars:
        disable_progress_bars()
    return huggingface_hub.HfApi(library_name="prolora-tools")


def offline() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    return bool(constants.HF_HUB_OFFLINE)


def require_token() -> None:
    """Raises RequestError unless there is a token."""
    if not huggingface_hub.get_token():
        raise RequestError(
            "hub-no-token",
            "there is no access token for the Hub",
            hint="run `hf auth login`, or set HF_TOKEN to a token with write access",
        )


def _require_private_wire() -> None:
    url = urlsplit(constants.ENDPOINT)
    host = url.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if url.scheme != "https" and not loopback and huggingface_hub.get_token():
        raise RequestError(
            "hub-endpoint-clear",
            f"HF_ENDPOINT is {constants.ENDPOINT}, and the token would travel there in the clear",
            hint="set HF_ENDPOINT to an https:// address, or unset the token (HF_TOKEN, `hf auth logout`)",
        )


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _keep_token_home(request: Any) -> None:
    """Every request, redirects included: drop the token unless it goes to the Hub itself."""
    if _origin(str(request.url)) != _origin(constants.ENDPOINT):
        request.headers.pop("authorization", None)


def _check_file_answer(response: Any) -> None:
    """The client names cache files by these headers, and asks for storage tokens where they say."""
    headers = response.headers
    if response.is_error or "x-repo-commit" not in headers:
        return
    etag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
    token_url = (
        response.links.get("xet-auth", {}).get("url") or headers.get("x-xet-refresh-route") or constants.ENDPOINT
    )
    ours = {_origin(constants.ENDPOINT), _origin(constants.HUGGINGFACE_CO_URL_HOME)}  # the client maps home to ENDPOINT
    if (
        not SHA1.fullmatch(headers["x-repo-commit"])
        or not (SHA1.fullmatch(etag) or SHA256.fullmatch(etag))
        or _origin(urljoin(str(response.url), token_url)) not in ours
    ):
        raise InputError(
            "hub-headers-unsafe",
            f"{response.url} answers with a commit, an ETag or a token address that no Hub gives",
            hint="do not trust this Hub or proxy; nothing was kept",
        )


def _guard_sessions() -> None:
    """Have every HTTP session of the client checked, those it makes anew after an error too. Done once."""
    with _LOCK:
        previous = _http._GLOBAL_CLIENT_FACTORY  # noqa: SLF001 - a user's own factory (proxies, certificates) is kept
        if getattr(previous, _GUARDED, False):
            return

        def guarded() -> Any:
            session = previous()
            hooks = session.event_hooks
            session.event_hooks = {
                "request": [*hooks["request"], _keep_token_home],
                "response": [*hooks["response"], _check_file_answer],
            }
            return session

        setattr(guarded, _GUARDED, True)
        huggingface_hub.set_client_factory(guarded)


@contextmanager
def talking(repo: RepoName) -> Iterator[None]:
    """Turn the client's errors into ours: one line, and what to do about it.

    Raises:
        InputError: the repository, revision, file or right is missing, or the Hub cannot be reached.
    """
    try:
        yield
    except ProloraError:
        raise
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise _explain(error, repo) from error
    except errors.HFValidationError as error:
        raise RequestError("hub-name-refused", f"{repo}: {line(error)}", hint="check the name") from error
    except (ValueError, KeyError) as error:
        raise InputError(
            "hub-answer-malformed",
            f"{constants.ENDPOINT} gives an answer that is not a Hub's: {type(error).__name__}: {line(error)}",
            hint="check HF_ENDPOINT, and whether a proxy or a login page stands between",
        ) from error
    except TransportError as error:
        raise InputError(
            "hub-unreachable",
            f"{constants.ENDPOINT} cannot be reached: {line(error) or type(error).__name__}",
            hint="check the network and HF_ENDPOINT, and run the command again",
        ) from error


def line(error: Exception) -> str:
    """The last telling line of a client's message, without request ids."""
    lines = [re.sub(r" \(Request ID: [^)]*\)", "", line).strip() for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), "")


def _explain(error: Exception, repo: RepoName) -> InputError:
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    url = f"{constants.ENDPOINT}/{repo.id}"
    login = "run `hf auth login`, or set HF_TOKEN"
    unauthorized = status == 401 and "Invalid credentials" in str(error)
    table: tuple[tuple[bool, str, str, str], ...] = (
        (
            isinstance(error, errors.GatedRepoError),
            "hub-gated",
            f"{repo.id} is gated, and this account has no access to it",
            f"ask for access at {url}, then {login}",
        ),
        (unauthorized, "hub-token-invalid", "the Hub does not know this access token", login),
        (
            isinstance(error, errors.DisabledRepoError),
            "hub-disabled",
            f"{repo.id} was disabled by the Hub's moderators",
            f"see {url}",
        ),
        (
            isinstance(error, errors.RepositoryNotFoundError),
            "hub-repo-missing",
            f"there is no repository {repo.id} on the Hub, or it is private and this account may not see it",
            f"check the name; for a private one, {login}",
        ),
        (
            isinstance(error, errors.RevisionNotFoundError),
            "hub-revision-missing",
            f"{repo.id} has no revision {repo.revision or 'main'!r}",
            f"see its branches at {url}/tree/main, and give one as {repo.id}@branch",
        ),
        (
            isinstance(error, errors.RemoteEntryNotFoundError),
            "hub-file-missing",
            f"{repo}: a file that was listed is gone",
            "the repository changed; run the command again",
        ),
        (
            isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError),
            "hub-offline",
            f"{repo} is not whole in the cache, and the Hub may not or cannot be asked",
            "unset HF_HUB_OFFLINE, check the network, and run the command again",
        ),
        (status == 401, "hub-unauthorized", "the Hub wants an access token for this", login),
        (
            status == 403,
            "hub-forbidden",
            f"this access token may not do that to {repo.id}",
            f"use a token with write access to {repo.id.split('/')[0]}, or propose the change with --create-pr",
        ),
        (status == 429, "hub-rate-limit", "the Hub asks to slow down (429)", "wait some minutes and run it again"),
    )
    for holds, code, message, hint in table:
        if holds:
            return InputError(code, message, hint=hint)
    return InputError(
        "hub-answer", f"{repo}: the Hub answers {status}: {line(error)}", hint="run the command again in some minutes"
    )
