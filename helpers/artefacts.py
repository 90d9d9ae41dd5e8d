"""Artefacts and their manifests: what was made, from what, with what settings, how long it took.

An artefact is a folder or a file. It is built beside its place and moved in whole, so a stage that is killed
leaves nothing half-made; it is skipped only where its manifest says that the same inputs, settings, tool versions and
code made it and its outputs are still there, never because a file happens to exist.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from helpers.errors import UserError

MANIFEST = "manifest.json"
TOOLS = ("tpu-mlir", "torch", "onnx", "onnxruntime", "transformers", "numpy")


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


def tool_versions() -> dict[str, str]:
    """Installed versions of the tools that decide what an artefact contains, plus Python's."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def code_of(*modules: str) -> dict[str, str]:
    """SHA-256 of the modules of these helpers that decide what an artefact contains, by their names: `compile.graph`.

    Taken where a module is imported: a session that goes on while the files change runs the code of its start.
    """
    return {name: sha256_file(Path(__file__).parent.joinpath(*name.split(".")).with_suffix(".py")) for name in modules}


def machine() -> dict[str, object]:
    """Where an artefact was made: architecture, system, number of usable cores."""
    return {
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": len(os.sched_getaffinity(0)),
    }


def manifest_path(artefact: str | Path) -> Path:
    """`folder/manifest.json` for a folder, `file.ext.json` for a file."""
    artefact = Path(artefact)
    return artefact / MANIFEST if artefact.is_dir() else artefact.with_name(artefact.name + ".json")


def read_manifest(artefact: str | Path) -> dict:
    """The manifest of an artefact.

    Raises UserError where there is none or it cannot be read.
    """
    path = manifest_path(artefact)
    try:
        manifest = json.loads(path.read_bytes())
        if not _is_manifest(manifest):
            raise ValueError("it does not say what a manifest says")
        return manifest
    except FileNotFoundError:
        raise UserError(
            f"{artefact} has no manifest ({path.name}): make it again with `python -m helpers`."
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} is not a readable manifest ({error}): delete it and make the artefact again."
        ) from None


def _is_manifest(value: object) -> bool:
    """Whether the parts that every reader relies on are of their types, where they are there at all."""
    if not isinstance(value, dict) or not all(isinstance(value.get(key, {}), dict) for key in ("inputs", "settings")):
        return False
    outputs = value.get("outputs", {})
    return (
        isinstance(outputs, dict)
        and all(isinstance(entry, dict) and "sha256" in entry for entry in outputs.values())
        and isinstance(value.get("tokenizer", ""), str | None)
    )


def write_json(path: str | Path, value: object) -> None:
    """Write JSON beside its place and move it in whole."""
    write_file(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file beside its place and move it in whole; leave it alone where it has this content already.

    Raises OSError, which names the file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        if not path.is_file() or path.stat().st_size != len(content) or path.read_bytes() != content:
            partial.write_bytes(content)
            os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        # A full disk is met while writing, where the system names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _files(artefact: Path) -> dict[str, Path]:
    root = artefact if artefact.is_dir() else artefact.parent
    files = artefact.rglob("*") if artefact.is_dir() else root.iterdir()
    return {str(p.relative_to(root)): p for p in sorted(files) if p.is_file() and p.name != MANIFEST}


def _describe(path: Path) -> dict[str, object]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def is_whole(artefact: str | Path, manifest: dict) -> bool:
    """Whether every output that the manifest names is there with the content it had when it was made."""
    root = Path(artefact) if Path(artefact).is_dir() else Path(artefact).parent
    outputs = manifest.get("outputs") or {}
    return bool(outputs) and all(
        (root / name).is_file()
        and (root / name).stat().st_size == described.get("bytes")
        and sha256_file(root / name) == described["sha256"]
        for name, described in outputs.items()
    )


_said_older: set[Path] = set()


def up_to_date(
    artefact: str | Path, inputs: dict[str, str], settings: dict, code: dict[str, str] | None = None
) -> bool:
    """Whether the artefact was made from just these inputs and settings, by these tools and code, and is still whole.

    inputs: name to SHA-256. code: of code_of; an artefact that was made by other code is said to be, once a folder.
    Outputs are compared by content: a corrupted file is made again.
    """
    artefact = Path(artefact)
    if not artefact.exists():
        return False
    try:
        manifest = read_manifest(artefact)
    except UserError:
        return False
    made_from = (manifest.get("inputs"), manifest.get("settings"), manifest.get("versions"))
    wanted = (inputs, json.loads(json.dumps(settings)), tool_versions())
    if made_from != wanted:
        return False
    if manifest.get("code", {}) != (code or {}):
        if artefact.parent not in _said_older:
            _said_older.add(artefact.parent)
            log(f"{artefact.parent}: other code of these helpers made what is there ({', '.join(code)}): made anew.")
        return False
    return is_whole(artefact, manifest)


@contextlib.contextmanager
def building(
    artefact: str | Path,
    *,
    kind: str,
    inputs: dict[str, str],
    settings: dict,
    code: dict[str, str] | None = None,
    extra: dict | None = None,
) -> Iterator[Path]:
    """Build an artefact beside its place; on success give it a manifest and move it in, else leave no trace.

    Yields the path to create, a file or a folder, in a staging folder of its own. Files made beside a file artefact
    there (its external weights, say) are companions: they are listed in its manifest and moved in with it.
    `extra` may be filled while building: it is read at the end. What was at `artefact` before stays until the new
    one is whole.
    Raises UserError where the disk is full.
    """
    artefact = Path(artefact)
    if artefact.is_symlink() and not artefact.is_file():
        # A folder that is kept on another disk stays there, and the link to it.
        artefact = Path(os.path.realpath(artefact))
    artefact.parent.mkdir(parents=True, exist_ok=True)
    staging = artefact.parent / f".{artefact.name}.{os.getpid()}.partial"
    _remove_abandoned(artefact)
    started = time.monotonic()
    try:
        staging.mkdir()
        partial = staging / artefact.name
        yield partial
        manifest = {
            "kind": kind,
            "inputs": inputs,
            "settings": settings,
            "code": code or {},
            "versions": tool_versions(),
            "machine": machine(),
            "seconds": round(time.monotonic() - started, 3),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outputs": {name: _describe(path) for name, path in _files(partial).items()},
            **(extra or {}),
        }
        if partial.is_dir():
            write_json(partial / MANIFEST, manifest)
            _move_folder(partial, artefact)
        else:
            if artefact.is_dir():
                raise UserError(f"{artefact} is a folder; a file is to be written there: name another.")
            # The manifest goes first: files that do not fit their manifest are made again, never trusted.
            write_json(manifest_path(artefact), manifest)
            for name in manifest["outputs"]:
                os.replace(staging / name, artefact.parent / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space left on the disk that holds {artefact.parent}: free some, or choose another --out, and run "
                "the same command again; what was finished is kept."
            ) from error
        raise
    finally:
        _remove(staging)


def _move_folder(partial: Path, artefact: Path) -> None:
    # Renamed into the staging folder, the previous one goes when that goes.
    if artefact.exists():
        os.rename(artefact, partial.with_name(partial.name + ".previous"))
    os.rename(partial, artefact)


def _remove_abandoned(artefact: Path) -> None:
    """Remove staging folders of processes that no longer run: they were killed."""
    for staging in artefact.parent.glob(f".{glob.escape(artefact.name)}.*.partial"):
        pid = staging.name.split(".")[-2]
        if not pid.isdigit() or int(pid) == os.getpid() or not Path(f"/proc/{pid}").exists():
            _remove(staging)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


_without_locks: set[int] = set()


@contextlib.contextmanager
def locked(path: str | Path, busy: str | None = None) -> Iterator[bool]:
    """Hold a file as a lock, which goes with the process, however that ends. The file stays. Yields whether it is held.

    busy: what to say where another process has it; without it, wait. Raises UserError(busy).
    Where the disk has no locks (Lustre or NFS, as they are often mounted) it goes on without, with one warning; where
    the folder cannot be written, without one: whoever may not write there disturbs nobody.
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
            disk = os.fstat(file.fileno()).st_dev
            if disk not in _without_locks:
                _without_locks.add(disk)
                log(
                    f"warning: the disk that holds {path.parent} has no file locks ({error.strerror}): do not run two "
                    "commands at once that write there."
                )
        yield held


def free_bytes(path: str | Path) -> int:
    """Free bytes on the disk that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def log(message: str) -> None:
    """A line of progress for people: standard error, so that standard output stays machine-readable."""
    print(message, file=sys.stderr, flush=True)
