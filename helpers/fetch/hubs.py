"""The model hubs: what a repository has at a revision, and its files brought into a folder.

Hugging Face is asked through huggingface_hub, which knows tokens and mirrors (HF_TOKEN, HF_ENDPOINT), ModelScope
through its public interface (MODELSCOPE_ENDPOINT). The files of both come by huggingface_hub's http_get: its
snapshot_download begins a file anew that a killed process left half-way, and a shard of 2 GB takes hours on some lines.
A file grows as <name>.incomplete beside its place, is compared with the hash that the hub announced, and only then gets
its name: whatever ends a fetch, the next one goes on from there.
"""

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import quote

import httpx
from tqdm.auto import tqdm

from helpers.errors import UserError
from helpers.fetch.network import open_way, silent
from helpers.files import sha256_file
from helpers.machine import log

AT_A_TIME = 4
# Seconds without a byte after which a listing is given up. However slowly it comes, it is waited for.
PATIENCE = 60.0


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. size in bytes; sha256, or git_blob (Git's SHA-1 of a small file), where it is told."""

    path: str
    size: int
    url: str
    sha256: str | None = None
    git_blob: str | None = None

    def is_in(self, folder: Path) -> bool:
        """Whether it lies in the folder under its name, which it gets when it was compared with its hash."""
        return (folder / self.path).is_file() and (folder / self.path).stat().st_size == self.size

    def bytes_in(self, folder: Path) -> int:
        """Bytes of it that are in the folder, whole or in part."""
        partial = folder / f"{self.path}.incomplete"
        return self.size if self.is_in(folder) else partial.stat().st_size if partial.is_file() else 0


@dataclass(frozen=True)
class Listing:
    """A repository as a hub lists it. host: for people, "ModelScope (modelscope.cn)". headers: to ask for a file."""

    host: str
    commit: str
    files: list[RemoteFile]
    headers: dict[str, str]


def list_huggingface(repo: str, revision: str) -> Listing:
    """The files of a repository of Hugging Face or of a mirror; revision: a commit, a tag or a branch.

    Raises UserError where the hub is silent for PATIENCE or does not have it, and where a variable of the environment
    cannot be used.
    """
    from huggingface_hub import HfApi, constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    host, headers = open_way("Hugging Face", endpoint, build_hf_headers)
    log(f"asking {host} for the files of {repo}")
    with _asking(host, f"{repo} at {revision}", headers):
        info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=PATIENCE)
        files = [
            RemoteFile(
                path=_inside(sibling.rfilename, host),
                size=sibling.size,
                url=hf_hub_url(repo, sibling.rfilename, revision=info.sha, endpoint=endpoint),
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                git_blob=None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings
        ]
    return Listing(host, info.sha, files, headers)


def list_modelscope(repo: str, revision: str) -> Listing:
    """The files of a ModelScope repository; revision: a branch, a tag or a commit.

    The answer names each file's own last commit; Listing.commit is the newest of these.
    Raises UserError as list_huggingface does.
    """
    from huggingface_hub import get_session

    endpoint = (os.environ.get("MODELSCOPE_ENDPOINT") or "https://modelscope.cn").rstrip("/")
    host, headers = open_way("ModelScope", endpoint)
    place = f"{endpoint}/api/v1/models/{repo}/repo"
    asked = {"Revision": revision, "Recursive": "True"}
    log(f"asking {host} for the files of {repo}")
    with _asking(host, f"{repo} at {revision}", headers):
        response = get_session().get(f"{place}/files", params=asked, timeout=PATIENCE)
        entries = [e for e in response.raise_for_status().json()["Data"]["Files"] if e.get("Type") != "tree"]
        newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
        files = [
            RemoteFile(
                path=_inside(entry["Path"], host),
                size=int(entry["Size"]),
                url=f"{place}?Revision={quote(revision, safe='')}&FilePath={quote(entry['Path'], safe='')}",
                sha256=entry.get("Sha256") or None,
            )
            for entry in entries
        ]
    return Listing(host, newest.get("Revision") or revision, files, headers)


@contextmanager
def _asking(host: str, what: str, headers: dict[str, str]) -> Iterator[None]:
    """Word what a hub's client raises, while it is asked for something."""
    try:
        yield
    except httpx.HTTPError as error:
        status = error.response.status_code if hasattr(error, "response") else None
        if status in (401, 403) and "authorization" in headers:
            from huggingface_hub import constants

            variables = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
            place = next(filter(os.environ.get, variables), f"the file {constants.HF_TOKEN_PATH}")
            raise UserError(
                f"{host} answers HTTP {status} to the token in {place}: it has expired, perhaps, or was revoked. Take "
                "it away, these models need none, or put a new one there."
            ) from None
        if status is not None:
            raise UserError(
                f"{host} refuses {what} with HTTP {status}: leave out --revision, look at the address in HF_ENDPOINT "
                "or MODELSCOPE_ENDPOINT if one is set, try again later, or take another --source; what was fetched is "
                "kept."
            ) from None
        raise silent(f"{host}, asked for {what},", error) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{host}, asked for {what}, answered something else: a proxy's page perhaps. Take another --source, or "
            "bring the checkpoint yourself and give --source FOLDER."
        ) from None
    except UnicodeError as error:  # a proxy's name that no name server can be asked for
        raise silent(f"{host}, asked for {what},", error) from None


HUBS = {"huggingface": list_huggingface, "modelscope": list_modelscope}


def download(listing: Listing, files: list[RemoteFile], folder: Path) -> None:
    """Bring files of a listing into the folder, AT_A_TIME side by side.

    Raises UserError where the hub falls silent, refuses a file or sends another one; what came stays.
    """
    from huggingface_hub import constants

    # Bytes that are written at once: what is lost where a connection ends, of which there may be many.
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
    total, present = sum(file.size for file in files), sum(file.bytes_in(folder) for file in files)
    stop = threading.Event()
    with (
        tqdm(total=total, initial=present, desc="fetch", unit="B", unit_scale=True) as bar,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):

        def update(size: int) -> None:
            if stop.is_set():  # another file has failed, or the user has had enough
                raise CancelledError
            bar.update(size)

        missing = [file for file in files if not file.is_in(folder)]
        tasks = [pool.submit(_receive, listing, file, folder, SimpleNamespace(update=update)) for file in missing]
        try:
            for task in as_completed(tasks):
                task.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _receive(listing: Listing, file: RemoteFile, folder: Path, bar: SimpleNamespace) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils.sha import git_hash

    def sent(what: str, found: str, announced: str) -> UserError:
        partial.unlink()
        return UserError(
            f"{file.path} as {listing.host} sent it has the {what} {found:.12}…, announced was {announced:.12}…: it is "
            "deleted; run the same command again (the other files are kept), or take another --source."
        )

    target, partial = folder / file.path, folder / f"{file.path}.incomplete"
    target.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_file() and partial.stat().st_size > file.size:
        partial.unlink()
    with _asking(listing.host, file.path, listing.headers), open(partial, "ab") as out:
        try:
            http_get(
                file.url,
                out,
                resume_size=out.tell(),
                headers={**listing.headers, "Accept-Encoding": "identity"},
                expected_size=file.size,
                tqdm_class=lambda **_: nullcontext(bar),
            )
        except OSError as error:
            if isinstance(error, httpx.HTTPError) or error.errno is not None:
                raise
            raise sent("size", str(partial.stat().st_size), str(file.size)) from None
    if file.sha256 and (found := sha256_file(partial)) != file.sha256:
        raise sent("SHA-256", found, file.sha256)
    if file.git_blob and (found := git_hash(partial.read_bytes())) != file.git_blob:
        raise sent("Git hash", found, file.git_blob)
    os.replace(partial, target)


def _inside(path: str, host: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise UserError(f"{host} lists a file {path!r}, which lies outside its repository: do not use this source.")
    return path
