"""Where a notebook works: in the repository's root, wherever its kernel was started; and where the artefacts are."""

import json
import os
from pathlib import Path

from helpers.errors import UserError
from helpers.files import write_json

ROOT = Path(__file__).resolve().parents[2]
# Which notebook makes what later ones take, by its place in the model's folder.
MADE_BY = {
    "tokens_original.json": "notebook 01",
    "patched": "notebook 01",
    "onnx": "notebook 02",
    "opened": "notebook 03",
    "bmodel": "notebook 03",
}


class Workspace:
    """Paths of one model's artefacts: out/name (`folder`), and in it `patched`, `onnx`, `bmodels`, `plots`.

    They are relative to the repository's root where `out` is. Files that are named are of `folder`, and JSON.
    """

    def __init__(self, out: str | Path, name: str):
        self.out, self.name, self.folder = Path(out), name, Path(out) / name
        self.patched, self.onnx, self.bmodels, self.plots = (
            self.folder / part for part in ("patched", "onnx", "bmodel", "plots")
        )

    def bmodel(self, mode: str, num_device: int = 1) -> Path:
        """The compiled bmodel of a mode."""
        return self.bmodels / f"{self.name}_{mode}_{num_device}dev.bmodel"

    def require(self, *paths: Path) -> None:
        """Raise UserError for the first path of this folder that is not there yet; it names the notebook to run."""
        for path in paths:
            if not path.exists():
                first = MADE_BY.get(path.relative_to(self.folder).parts[0], "the notebooks before this one")
                raise UserError(f"{path} is not there: run {first} first.")

    def read(self, file: str):
        """What a file holds. Raises UserError where no notebook has written it yet."""
        self.require(self.folder / file)
        return json.loads((self.folder / file).read_bytes())

    def write(self, file: str, value: object) -> None:
        """Write a file, whole or not at all."""
        write_json(self.folder / file, value)
        os.utime(self.folder / file)  # of this run, also where it had this content already


def workspace(out: str | Path, name: str = "") -> Workspace:
    """Change to the repository that the installed helpers are of, and make the folder of this model's artefacts.

    Raises UserError where the helpers were installed without their repository.
    """
    if not all((ROOT / folder).is_dir() for folder in ("notebooks", "patches", "models")):
        raise UserError(
            f"The helpers in {ROOT} are there without their repository: run `make setup` in a clone of it, and take "
            "the kernel of its .venv."
        )
    os.chdir(ROOT)
    work = Workspace(out, name)
    work.folder.mkdir(parents=True, exist_ok=True)
    return work
