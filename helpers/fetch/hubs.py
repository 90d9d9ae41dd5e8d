"""The model hubs through their own clients: what a repository has at a revision, and its files brought into a folder.

huggingface_hub knows tokens and mirrors (HF_TOKEN, HF_ENDPOINT), and so does modelscope_hub (MODELSCOPE_API_TOKEN,
MODELSCOPE_ENDPOINT). With either, a file grows as <name>.incomplete beside its place, is compared with the hash that
the hub announced, and only then gets its name: whatever ends a fetch, the next one goes on from there.
"""

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import httpx
from tqdm.auto import tqdm

from helpers.checkpoint.modeling import check_huggingface_variables
from helpers.errors import UserError
from helpers.fetch.network import check_client_variables, endpoint, silent
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
    sha256: str | None
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
    """A repository as a hub lists it. revision: as it was asked for; commit: which one that is."""

    repo: str
    revision: str
    commit: str
    files: list[RemoteFile]


class HuggingFace:
    """Hugging Face or a mirror. host: for people, "Hugging Face (huggingface.co)".

    Raises UserError where a variable of the environment cannot be used.
    """

    def __init__(self):
        check_huggingface_variables()
        check_client_variables()
        from huggingface_hub import constants

        self.endpoint, self.host = endpoint("Hugging Face", "HF_ENDPOINT", constants.ENDPOINT)
        self.headers, self.token_place = _huggingface_headers()

    def look_up(self, repo: str, revision: str) -> Listing:
        """The files of a repository; revision: a commit, a tag or a branch.

        Raises UserError where the hub is silent for PATIENCE or does not have it.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

        log(f"asking {self.host} for the files of {repo}")
        api = HfApi(endpoint=self.endpoint)
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=PATIENCE)
        except RevisionNotFoundError:
            raise _no_revision(self.host, repo, revision, "main") from None
        except OfflineModeIsEnabled:
            variable = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
            raise UserError(
                f"{variable} is set, so Hugging Face is not asked: unset it, or give a folder with --source FOLDER."
            ) from None
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status in (401, 403) and "authorization" in self.headers:
                raise UserError(
                    f"{self.host} answers HTTP {status} to the token in {self.token_place}: it has expired, perhaps, "
                    "or was revoked. Take it away, these models need none, or put a new one there."
                ) from None
            raise _refused(self.host, repo, status) from None
        except (httpx.HTTPError, OSError) as error:
            raise silent(self.host, error) from None
        except ValueError:
            raise _no_listing(self.host) from None
        files = [
            RemoteFile(
                path=_inside(sibling.rfilename, self.host),
                size=sibling.size,
                sha256=sibling.lfs.sha256 if sibling.lfs else None,
                git_blob=None if sibling.lfs else sibling.blob_id,
            )
            for sibling in info.siblings
        ]
        return Listing(repo, revision, info.sha, files)

    def download(self, listing: Listing, files: list[RemoteFile], folder: Path) -> None:
        """Bring the files into the folder, AT_A_TIME side by side.

        By the client's http_get: its snapshot_download begins a file anew that a killed process left half-way, and
        a shard of 2 GB takes hours on some lines.
        Raises UserError where the hub falls silent, refuses a file or sends another one; what came stays.
        """
        from huggingface_hub import constants

        # Bytes that are written at once: what is lost where a connection ends, of which there may be many.
        constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
        total, present = sum(file.size for file in files), sum(file.bytes_in(folder) for file in files)
        missing = [file for file in files if not file.is_in(folder)]
        stop = threading.Event()
        with (
            tqdm(total=total, initial=present, desc="fetch", unit="B", unit_scale=True) as bar,
            ThreadPoolExecutor(AT_A_TIME) as pool,
        ):
            tasks = [pool.submit(self._receive, listing, file, folder, _Share(bar, stop)) for file in missing]
            try:
                for task in as_completed(tasks):
                    task.result()
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _receive(self, listing: Listing, file: RemoteFile, folder: Path, share: "_Share") -> None:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils.sha import git_hash

        target, partial = folder / file.path, folder / f"{file.path}.incomplete"
        target.parent.mkdir(parents=True, exist_ok=True)
        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        try:
            with open(partial, "ab") as out:
                http_get(
                    hf_hub_url(listing.repo, file.path, revision=listing.commit, endpoint=self.endpoint),
                    out,
                    resume_size=out.tell(),
                    headers={**self.headers, "Accept-Encoding": "identity"},
                    expected_size=file.size,
                    tqdm_class=lambda **_: nullcontext(share),
                )
        except HfHubHTTPError as error:
            raise _refused_file(self.host, file.path, error.response.status_code) from None
        except httpx.HTTPError as error:
            raise silent(f"{self.host}, asked for {file.path},", error) from None
        except OSError as error:
            if error.errno is None:
                partial.unlink()
                raise _other_size(self.host, file) from None
            raise
        announced = file.sha256 or file.git_blob
        found = sha256_file(partial) if file.sha256 else git_hash(partial.read_bytes())
        if announced and found != announced:
            partial.unlink()
            raise _other_bytes(self.host, file.path, "SHA-256" if file.sha256 else "Git hash", found, announced)
        os.replace(partial, target)


class _Stopped(Exception):
    """A transfer that ends before its file; what came stays."""


class _Share:
    """One file's share of the bar; where it ends a transfer, another file has failed or the user has had enough."""

    def __init__(self, bar: tqdm, stop: threading.Event):
        self.bar, self.stop = bar, stop

    def update(self, size: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.bar.update(size)


class ModelScope:
    """ModelScope. host: for people, "ModelScope (modelscope.cn)".

    Raises UserError where a variable of the environment cannot be used.
    """

    # Its client gives up a file after an hour, however well it comes; it locks what is locked already; its log would
    # hide the one sentence.
    SETTINGS = {
        "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": str(30 * 24 * 3600),
        "MODELSCOPE_DOWNLOAD_FILE_LOCK": "false",
        "MODELSCOPE_LOG_LEVEL": "CRITICAL",
    }

    def __init__(self):
        check_client_variables()
        address, self.host = endpoint("ModelScope", "MODELSCOPE_ENDPOINT", "https://modelscope.cn")
        settings = dict(self.SETTINGS)
        if trusted := os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
            # The same as for the other hub, under the name that this client reads.
            settings["REQUESTS_CA_BUNDLE"] = trusted
        for variable, value in settings.items():
            os.environ.setdefault(variable, value)
        from modelscope_hub import HubApi, HubConfig

        self.api = HubApi(HubConfig(endpoint=address))

    def look_up(self, repo: str, revision: str) -> Listing:
        """The files of a repository; revision: a branch, a tag or a commit.

        The listing names each file's own last commit; Listing.commit is the newest of these.
        Raises UserError where the hub is silent or does not have it.
        """
        import requests
        from modelscope_hub.errors import APIError

        log(f"asking {self.host} for the files of {repo}")
        try:
            entries = [
                entry
                for entry in self.api.legacy.list_repo_files(repo, "model", revision)
                if entry.get("Type") != "tree"
            ]
            newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
            files = [
                RemoteFile(_inside(entry["Path"], self.host), int(entry["Size"]), entry.get("Sha256") or None)
                for entry in entries
            ]
        except APIError as error:
            raise _refused(self.host, repo, error.status_code) from None
        except (requests.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise _no_listing(self.host) from None
        except OSError as error:
            raise silent(self.host, error) from None
        if not files:
            raise _no_revision(self.host, repo, revision, "master")
        return Listing(repo, revision, newest.get("Revision") or revision, files)

    def download(self, listing: Listing, files: list[RemoteFile], folder: Path) -> None:
        """Bring the files into the folder, AT_A_TIME side by side. The client shows how far it is.

        Raises UserError where the hub falls silent, refuses a file or sends another one; what came stays.
        """
        from modelscope_hub.errors import FileDownloadError

        try:
            self.api.download_repo(
                listing.repo,
                "model",
                revision=listing.revision,
                local_dir=folder,
                max_workers=AT_A_TIME,
                file_list=[{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in files],
            )
        except FileDownloadError as error:
            path, failure = next(iter(error.failed_files.items()))
            raise self._said(next(file for file in files if file.path == path), failure) from None

    def _said(self, file: RemoteFile, failure: BaseException) -> BaseException:
        from modelscope_hub.errors import APIError, FileIntegrityError, FileSizeMismatchError, HubError, ServerError

        if isinstance(failure, FileSizeMismatchError):
            return _other_size(self.host, file)
        if isinstance(failure, FileIntegrityError):
            # It says "…: expected 0123456789abcdef..., got fedcba9876543210...".
            announced, found = re.findall(r"\b[0-9a-f]{16}\b", failure.message)
            return _other_bytes(self.host, file.path, "SHA-256", found, announced)
        if isinstance(failure, APIError) and not isinstance(failure, ServerError):
            return _refused_file(self.host, file.path, failure.status_code)
        if isinstance(failure, HubError | OSError) and getattr(failure, "errno", None) is None:
            return silent(f"{self.host}, asked for {file.path},", failure)
        return failure


HUBS = {"huggingface": HuggingFace, "modelscope": ModelScope}


def _huggingface_headers() -> tuple[dict[str, str], str]:
    """What huggingface_hub sends along, and where its token is from. Raises UserError where it cannot be sent."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OIDCError
    from huggingface_hub.utils import build_hf_headers

    variables = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    place = next((v for v in variables if os.environ.get(v, "").strip()), f"the file {constants.HF_TOKEN_PATH}")
    try:
        headers = build_hf_headers()
    except (OSError, ValueError, OIDCError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The token in {place} cannot be read ({reason}): take it away, or put a new one there."
        ) from None
    for name, value in headers.items():
        if odd := next((c for c in value if not c.isascii() or not c.isprintable()), None):
            where = f"The token in {place}" if name == "authorization" else "HF_HUB_USER_AGENT_ORIGIN"
            raise UserError(
                f"{where} holds {odd!r}, which no request can send: take it away, or put the right one there."
            )
    return headers, place


def _refused(host: str, repo: str, status: int) -> UserError:
    if status in (401, 403, 404):
        return UserError(
            f"{host} does not have {repo} for you (HTTP {status}): check the address in HF_ENDPOINT or "
            "MODELSCOPE_ENDPOINT if one is set, or take the other hub with --source."
        )
    return UserError(f"{host} refuses {repo} with HTTP {status}: try again later, or take the other hub with --source.")


def _no_listing(host: str) -> UserError:
    return UserError(
        f"{host} answered something that is not a list of files: a proxy's page perhaps. Take the other hub, or bring "
        "the checkpoint yourself and give --source FOLDER."
    )


def _no_revision(host: str, repo: str, revision: str, branch: str) -> UserError:
    return UserError(f"{host} has no revision {revision!r} of {repo}: give --revision {branch}, its newest.")


def _refused_file(host: str, path: str, status: int) -> UserError:
    return UserError(
        f"{host} refuses {path} with HTTP {status}: run the same command again later, or take another --source; what "
        "was fetched is kept."
    )


def _other_size(host: str, file: RemoteFile) -> UserError:
    return UserError(
        f"{host} sends more or less of {file.path} than the {file.size} bytes that it announced: take another --source."
    )


def _other_bytes(host: str, path: str, kind: str, found: str, announced: str) -> UserError:
    return UserError(
        f"{path} as {host} sent it has the {kind} {found[:12]}…, announced was {announced[:12]}…: it is deleted; run "
        "the same command again (the other files are kept), or take another --source."
    )


def _inside(path: str, host: str) -> str:
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise UserError(f"{host} lists a file {path!r}, which lies outside its repository: do not use this source.")
    return path
