"""The pictures of masks and of lookahead steps. (Those of times are in test_latency.py.)"""

import matplotlib
import numpy as np
from PIL import Image

from helpers.nets import decode_mask
from helpers.notebook import plots

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
    monkeypatch.setattr(plots, "display", shown.append)
    plots.show(plots.token_times({"int8": [0.2, 0.1]}, "estimated"), tmp_path / "plots" / "times.png")
    assert [image.data for image in shown] == [(tmp_path / "plots" / "times.png").read_bytes()]
    assert Image.open(tmp_path / "plots" / "times.png").width == 1080
