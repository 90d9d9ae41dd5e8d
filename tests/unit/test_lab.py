"""The reader's copy of the notebooks: brought up to date, and never over what the reader has changed."""

import nbformat
import pytest

from helpers.notebook.lab import refresh


def notebook(text: str, output: str | None = None):
    cell = nbformat.v4.new_code_cell(text)
    if output:
        cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text=output)], 7
    return nbformat.v4.new_notebook(cells=[cell])


@pytest.fixture
def folders(tmp_path):
    originals, lab = tmp_path / "notebooks", tmp_path / "lab"
    (originals / "solutions").mkdir(parents=True)
    (originals / "images").mkdir()
    (originals / "images" / "chip.svg").write_text("<svg/>")
    nbformat.write(notebook("1 + 1"), originals / "00.ipynb")
    nbformat.write(notebook("2 + 2"), originals / "solutions" / "00.ipynb")
    assert refresh(originals, lab) == []
    return originals, lab


def text_of(path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source


def test_all_is_copied(folders):
    _, lab = folders
    assert (lab / "images" / "chip.svg").is_file()
    assert text_of(lab / "00.ipynb") == "1 + 1" and text_of(lab / "solutions" / "00.ipynb") == "2 + 2"


def test_what_was_only_run_and_saved_follows_its_original(folders):
    originals, lab = folders
    nbformat.write(notebook("1 + 1", "2"), lab / "00.ipynb")
    assert refresh(originals, lab) == [] and nbformat.read(lab / "00.ipynb", as_version=4).cells[0].outputs
    nbformat.write(notebook("1 + 2"), originals / "00.ipynb")
    assert refresh(originals, lab) == [] and text_of(lab / "00.ipynb") == "1 + 2"


def test_what_the_reader_changed_stays_and_what_is_new_lies_beside_it(folders):
    originals, lab = folders
    nbformat.write(notebook("mine"), lab / "00.ipynb")
    assert refresh(originals, lab) == [] and text_of(lab / "00.ipynb") == "mine"
    nbformat.write(notebook("1 + 2"), originals / "00.ipynb")
    (said,) = refresh(originals, lab)
    assert "lab/00.ipynb has your changes" in said and "lab/00.new.ipynb" in said
    assert text_of(lab / "00.ipynb") == "mine" and text_of(lab / "00.new.ipynb") == "1 + 2"
    assert refresh(originals, lab) == [] and text_of(lab / "00.ipynb") == "mine"


def test_a_copy_that_is_no_notebook_any_more_stays(folders):
    originals, lab = folders
    (lab / "00.ipynb").write_text("{ broken")
    nbformat.write(notebook("1 + 2"), originals / "00.ipynb")
    assert len(refresh(originals, lab)) == 1 and (lab / "00.ipynb").read_text() == "{ broken"
