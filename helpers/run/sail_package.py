"""Which `sophon.sail` is installed, found without importing it: the doctor asks where not even numpy is there."""

import importlib.util
from pathlib import Path


def sophon_sail() -> tuple[str, str]:
    """("absent" | "placeholder" | "real", where): PyPI's `sophon` is an empty file, the real one comes with the SDK."""
    spec = importlib.util.find_spec("sophon")
    if spec is None or not spec.submodule_search_locations:
        return "absent", ""
    for folder in map(Path, spec.submodule_search_locations):
        if found := sorted(folder.glob("sail*.so")) + sorted(folder.glob("sail/*.so")):
            return "real", str(found[0])
        if (folder / "sail.py").is_file():
            kind = "real" if (folder / "sail.py").read_bytes().strip() else "placeholder"
            return kind, str(folder / "sail.py")
    return "placeholder", str(next(iter(spec.submodule_search_locations)))
