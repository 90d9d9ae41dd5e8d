"""The notebooks as a newcomer's CI runs them: the whole chain, each one again from what is there, and broken ones.

Where `make run` has just walked the chain, green, and nothing that decides it has changed since, that run is taken.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from helpers.commands.notebooks import NOTEBOOKS, WALKED, on_demand, sources_digest
from helpers.notebook.runner import OUT
from helpers.notebook.summary import check_summary
from helpers.patching import patching

pytestmark = pytest.mark.slow


def number_of(notebook) -> str:
    """`00b-chip-and-model.ipynb` -> `00b`."""
    return notebook.name.partition("-")[0]


# Short answers by one bmodel, the one that the simulator runs fastest, are enough for another run; the whole chain has
# shown the rest.
SHORTER = {
    "03": ["--set", "real_block=no"],
    "04": ["--set", "max_new_tokens=3", "--set", "modes=['bf16']", "--set", "repetitions=1"],
    "05": ["--set", "clients=5", "--set", "mode=bf16"],
    "06": ["--set", "max_new_tokens=6"],
    "10": ["--set", "max_new_tokens=6", "--set", "mode=bf16", "--set", "modes=['bf16']"],
}
NAMES = sorted(number_of(path) for path in NOTEBOOKS.glob("[0-9]*.ipynb") if not on_demand(path))
SOLUTIONS = [NOTEBOOKS / "solutions" / f"{number}.ipynb" for number in NAMES]


def run(out, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "helpers", "notebooks", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def walked_just_now() -> bool:
    """Whether `make run`, with no setting, has walked this very code to its end."""
    receipt = OUT / WALKED
    return receipt.exists() and json.loads(receipt.read_text()) == {"sources": sources_digest(), "settings": []}


def beside_the_chain(folder, names):
    """What else may be in out/: other models and their notebooks, checkpoints, what tests made."""
    if folder == str(OUT):
        return {name for name in names if (OUT / name).is_dir()} - {"tiny", "notebooks"}
    if folder == str(OUT / "notebooks"):
        return {name for name in names if name.endswith(".ipynb") and name.partition("-")[0] not in NAMES}
    return set()


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """out folder of a whole green run from nothing."""
    out = tmp_path_factory.mktemp("chain") / "out"
    if walked_just_now():
        shutil.copytree(OUT, out, symlinks=True, ignore=beside_the_chain)
    else:
        done = run(out, "--set", "repetitions=1")
        assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_the_whole_chain_is_green_from_nothing(chain):
    summary = json.loads((chain / "summary.json").read_text(encoding="utf-8"))
    assert check_summary(summary) == []
    assert sorted(map(number_of, (chain / "notebooks").glob("*.ipynb"))) == NAMES


def test_every_rung_gives_pytorchs_tokens_for_every_demo_question(chain, demo_questions):
    summary = json.loads((chain / "summary.json").read_text(encoding="utf-8"))
    assert [entry["question"] for entry in summary["questions"]] == demo_questions
    for entry in summary["questions"]:
        tokens = entry["tokens"]
        for rung in ("patched", "onnxruntime", "bf16", "int8"):
            assert tokens[rung] == tokens["pytorch"], (entry["question"], rung)
        assert tokens["int4"]


def test_executed_notebooks_show_no_stray_warnings(chain):
    for path in (chain / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", []):
                assert output.get("name") != "stderr", (path.name, output["text"][:3])


@pytest.mark.parametrize("number", NAMES)
def test_each_notebook_runs_again_on_what_is_there_and_makes_nothing_anew(number, chain):
    artefacts = [*chain.glob("tiny/onnx/*.onnx"), *chain.glob("tiny/bmodel/**/*.bmodel")]
    before = {path: path.stat().st_mtime_ns for path in artefacts}
    done = run(chain, "--only", f"{number}-", *SHORTER.get(number, []))
    assert done.returncode == 0, done.stderr[-2000:]
    assert before and before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_each_solution_runs_on_what_the_notebooks_left(path, copy):
    """And leaves that as it is."""
    before = {file: file.stat().st_mtime_ns for file in (copy / "tiny").rglob("*") if file.is_file()}
    done = run(copy, str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert before == {file: file.stat().st_mtime_ns for file in before}


@pytest.fixture
def copy(chain, tmp_path):
    """The chain's artefacts, to be spoiled."""
    shutil.copytree(chain / "tiny", tmp_path / "out" / "tiny", symlinks=True)
    shutil.copy(chain / "summary.json", tmp_path / "out")
    return tmp_path / "out"


def test_taking_back_a_patch_turns_the_export_red(copy):
    """What each of them is needed for, tests/unit/test_patching.py shows."""
    patching.revert(copy / "tiny" / "patched", only=["05"])
    done = run(copy, "--only", "02")
    assert done.returncode == 1 and "05_present_is_the_new_row" in done.stderr, done.stderr


def test_a_weight_corrupted_between_export_and_compile_turns_the_compilation_red(copy):
    weights = copy / "tiny" / "onnx" / "block_2.weights"
    values = np.fromfile(weights, dtype=np.float32)
    values[len(values) // 2] += 1.0
    values.tofile(weights)
    done = run(copy, "--only", "03")
    assert done.returncode == 1 and "block_2.weights" in done.stderr, done.stderr


def test_a_truncated_bmodel_turns_inference_red(copy):
    bmodel = copy / "tiny" / "bmodel" / "tiny_int8_1dev.bmodel"
    os.truncate(bmodel, bmodel.stat().st_size // 2)
    done = run(copy, "--only", "04")
    assert done.returncode == 1 and "cut off" in done.stderr, done.stderr


def test_a_broken_cell_turns_the_run_red(copy, tmp_path):
    notebook = json.loads((NOTEBOOKS / "00-environment.ipynb").read_text(encoding="utf-8"))
    checks = [cell for cell in notebook["cells"] if "assert not needed" in "".join(cell["source"])]
    checks[0]["source"] = ["assert False, 'broken on purpose'"]
    # Far from the repository, which the notebook finds.
    path = tmp_path / "00-environment.ipynb"
    path.write_text(json.dumps(notebook), encoding="utf-8")
    done = run(copy, str(path))
    assert done.returncode == 1 and "broken on purpose" in done.stderr
