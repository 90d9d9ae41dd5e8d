"""The pictures of masks and of lookahead steps, and how a picture is shown. (Those of times are in test_latency.py.)"""

import base64

import matplotlib
import nbconvert
import nbformat
import numpy as np
from bs4 import BeautifulSoup
from matplotlib.colors import to_rgb
from PIL import Image

from helpers.nets import decode_mask
from helpers.notebook import plots
from helpers.notebook.runner import run_notebook

matplotlib.use("agg")


def test_a_mask_is_drawn_as_it_is_with_its_rows_by_name():
    rows = np.concatenate([decode_mask(position, 8)[0, 0] for position in (5, 6)])
    figure = plots.step_mask(rows, ["5", "6"], "decode")
    assert np.array_equal(figure.axes[0].images[0].get_array(), rows)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["5", "6"]


def test_one_token_a_step_is_plain_decoding():
    figure = plots.tokens_of_steps({"one": [1, 1], "two": [1, 3, 2]}, chosen="two")
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"one": [1, 2, 3], "two": [1, 2, 5, 7], "plain decoding": [1, 4]}
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1, 3, 2]


def test_a_figure_that_is_shown_is_the_file_that_is_written(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda data, raw: shown.append(data["image/png"]))
    plots.show(plots.token_times({"int8": [0.2, 0.1]}, "estimated"), tmp_path / "plots" / "times.png", "two times")
    assert [base64.b64decode(data) for data in shown] == [(tmp_path / "plots" / "times.png").read_bytes()]
    picture = Image.open(tmp_path / "plots" / "times.png")
    assert picture.width == 1080
    assert picture.getpixel((0, 0))[3] == 0, "a white box on a dark page"


def test_ink_is_read_on_a_white_page_and_on_a_dark_one():
    def luminance(colour):
        return np.dot(np.power((np.array(to_rgb(colour)) + 0.055) / 1.055, 2.4), (0.2126, 0.7152, 0.0722))

    for page in ("#ffffff", "#111111"):
        dark, light = sorted((luminance(page), luminance(plots.INK)))
        assert (light + 0.05) / (dark + 0.05) > 4.3


def test_exported_html_has_the_alternative_text(tmp_path):
    alt = 'Two bars, "a" < "b" & more'
    code = "from helpers.notebook import plots\nfigure = plots.token_times({'int8': [0.2, 0.1]}, 'estimated')\n"
    code += f"plots.show(figure, {str(tmp_path / 'times.png')!r}, {alt!r})\nassert figure"
    cells = [nbformat.v4.new_code_cell("x = 1", metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "source.ipynb")
    run_notebook(tmp_path / "source.ipynb", tmp_path / "executed.ipynb", out=tmp_path)
    page, _ = nbconvert.HTMLExporter().from_filename(tmp_path / "executed.ipynb")
    (image,) = BeautifulSoup(page, "html.parser").find_all("img")
    assert image["alt"] == alt and image["src"].startswith("data:image/png")
