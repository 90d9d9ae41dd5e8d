"""Where a notebook works, wherever its kernel was started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.errors import UserError
from helpers.notebook.workspace import ROOT, workspace


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


def test_helpers_without_their_repository_say_what_to_do(own_copy):
    code = "from helpers.notebook.workspace import workspace; workspace('out')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=own_copy.root, capture_output=True, text=True, check=False
    )
    said = f"UserError: The helpers in {own_copy.root} are there without their repository: run `make setup` in a clone"
    assert done.returncode == 1 and said in done.stderr.splitlines()[-1]
