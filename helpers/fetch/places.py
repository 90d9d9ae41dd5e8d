"""Where a fetch puts what it brings, and what an earlier one left there."""

from pathlib import Path

from helpers import artefacts
from helpers.errors import UserError


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
