"""Where a notebook works, wherever its kernel was started."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from helpers.errors import UserError
from helpers.notebook.checks import code_cells
from helpers.notebook.workspace import MADE_BY, ROOT, workspace


def test_a_notebook_works_in_the_repository_wherever_its_kernel_was_started(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = workspace(tmp_path / "out", "tiny")
    assert Path.cwd() == ROOT and (ROOT / "notebooks" / "00-environment.ipynb").is_file()
    assert work.folder == tmp_path / "out" / "tiny" and work.folder.is_dir()
    assert work.bmodel("int8", num_device=2) == work.folder / "bmodel" / "tiny_int8_2dev.bmodel"


def test_paths_are_short_where_out_is_in_the_repository(monkeypatch):
    monkeypatch.chdir("/")
    work = workspace("out/tests")
    assert str(work.onnx) == "out/tests/onnx" and os.path.samefile(work.out, ROOT / "out" / "tests")


def test_what_one_notebook_writes_the_next_one_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work = workspace(tmp_path, "tiny")
    work.write("tokens.json", {"深圳": [1, 2]})
    before = (tmp_path / "tiny" / "tokens.json").stat().st_mtime_ns
    work.write("tokens.json", {"深圳": [1, 2]})
    assert (tmp_path / "tiny" / "tokens.json").stat().st_mtime_ns > before, "the runner takes it for an earlier run's"
    assert work.read("tokens.json") == {"深圳": [1, 2]}
    with pytest.raises(UserError, match="answers.json is not there: run the notebooks before this one first"):
        work.read("answers.json")


@pytest.mark.parametrize(
    "notebook, needed",
    [
        ("02", ["01"]),
        ("03", ["02"]),
        ("04", ["01", "02", "03"]),
        ("05", ["03"]),
        ("06", ["01", "02", "03"]),
        ("09", ["01", "03"]),
        ("10", ["01", "02", "03"]),
    ],
)
def test_a_notebook_out_of_order_names_the_one_to_run_first(notebook, needed, tmp_path, monkeypatch):
    (path,) = (ROOT / "notebooks").glob(f"{notebook}-*.ipynb")
    begin = "\n".join(cell.source for cell in code_cells(nbformat.read(path, as_version=4))[:2])
    monkeypatch.chdir(ROOT)
    named = []
    for _ in MADE_BY | dict.fromkeys(("bf16", "int4")):  # what 04 takes of 03 are three files
        try:
            exec(begin.replace('"out"', repr(str(tmp_path))), {})
        except UserError as error:
            if found := re.fullmatch(r"(.+) is not there: run notebook (\d+) first\.", str(error)):
                Path(found[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(found[1]).write_text("{}")
                named += [found[2]] if found[2] not in named else []
    assert named == needed


def test_helpers_without_their_repository_say_what_to_do(own_copy):
    code = "from helpers.notebook.workspace import workspace; workspace('out')"
    done = subprocess.run([sys.executable, "-c", code], cwd=own_copy.root, capture_output=True, text=True, check=False)
    said = f"UserError: The helpers in {own_copy.root} are there without their repository: run `make setup` in a clone"
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1]
