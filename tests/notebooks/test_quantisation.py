"""Notebook 08 by its own code, on the embedded model; and its solution."""

import json

import pytest

from helpers.commands.notebooks import NOTEBOOKS
from tests.notebooks.test_chain import run

pytestmark = pytest.mark.slow

SHORT = ("name=tiny", "pieces=4", "calibration_tokens=2048", "ingredients=True")


@pytest.fixture(scope="module")
def walked(tmp_path_factory, patched_tiny, onnx_tiny, compile_tiny):
    """out folder of notebook 08, on nets and bmodels that are as notebook 07 leaves them."""
    out = tmp_path_factory.mktemp("quantisation") / "out"
    (out / "tiny").mkdir(parents=True)
    bmodels = {compile_tiny(mode).parent for mode in ("bf16", "int8", "int4")}
    for name, folder in {"patched": patched_tiny, "onnx": onnx_tiny, "bmodel": bmodels.pop()}.items():
        (out / "tiny" / name).symlink_to(folder)
    done = run(out, "--only", "08", *(part for pair in SHORT for part in ("--set", pair)))
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_each_row_of_the_table_has_its_figures(walked):
    rows = {row["label"]: row for row in json.loads((walked / "tiny" / "quantisation.json").read_bytes())}
    assert list(rows) == ["bf16", "int8", "int4", "int4, calibrated", "int4, calibrated, head int8"]
    kl = {label: row["kl"][0] for label, row in rows.items()}
    assert kl["bf16"] < kl["int8"] < kl["int4, calibrated"] < kl["int4"]
    for column in ("first token, ms (estimated)", "token/s (estimated)", "bmodel, MB"):
        assert rows["int4"][column] == rows["int4, calibrated"][column] > 0, column
    for row in rows.values():
        assert row["tokens"] == 4 * 256 and len(row["own"]) == len(row["accumulated"]) > 1


def test_its_solution_runs_on_what_it_left(walked):
    solution = str(NOTEBOOKS / "solutions" / "08.ipynb")
    done = run(walked, solution, "--set", "name=tiny", "--set", "few=2")
    assert done.returncode == 0, done.stderr[-2000:]
