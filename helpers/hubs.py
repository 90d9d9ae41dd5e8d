"""What a model hub offers: the files of a repository at a revision, with sizes and hashes. No file is read here.

Both hubs are asked through their plain HTTP interfaces; Hugging Face's through huggingface_hub, which knows tokens and
mirrors (HF_TOKEN, HF_ENDPOINT). ModelScope's is that of its own client, modelscope_hub 0.5.1 (MODELSCOPE_ENDPOINT).
"""

import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import quote, urlsplit

from helpers.artefacts import digest_of
from helpers.errors import UserError

# Seconds that a hub has to list a repository; both answer in less than two where they can be reached.
PATIENCE = 8.0
HUGGINGFACE, MODELSCOPE = "Hugging Face", "ModelScope"
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. size in bytes; sha256, or git_blob (Git's SHA-1 of a small file), where it is told."""

    path: str
    size: int
    sha256: str | None
    git_blob: str | None
    url: str
    headers: dict = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What names this content whichever hub has it; where no hash is told, this file of this place."""
        return self.sha256 or self.git_blob or digest_of([self.url, self.size])


@dataclass(frozen=True)
class Listing:
    """A repository as a hub lists it. host: for people, "Hugging Face (huggingface.co)". revision: a commit."""

    host: str
    repo: str
    revision: str
    files: list[RemoteFile]


def list_huggingface(repo: str, revision: str) -> Listing:
    """The files of a Hugging Face repository; revision: a commit, a tag or a branch.

    Raises UserError where the hub does not answer within PATIENCE or does not have it.
    """
    import httpx
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
    from huggingface_hub.utils import build_hf_headers

    _check_proxy()
    endpoint, host = _endpoint(HUGGINGFACE, "HF_ENDPOINT", constants.ENDPOINT)
    api = HfApi(endpoint=endpoint)
    try:
        info = _answer_within(
            PATIENCE, lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=PATIENCE)
        )
    except RevisionNotFoundError:
        raise _no_revision(host, repo, revision, "main") from None
    except OfflineModeIsEnabled:
        raise UserError(
            f"HF_HUB_OFFLINE is set, so {HUGGINGFACE} is not asked: unset it, or give a folder with --source FOLDER."
        ) from None
    except HfHubHTTPError as error:
        raise _refused(host, repo, error.response.status_code) from None
    except (httpx.HTTPError, OSError) as error:
        raise silent(host, error) from None
    files = [
        RemoteFile(
            path=_inside(sibling.rfilename, host),
            size=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            git_blob=None if sibling.lfs else sibling.blob_id,
            url=hf_hub_url(repo, sibling.rfilename, revision=info.sha, endpoint=endpoint),
            headers=build_hf_headers(),
        )
        for sibling in info.siblings
    ]
    return Listing(host, repo, info.sha, files)


def list_modelscope(repo: str, revision: str) -> Listing:
    """The files of a ModelScope repository; revision: a branch, a tag or a commit.

    The listing names each file's own last commit; Listing.revision is the newest of these.
    Raises UserError where the hub does not answer within PATIENCE or does not have it.
    """
    import httpx

    _check_proxy()
    endpoint, host = _endpoint(MODELSCOPE, "MODELSCOPE_ENDPOINT", "https://modelscope.cn")
    place = f"{endpoint}/api/v1/models/{repo}/repo"
    asked = {"Revision": revision, "Recursive": "True"}
    try:
        response = _answer_within(
            PATIENCE, lambda: httpx.get(f"{place}/files", params=asked, timeout=PATIENCE, follow_redirects=True)
        )
        if response.status_code != 200:
            raise _refused(host, repo, response.status_code)
        answer = response.json()
        if answer.get("Success") is False:
            raise _no_revision(host, repo, revision, "master")
        entries = [entry for entry in answer["Data"]["Files"] if entry.get("Type") != "tree"]
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
        files = [
            RemoteFile(
                path=_inside(entry["Path"], host),
                size=int(entry["Size"]),
                sha256=entry.get("Sha256") or None,
                git_blob=None,
                url=f"{place}?Revision={quote(revision, safe='')}&FilePath={quote(entry['Path'], safe='')}",
            )
            for entry in entries
        ]
    except (httpx.HTTPError, OSError) as error:
        raise silent(host, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{host} answered something that is not a list of files: a proxy's page perhaps. Take the other hub, or "
            "bring the checkpoint yourself and give --source FOLDER."
        ) from None
    return Listing(host, repo, newest.get("Revision") or revision, files)


def silent(host: str, error: Exception) -> UserError:
    """The one sentence for a host that gives no answer."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    other = "huggingface" if MODELSCOPE in host else "modelscope"
    return UserError(
        f"{host} gives no answer ({reason}): take --source {other}, or set HTTPS_PROXY if there is a proxy, or bring "
        "the checkpoint here by other means and give its folder with --source FOLDER. What was fetched is kept."
    )


def _endpoint(hub: str, variable: str, default: str) -> tuple[str, str]:
    """A hub's address, and hub and host for people. Raises UserError where the variable holds no address."""
    address = os.environ.get(variable) or default
    try:
        parts = urlsplit(address)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{variable} is {address!r}, which is not an address: unset it, or begin it with https://.")
    return address.rstrip("/"), f"{hub} ({parts.netloc})"


def _check_proxy() -> None:
    """Raises UserError where a proxy is set that httpx cannot use: SOCKS needs a package of its own."""
    import httpx

    try:
        httpx.Client().close()
    except (ImportError, ValueError) as error:
        raise UserError(
            f"The proxy that is set cannot be used ({str(error).splitlines()[0]}): set HTTPS_PROXY to one that begins "
            "with http://, unset ALL_PROXY, or for SOCKS `pip install socksio`."
        ) from None


def _refused(host: str, repo: str, status: int) -> UserError:
    if status in (401, 403, 404):
        return UserError(
            f"{host} does not have {repo} for you (HTTP {status}): check the address in HF_ENDPOINT or "
            "MODELSCOPE_ENDPOINT if one is set, or take the other hub with --source."
        )
    return UserError(f"{host} refuses {repo} with HTTP {status}: try again later, or take the other hub with --source.")


def _no_revision(host: str, repo: str, revision: str, branch: str) -> UserError:
    return UserError(f"{host} has no revision {revision!r} of {repo}: give --revision {branch}, its newest.")


def _inside(path: str, host: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise UserError(f"{host} lists a file {path!r}, which lies outside its repository: do not use this source.")
    return path


def _answer_within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """What `ask` returns or raises; TimeoutError after `seconds`, name look-up and slow trickle included."""
    answers: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"nothing within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer
