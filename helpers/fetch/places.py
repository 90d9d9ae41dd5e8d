"""Where a fetch puts what it brings: room for it, and what an earlier one left there."""

from pathlib import Path

from helpers import artefacts, machine
from helpers.errors import UserError


def require_space(folder: Path, needed: int, what: str) -> None:
    """Raise UserError where the disk that holds a folder has less than `needed` bytes free."""
    free = machine.free_disk(folder)
    if needed > free:
        raise UserError(
            f"{what} needs {needed / 1e9:.1f} GB more on the disk that holds {folder}, which has {free / 1e9:.1f} GB "
            "free: free some, or give --out on another disk."
        )


def earlier_fetch(out: Path, kind: str) -> dict:
    """The manifest of what an earlier fetch left at `out`, {} where nothing is there.

    kind: "checkpoint" or "prepared". Raises UserError where no fetch made what is there: it is left as it is.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return {}
    manifest = artefacts.read_manifest(out) if artefacts.manifest_path(out).is_file() else {}
    if manifest.get("kind") == kind:
        return manifest
    raise UserError(
        f"{out} exists and no fetch made it, so it is left as it is: give another --out, or, if it is a checkpoint, "
        f"--source {out}."
    )
