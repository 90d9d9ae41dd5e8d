"""Bring the files of a listing here: side by side, resumed where they were left, each verified before it counts.

Files wait in a folder under the name of their content, so that what one hub gave is of use when another goes on.
"""

import contextlib
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from helpers.errors import UserError
from helpers.fetch.hubs import PATIENCE, RemoteFile, silent
from helpers.files import locked as _locked
from helpers.files import sha256_file

AT_A_TIME = 4
# Seconds without a byte before a connection is given up; how often a file may fail before all is given up, unless
# this many bytes came in between.
STALL = PATIENCE
ATTEMPTS = 3
PROGRESS = 65_536
PAUSE = 1.0


class _Interrupted(Exception):
    """A transfer that ended before its file; what came is kept."""


def make_folder(folder: Path) -> None:
    """Create a folder and those above it. Raises UserError where that is not allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder.parent} cannot be written ({error.strerror}): give another --out.") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create the folder and hold it, one process at a time. Raises UserError where another has it."""
    make_folder(folder)
    busy = f"Another fetch is writing to {folder}: wait for it, or give another --out."
    with _locked(folder / "lock", busy):
        yield


def have(files: list[RemoteFile], folder: Path) -> int:
    """Bytes of these files that are in the folder, whole or in part."""
    return sum(_whole(file, folder) or _partial_bytes(file, folder) for file in files)


def download(files: list[RemoteFile], folder: Path, host: str, progress=None) -> dict[str, Path]:
    """Bring all files into `folder`; return where each path's content lies. Call it within `locked(folder)`.

    progress: a tqdm class. Raises UserError where the host stops answering, refuses a file, gives other bytes than it
    announced (the file is deleted and named), or the disk is full; whole and partial files stay for the next call.
    """
    import httpx
    from tqdm.auto import tqdm

    contents = {file.key: file for file in files}
    stop = threading.Event()
    timeout = httpx.Timeout(STALL)
    with (
        (progress or tqdm)(
            total=sum(file.size for file in contents.values()),
            initial=have(list(contents.values()), folder),
            desc="fetch",
            unit="B",
            unit_scale=True,
            unit_divisor=1000,
        ) as bar,
        httpx.Client(follow_redirects=True, timeout=timeout) as client,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):
        tasks = [pool.submit(_fetch, client, file, folder, host, stop, bar.update) for file in contents.values()]
        try:
            wait(tasks, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
            for task in tasks:
                task.cancel()
    failures = [task.exception() for task in tasks if task.done() and not task.cancelled() and task.exception()]
    real = [failure for failure in failures if not isinstance(failure, _Interrupted)]
    if real:
        raise real[0]
    return {file.path: folder / file.key for file in files}


def _fetch(
    client, file: RemoteFile, folder: Path, host: str, stop: threading.Event, advance: Callable[[int], object]
) -> None:
    if _whole(file, folder):
        return
    partial = _partial(file, folder)
    partial.touch()
    failures, counted_from = 0, partial.stat().st_size
    while (size := partial.stat().st_size) != file.size:
        if size - counted_from > PROGRESS:
            failures, counted_from = 0, size
        try:
            _receive(client, file, partial, host, stop, advance)
        except _Interrupted as reason:
            if stop.is_set():
                raise
            failures += 1
            if failures == ATTEMPTS:
                raise silent(f"{host}, asked for {file.path},", reason) from None
            stop.wait(PAUSE)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"No space left on the disk that holds {folder}: free some, or choose another --out, and run the "
                    "same command again; what was fetched is kept."
                ) from None
            raise
    _verify(file, partial, host)
    os.replace(partial, folder / file.key)


def _receive(client, file: RemoteFile, partial: Path, host: str, stop: threading.Event, advance) -> None:
    """One request for what is lacking. Raises _Interrupted where another may go on, UserError where none can."""
    import httpx

    start = partial.stat().st_size
    headers = {**file.headers, "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with client.stream("GET", file.url, headers=headers) as response:
            if response.status_code in (408, 416, 429) or response.status_code >= 500:
                if response.status_code == 416:
                    _restart(partial, start, advance)
                raise _Interrupted(f"HTTP {response.status_code}")
            if response.status_code not in (200, 206):
                raise UserError(
                    f"{host} refuses {file.path} with HTTP {response.status_code}: run the same command again later, "
                    "or take another --source; what was fetched is kept."
                )
            if start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                # The whole file comes, whatever was asked for.
                _restart(partial, start, advance)
                if response.status_code == 206:
                    raise _Interrupted("it answers for another range")
            with open(partial, "ab") as out:
                for block in response.iter_bytes():
                    if out.tell() + len(block) > file.size:
                        raise UserError(
                            f"{host} sends more of {file.path} than the {file.size} bytes that it announced: take "
                            "another --source."
                        )
                    out.write(block)
                    advance(len(block))
                    if stop.is_set():
                        raise _Interrupted("stopped")
    except httpx.TransportError as error:
        raise _Interrupted(str(error) or type(error).__name__) from None
    if partial.stat().st_size < file.size:
        raise _Interrupted("it closed the connection early")


def _restart(partial: Path, start: int, advance) -> None:
    os.truncate(partial, 0)
    advance(-start)


def _verify(file: RemoteFile, partial: Path, host: str) -> None:
    """Raises UserError, and deletes the file, where its content is not what was announced."""
    if file.sha256:
        kind, found, announced = "SHA-256", sha256_file(partial), file.sha256
    elif file.git_blob:
        kind, found, announced = "Git hash", git_blob(partial), file.git_blob
    else:
        return
    if found != announced:
        partial.unlink()
        raise UserError(
            f"{file.path} as {host} sent it has the {kind} {found[:12]}…, announced was {announced[:12]}…: it is "
            "deleted; run the same command again (the other files are kept), or take another --source."
        )


def git_blob(path: Path) -> str:
    """The name that Git gives a file's content: SHA-1 over "blob <bytes>\\0" and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def _partial(file: RemoteFile, folder: Path) -> Path:
    return folder / f"{file.key}.incomplete"


def _partial_bytes(file: RemoteFile, folder: Path) -> int:
    partial = _partial(file, folder)
    if not partial.is_file():
        return 0
    if partial.stat().st_size > file.size:
        os.truncate(partial, 0)
    return partial.stat().st_size


def _whole(file: RemoteFile, folder: Path) -> int:
    """Bytes of the file if it lies in the folder, verified; else 0."""
    whole = folder / file.key
    return file.size if whole.is_file() and whole.stat().st_size == file.size else 0
