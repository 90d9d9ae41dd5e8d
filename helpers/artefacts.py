"""Artefacts and their manifests: what was made, from what, with what settings, how long it took.

An artefact is a folder or a file. It is built beside its place and moved in whole, so a stage that is killed
leaves nothing half-made; it is skipped only where its manifest says that the same inputs, settings, tool versions and
code made it and its outputs are still there, never because a file happens to exist.
"""

import contextlib
import glob
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from helpers.errors import UserError
from helpers.files import sha256_file, write_json
from helpers.machine import description, log_once, tool_versions

MANIFEST = "manifest.json"


def code_of(*modules: str) -> dict[str, str]:
    """SHA-256 of the modules of these helpers that decide what an artefact contains, by their names: `compile.graph`.

    Taken where a module is imported: a session that goes on while the files change runs the code of its start.
    """
    return {name: sha256_file(Path(__file__).parent.joinpath(*name.split(".")).with_suffix(".py")) for name in modules}


def manifest_path(artefact: str | Path) -> Path:
    """`folder/manifest.json` for a folder, `file.ext.json` for a file."""
    artefact = Path(artefact)
    return artefact / MANIFEST if artefact.is_dir() else artefact.with_name(artefact.name + ".json")


def read_manifest(artefact: str | Path) -> dict:
    """The manifest of an artefact. Raises UserError where there is none or it cannot be read."""
    path = manifest_path(artefact)
    try:
        manifest = json.loads(path.read_bytes())
        # What every reader relies on, where it is there at all.
        inputs, settings, outputs = (manifest.get(key, {}) for key in ("inputs", "settings", "outputs"))
        described = all(isinstance(part, dict) for part in (inputs, settings, outputs, *outputs.values()))
        named = isinstance(manifest.get("tokenizer"), str | None)
        if not (described and named and all("sha256" in output for output in outputs.values())):
            raise ValueError("it does not say what a manifest says")
        return manifest
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a readable manifest ({error}): make the artefact again.") from None


def is_whole(artefact: str | Path, manifest: dict, read: bool = True) -> bool:
    """Whether every output that the manifest names is there with the content it had; not to read: with the size."""
    root = manifest_path(artefact).parent
    outputs = manifest.get("outputs") or {}
    return bool(outputs) and all(
        (root / name).is_file()
        and (root / name).stat().st_size == described.get("bytes")
        and (not read or sha256_file(root / name) == described["sha256"])
        for name, described in outputs.items()
    )


def up_to_date(
    artefact: str | Path, inputs: dict[str, str], settings: dict, code: dict[str, str] | None = None, read: bool = True
) -> bool:
    """Whether the artefact was made from just these inputs and settings, by these tools and code, and is still whole.

    inputs: name to SHA-256. code: of code_of; an artefact that was made by other code is said to be, once a folder.
    Outputs are compared by content: a corrupted file is made again. Not to read is for a forecast: sizes are compared,
    and of the inputs those that are given.
    """
    artefact = Path(artefact)
    try:
        manifest = read_manifest(artefact)
    except UserError:
        return False
    wanted = {"inputs": inputs, "settings": json.loads(json.dumps(settings)), "versions": tool_versions()}
    if not read:
        manifest |= {"inputs": {name: digest for name, digest in manifest["inputs"].items() if name in inputs}}
    if {key: manifest.get(key) for key in wanted} != wanted:
        return False
    if manifest.get("code", {}) != (code or {}):
        log_once(f"{artefact.parent}: other code of these helpers made what is there ({', '.join(code)}): made anew.")
        return False
    return is_whole(artefact, manifest, read)


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
    `inputs` and `extra` may be filled while building: they are read at the end. What was at `artefact` before stays
    until the new one is whole. What killed processes left of it is removed.
    Raises OSError, which names the artefact where the system names no file, as on a full disk.
    """
    artefact = Path(artefact)
    if artefact.is_symlink() and not artefact.is_file():
        # A folder that is kept on another disk stays there, and the link to it.
        artefact = Path(os.path.realpath(artefact))
    artefact.parent.mkdir(parents=True, exist_ok=True)
    staging = artefact.parent / f".{artefact.name}.{os.getpid()}.partial"
    for left in artefact.parent.glob(f".{glob.escape(artefact.name)}.*.partial"):
        if (pid := left.name.split(".")[-2]) == str(os.getpid()) or not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    started = time.monotonic()
    try:
        staging.mkdir()
        partial = staging / artefact.name
        yield partial
        root, files = (partial, partial.rglob("*")) if partial.is_dir() else (staging, staging.iterdir())
        files = (file for file in sorted(files) if file.is_file() and file.name != MANIFEST)
        manifest = {
            "kind": kind,
            "inputs": inputs,
            "settings": settings,
            "code": code or {},
            "versions": tool_versions(),
            "machine": description(),
            "seconds": round(time.monotonic() - started, 3),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "outputs": {
                str(file.relative_to(root)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
                for file in files
            },
            **(extra or {}),
        }
        if partial.is_dir():
            write_json(partial / MANIFEST, manifest)
            # Renamed into the staging folder, the previous one goes when that goes.
            if artefact.exists():
                os.rename(artefact, partial.with_name(f"{artefact.name}.previous"))
            os.rename(partial, artefact)
        else:
            if artefact.is_dir():
                raise UserError(f"{artefact} is a folder; a file is to be written there: name another.")
            # The manifest goes first: files that do not fit their manifest are made again, never trusted.
            write_json(manifest_path(artefact), manifest)
            for name in manifest["outputs"]:
                os.replace(staging / name, artefact.parent / name)
    except OSError as error:
        error.filename = error.filename or str(artefact)
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
