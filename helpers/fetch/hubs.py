"""The model hubs: what a repository has at a revision, and its files brought into a folder.

Hugging Face is asked through huggingface_hub, which knows tokens and mirrors (HF_TOKEN, HF_ENDPOINT), ModelScope
through its public interface (MODELSCOPE_ENDPOINT). The files of both come by huggingface_hub's http_get: its
snapshot_download begins a file anew that a killed process left half-way, and a shard of 2 GB takes hours on some lines.
A file grows as <name>.incomplete beside its place, is compared with the hash that the hub announced, and only then gets
its name: whatever ends a fetch, the next one goes on from there.
"""

import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import quote

from tqdm.auto import tqdm

from helpers.errors import UserError
from helpers.files import remedy, sha256_file

AT_A_TIME = 4
# Seconds without a byte after which a listing is given up. However slowly it comes, it is waited for.
PATIENCE = 60.0


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. size in bytes; hash: SHA-256 or, of 40 digits, Git's SHA-1, where it is told."""

    path: str
    size: int
    url: str
    hash: str | None

    def is_in(self, folder: Path) -> bool:
        """Whether it lies in the folder under its name, which it gets when it was compared with its hash."""
        return (folder / self.path).is_file() and (folder / self.path).stat().st_size == self.size

    def bytes_in(self, folder: Path) -> int:
        """Bytes of it that are in the folder, whole or in part."""
        partial = folder / f"{self.path}.incomplete"
        return self.size if self.is_in(folder) else partial.stat().st_size if partial.is_file() else 0

    def hash_of(self, file: Path) -> str | None:
        """A file's hash of the kind that is known of this one."""
        from huggingface_hub.utils.sha import git_hash

        return self.hash and (git_hash(file.read_bytes()) if len(self.hash) == 40 else sha256_file(file))


@dataclass(frozen=True)
class Listing:
    """A repository as a hub lists it. host: for people, "ModelScope (modelscope.cn)". headers: to ask for a file."""

    host: str
    commit: str
    files: list[RemoteFile]
    headers: dict[str, str]


def _huggingface(endpoint: str, repo: str, revision: str) -> tuple[str, list[RemoteFile], dict[str, str]]:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=PATIENCE)
    files = [
        RemoteFile(
            path=sibling.rfilename,
            size=sibling.size,
            url=hf_hub_url(repo, sibling.rfilename, revision=info.sha, endpoint=endpoint),
            hash=sibling.lfs.sha256 if sibling.lfs else sibling.blob_id,
        )
        for sibling in info.siblings
    ]
    return info.sha, files, build_hf_headers()


def _modelscope(endpoint: str, repo: str, revision: str) -> tuple[str, list[RemoteFile], dict[str, str]]:
    """The answer names each file's own last commit; the newest of these is taken for the repository's."""
    from huggingface_hub import get_session

    place = f"{endpoint}/api/v1/models/{repo}/repo"
    asked = {"Revision": revision, "Recursive": "True"}
    response = get_session().get(f"{place}/files", params=asked, timeout=PATIENCE)
    entries = [e for e in response.raise_for_status().json()["Data"]["Files"] if e.get("Type") != "tree"]
    newest = max(entries, key=lambda entry: entry.get("CommittedDate") or 0, default={})
    files = [
        RemoteFile(
            path=entry["Path"],
            size=int(entry["Size"]),
            url=f"{place}?Revision={quote(revision, safe='')}&FilePath={quote(entry['Path'], safe='')}",
            hash=entry.get("Sha256") or None,
        )
        for entry in entries
    ]
    return newest.get("Revision") or revision, files, {}


# What people call a hub, the variable that names another address, its own address, what lists a repository there.
HUBS = {
    "huggingface": ("Hugging Face", "HF_ENDPOINT", "https://huggingface.co", _huggingface),
    "modelscope": ("ModelScope", "MODELSCOPE_ENDPOINT", "https://modelscope.cn", _modelscope),
}


def list_files(source: str, repo: str, revision: str) -> Listing:
    """The files of a repository; source: one of HUBS; revision: a commit, a tag or a branch.

    Raises UserError where the hub is silent for PATIENCE, does not have it or lists a file outside it.
    """
    hub, variable, address, ask = HUBS[source]
    endpoint = (os.environ.get(variable) or address).rstrip("/")
    host = f"{hub} ({re.sub('^.*(://|@)', '', endpoint)})"
    with _asking(host, f"{repo} at {revision}"):
        from huggingface_hub import close_session

        close_session()  # the next one reads the environment of now
        commit, files, headers = ask(endpoint, repo, revision)
    for pure in (PurePosixPath(file.path) for file in files):
        if pure.is_absolute() or ".." in pure.parts:
            raise UserError(f"{host} lists a file {pure}, which lies outside its repository: do not use this source.")
    return Listing(host, commit, files, headers)


@contextmanager
def _asking(host: str, what: str) -> Iterator[None]:
    """Word what a hub's client raises, while it is asked for something."""
    try:
        yield
    except (CancelledError, UserError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and remedy(error):
            raise  # of this machine's disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if status := getattr(getattr(error, "response", None), "status_code", None):
            raise UserError(
                f"{host} refuses {what} with HTTP {status}: leave out --revision; take away an old token, in HF_TOKEN "
                "or ~/.cache/huggingface/token (these models need none); look at HF_ENDPOINT or MODELSCOPE_ENDPOINT if "
                "it is set; try again later; or take another --source. What was fetched is kept."
            ) from None
        other, own = ("huggingface", "MODELSCOPE") if host.startswith("ModelScope") else ("modelscope", "HF|HUGGING")
        pattern = rf"(HTTPS?|ALL|NO)_PROXY|SSL\w+|({own})_\w*(ENDPOINT|TOKEN|TIMEOUT)|\w+_OFFLINE"
        variables = (variable for variable in os.environ if re.fullmatch(pattern, variable, re.IGNORECASE))
        raise UserError(
            f"{host}, asked for {what}, gives no answer ({reason}): take --source {other}; or look at "
            f"{', '.join(variables) or 'your network'} (an address is https://HOST; a proxy, in HTTPS_PROXY, is "
            "http://USER:PASSWORD@HOST:PORT with %23 for # and %2F for /; SSL_CERT_FILE names your network's "
            "certificates); or bring the checkpoint here by other means and give its folder with --source FOLDER. What "
            "was fetched is kept."
        ) from None


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

    target, partial = folder / file.path, folder / f"{file.path}.incomplete"
    target.parent.mkdir(parents=True, exist_ok=True)
    # Where no hash is announced, nothing would tell that the two parts are of one file.
    resumed = file.hash and file.bytes_in(folder) <= file.size
    with _asking(listing.host, file.path), open(partial, "ab" if resumed else "wb") as out:
        http_get(
            file.url,
            out,
            resume_size=out.tell(),
            headers={**listing.headers, "Accept-Encoding": "identity"},
            expected_size=file.size,
            tqdm_class=lambda **_: nullcontext(bar),
        )
    if (found := file.hash_of(partial)) != file.hash:
        partial.unlink()
        raise UserError(
            f"{file.path} as {listing.host} sent it has the hash {found:.12}…, announced was {file.hash:.12}…: it is "
            "deleted; run the same command again (the other files are kept), or take another --source."
        )
    os.replace(partial, target)
