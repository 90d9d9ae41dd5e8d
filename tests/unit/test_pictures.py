"""The pictures in the notebooks' text: they are there, they say in words what they show, and they travel."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers.notebook.runner import run_notebook

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
DRAWINGS = sorted((NOTEBOOKS / "images").glob("*.svg"))
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]+)\)")


def pictures() -> list[tuple[str, str, str]]:
    """(notebook, alternative text, target) of every picture."""
    found = []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        found += [(path.name, *picture) for picture in PICTURE.findall(text)]
    return found


def test_each_is_there_and_says_in_words_what_it_shows():
    assert {target for _, _, target in pictures()} >= {"images/chip.svg", "images/qwen-block.svg"}
    assert [picture for picture in pictures() if not (NOTEBOOKS / picture[2]).is_file()] == []
    assert [picture for picture in pictures() if len(picture[1].split()) < 5] == []


def test_none_is_left_that_no_notebook_shows():
    assert {path.name for path in DRAWINGS} == {Path(target).name for _, _, target in pictures()}


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.name)
def test_a_drawing_has_a_title_and_a_description(path):
    root = ElementTree.parse(path).getroot()
    for name in ("title", "desc"):
        assert root.findtext(f"{{http://www.w3.org/2000/svg}}{name}", "").strip(), name
    assert root.get("role") == "img" and root.get("aria-labelledby") == "title desc"


def test_the_executed_notebook_has_them_beside_it(tmp_path):
    (tmp_path / "notebooks" / "images").mkdir(parents=True)
    (tmp_path / "notebooks" / "images" / "chip.svg").write_bytes(DRAWINGS[0].read_bytes())
    cells = [
        {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "![A chip](images/chip.svg)"},
        {"cell_type": "code", "id": "b", "metadata": {"tags": ["parameters"]}, "source": "rows = 1"},
        {"cell_type": "code", "id": "c", "metadata": {}, "source": "assert rows == 1"},
    ]
    for cell in cells[1:]:
        cell |= {"execution_count": None, "outputs": []}
    path = tmp_path / "notebooks" / "00_drawn.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    run_notebook(path, tmp_path / "done" / path.name, out=tmp_path)
    # Run again, it finds them there; run in place, it has nothing to bring.
    run_notebook(path, tmp_path / "done" / path.name, out=tmp_path)
    run_notebook(path, path.with_name("executed.ipynb"), out=tmp_path)
    assert (tmp_path / "done" / "images" / "chip.svg").read_bytes() == DRAWINGS[0].read_bytes()
