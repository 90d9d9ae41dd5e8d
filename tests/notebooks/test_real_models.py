"""Notebook 07 by its own code, on a small GGUF of random weights that is made here; and its solution."""

import json

import pytest

from helpers.commands.notebooks import NOTEBOOKS
from tests.notebooks.test_chain import run
from tests.unit.test_convert import reference, trained, write_gguf

pytestmark = pytest.mark.slow

SHORT = ("name=small", "seq_length=96", "modes=['int8']", "max_new_tokens=5", "new_tokens=2", "engine=simulator")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    gguf = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_gguf(gguf, reference("llama", tied=True), trained("smollm"))
    return [part for pair in (*SHORT, f"gguf={gguf}") for part in ("--set", pair)]


@pytest.fixture(scope="module")
def walked(tmp_path_factory, settings):
    """out folder of notebook 07."""
    out = tmp_path_factory.mktemp("real") / "out"
    done = run(out, "--only", "07", *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_a_real_model_goes_the_whole_way(walked):
    record = json.loads((walked / "small" / "answer.json").read_text(encoding="utf-8"))
    assert sorted(record["rungs"]) == ["int8", "onnx", "patched"] and record["answer"]
    for rung in ("onnx", "patched"):
        assert record["rungs"][rung]["same"] == record["rungs"][rung]["rows"] > 1, rung
    assert record["rungs"]["patched"]["mean_kl"] < 1e-6 < record["rungs"]["int8"]["mean_kl"]


def test_a_second_run_makes_nothing_anew(walked, settings):
    kinds = "small/checkpoint/*", "small/onnx/*", "small/bmodel/*.bmodel", "small/computed/*"
    before = {path: path.stat().st_mtime_ns for kind in kinds for path in walked.glob(kind)}
    done = run(walked, "--only", "07", *settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(before) > 20 and before == {path: path.stat().st_mtime_ns for path in before}


def test_its_solution_runs_on_what_it_left(walked):
    done = run(walked, str(NOTEBOOKS / "solutions" / "07.ipynb"), "--set", "name=small")
    assert done.returncode == 0, done.stderr[-2000:]
