"""The reader's own copy of the notebooks, which git does not see: to change, to run and to save as one likes.

`python -m helpers.notebook.lab`, as `make lab` runs it, brings lab/ up to date. What a reader has changed there stays;
a new version of its original is then put beside it.
"""

import json
import shutil
from pathlib import Path

import nbformat

from helpers.files import digest_of, write_file, write_json
from helpers.machine import log
from helpers.notebook.workspace import ROOT


def refresh(originals: Path = ROOT / "notebooks", lab: Path = ROOT / "lab") -> list[str]:
    """Copy what is new; take over what changed where the reader's copy is as it was copied. Returns what was said.

    A copy counts as changed where a cell's text is another: outputs and counts do not matter.
    """
    record_file = lab / ".copied.json"  # {file: digest of the cells that were copied}
    record = json.loads(record_file.read_bytes()) if record_file.is_file() else {}
    said = []
    for path in sorted(path for path in originals.rglob("*") if path.is_file()):
        name = str(path.relative_to(originals))
        if path.suffix != ".ipynb":
            (lab / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, lab / name)
        elif ".ipynb_checkpoints" not in path.parts and record.get(name) != (new := cells_digest(path)):
            target = lab / name
            if target.is_file() and cells_digest(target) not in (record.get(name), new):
                target = target.with_suffix(".new.ipynb")
                said.append(f"lab/{name} has your changes and stays; what is new is in lab/{target.relative_to(lab)}")
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, path.read_bytes())
            record[name] = new
    write_json(record_file, record)
    return said


def cells_digest(path: Path) -> str:
    """A digest of what a notebook says, without what running it leaves there; of a file that is none, of its bytes."""
    try:
        notebook = nbformat.read(path, as_version=4)
        cells = [[cell.cell_type, cell.source, cell.metadata.get("tags", [])] for cell in notebook.cells]
        return digest_of([cells, notebook.metadata.get("tutorial", {})])
    except (ValueError, KeyError, AttributeError):
        return digest_of(path.read_bytes().hex())


if __name__ == "__main__":
    for line in refresh():
        log(line)
