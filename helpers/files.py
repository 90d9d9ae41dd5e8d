"""Files that are whole or not there, their hashes, and locks; what the system refuses is worded once, here."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from helpers.errors import UserError
from helpers.machine import log_once

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """SHA-256 of a JSON-serialisable value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def json_object(file: Path, content: bytes) -> dict:
    """The JSON object that a file holds. Raises UserError where it is none."""
    try:
        if isinstance(value := json.loads(content), dict):
            return value
        raise ValueError("it is no object")
    except ValueError as error:
        raise UserError(f"{file} is not readable JSON ({error}): download it again.") from None


def write_json(path: str | Path, value: object) -> None:
    """Write JSON beside its place and move it in whole."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file beside its place and move it in whole; leave it alone where it has this content already.

    The mode of a file that was there stays. Raises OSError, which names the file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{threading.get_native_id()}.partial")
    try:
        if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
            partial.write_bytes(content)
            if path.is_file():
                shutil.copymode(path, partial)
            os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # A full disk is met while writing, where the system names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def link_or_copy(file: Path, place: Path, *links: Callable[[Path, Path], None]) -> None:
    """Put a file in a second place, by the first of the links (os.link …) that the disk can, else by a copy."""
    place.parent.mkdir(parents=True, exist_ok=True)
    for link in links:
        with contextlib.suppress(OSError):
            return link(file, place)
    shutil.copyfile(file, place)


@contextlib.contextmanager
def locked(path: str | Path, busy: str | None = None) -> Iterator[bool]:
    """Hold a file as a lock, which goes with the process, however that ends. The file stays. Yields whether it is held.

    busy: what to say where another process has it; without it, wait. Raises UserError(busy).
    Where the disk has no locks (Lustre or NFS, as they are often mounted) it goes on without, with one warning; where
    the folder cannot be written, without one: whoever may not write there disturbs nobody. (filelock takes a marker
    for a lock where there is none, and a killed process would leave it.)
    """
    path = Path(path)
    held = False
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "a"))
        except OSError as error:
            if not isinstance(error, PermissionError) and error.errno != errno.EROFS:
                raise
            file = stack.enter_context(open(path)) if os.access(path, os.R_OK) else None
        try:
            if file is not None:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
                held = True
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            what_to_do = "do not run two commands at once that write there."
            log_once(f"warning: the disk that holds {path.parent} has no file locks ({error.strerror}): {what_to_do}")
        yield held


def remedy(error: OSError) -> str | None:
    """What to do where the system refuses a file; None for what no user can cause."""
    if error.errno in DISK_IS_FULL:
        return "Free some space, or write to another disk, and run the same command again; what was finished is kept."
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return "Give yourself the right to it, or name a file or folder that you may read, and for --out write."
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return "A file was found where a folder was needed, or a folder for a file: name another."
    if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return "Give it another name."
    return None
