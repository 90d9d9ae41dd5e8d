"""Each trap: a tiny notebook that papermill alone calls a success, and the runner does not."""

import ast
import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import Process

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell

from helpers.cli import main
from helpers.commands import notebooks
from helpers.errors import UserError
from helpers.notebook import checks, runner
from helpers.notebook.checks import parameters_of
from helpers.notebook.runner import NotebookFailed, run_notebook
from helpers.notebook.summary import check_summary, record

WORK = "assert sum([1, 1]) == 2"


def cell(source, *tags):
    return new_code_cell(source, metadata={"tags": list(tags)})


def tutorial(*cells, parameters="seq_length = 64", **declared):
    """A notebook with a heading, a parameters cell, the given cells (sources or cells), and a check."""
    written = [new_markdown_cell("# Title")]
    if parameters is not None:
        written.append(cell(parameters, "parameters"))
    written += [new_code_cell(c) if isinstance(c, str) else c for c in cells]
    if not any("assert " in c.source for c in written):
        written.append(new_code_cell(WORK))
    notebook = new_notebook(cells=written)
    notebook.metadata.tutorial = declared
    return notebook


@pytest.fixture
def write(tmp_path):
    def write(notebook, name="00_tiny.ipynb"):
        folder = tmp_path / "notebooks"
        folder.mkdir(exist_ok=True)
        nbformat.write(notebook, folder / name)
        return folder / name

    return write


@pytest.fixture
def fails(write, tmp_path):
    """Run a notebook that must fail; return its one problem."""

    def fails(notebook, parameters=None, **options):
        with pytest.raises(NotebookFailed) as caught:
            run_notebook(write(notebook), tmp_path / "done.ipynb", parameters, out=tmp_path / "out", **options)
        assert len(caught.value.report.problems) == 1, caught.value.report.problems
        return caught.value.report.problems[0]

    return fails


def papermill_alone(notebook, tmp_path, parameters=None):
    from papermill import execute_notebook

    with contextlib.redirect_stderr(io.StringIO()):
        execute_notebook(
            notebook,
            str(tmp_path / "alone.ipynb"),
            parameters=parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=str(tmp_path),
        )


def test_a_right_notebook_passes(write, tmp_path):
    path = write(
        tutorial(
            "import sys\nprint(sys.prefix)",
            "import json, pathlib\npathlib.Path(out).mkdir(exist_ok=True)\n"
            "pathlib.Path(out, f'net_{seq_length}.json').write_text(json.dumps([1]))",
            "!echo hello from the shell",
            "!yes y | head -n 60",
            "lines = !yes n | head -n 3\nprint(lines)",
            cell("1 / 0", "raises-exception"),
            parameters="seq_length = 64\nout: str = '../out'",
            makes=["net_{seq_length}.json"],
        )
    )
    report = run_notebook(path, tmp_path / "done" / "00.ipynb", {"seq_length": 7}, out=tmp_path / "out")
    assert report.problems == []
    assert report.cells == 9 and report.checks == 1
    done = nbformat.read(tmp_path / "done" / "00.ipynb", as_version=4)
    text = [output.text.strip() for c in done.cells for output in c.get("outputs", []) if "text" in output]
    # A listing that its reader cuts short is no failure, and as many lines as are allowed no wall.
    wanted = [[sys.prefix], ["hello from the shell"], ["y"] * 60, ["['n', 'n', 'n']"]]
    assert [line.splitlines() for line in text] == wanted
    assert (tmp_path / "out" / "net_7.json").exists()


TRAPS = {
    "exit code 0 in a cell": (tutorial("import sys\nsys.exit(0)", "never = 1"), "`import sys`: SystemExit: 0"),
    "exit in the last cell": (tutorial(WORK, "raise SystemExit"), "SystemExit"),
    "exit in a cell that may raise": (
        tutorial(cell("raise SystemExit(0)", "raises-exception")),
        "SystemExit",
    ),
    # It asked its kernel to exit, or, where that was faster than the runner, ended it.
    "quit as the last word": (tutorial(WORK, "exit"), "its kernel"),
    "failing command": (tutorial("!exit 3"), "CommandFailed: `exit 3` ended with exit status 3"),
    "failing command, captured": (tutorial("listing = !ls /nonexistent"), "CommandFailed"),
    "failing command in a pipe": (tutorial("!false | cat"), "CommandFailed"),
    "failing command before another": (tutorial("!false; echo done"), "CommandFailed"),
    "failing command in a function": (
        tutorial("def step(name):\n    !test {name} = right\nstep('wrong')"),
        "`test wrong = right` ended with exit status 1",
    ),
    "command that ends as one whose pipe was closed": (tutorial("!exit 141"), "`exit 141` ended with exit status 141"),
    "failing line of %%bash": (tutorial("%%bash\nfalse\necho done"), "CalledProcessError"),
    "script that may fail": (tutorial("%%script --no-raise-error false\nx"), "hides whether its script fails"),
    "script in the background": (tutorial("%%bash --bg\nfalse"), "hides whether its script fails"),
    "script of a missing program": (tutorial("%%script nonesuch\nx"), "Couldn't find program: 'nonesuch'"),
    "value derived among the parameters": (
        tutorial(WORK, parameters="seq_length = 64\nrows = seq_length * 2"),
        "`rows = seq_length * 2`",
    ),
    "call among the parameters": (tutorial(WORK, parameters="import os"), "`import os`"),
    "parameter set anew": (tutorial("seq_length = 8"), "sets the parameter seq_length anew"),
    "parameter set anew by a loop": (
        tutorial("for seq_length in (8, 16): pass"),
        "sets the parameter seq_length anew",
    ),
    "no parameters tag": (tutorial(WORK, parameters=None), "0 code cells have the tag `parameters`"),
    "two parameters tags": (
        tutorial(WORK, cell("mode = 'int8'", "parameters")),
        "2 code cells have the tag `parameters`",
    ),
    "raises-exception that raises nothing": (
        tutorial(cell("fine = 1", "raises-exception")),
        "raised nothing",
    ),
    "skip-execution": (tutorial(cell("1 / 0", "skip-execution")), "would not run"),
    "raw cell": (tutorial(WORK, new_raw_cell("1 / 0")), "`1 / 0` is a raw cell, which never runs"),
    "empty cell": (tutorial(WORK, ""), "cell 4 `` is empty"),
    "parameters left from a run": (tutorial(cell("seq_length = 1", "injected-parameters")), "an earlier run"),
    "no check": (tutorial("'assert '"), "has no check: at least one `assert`"),
    "check that cannot fail": (tutorial("assert True, 'assert 1'"), "has no check: at least one `assert`"),
    "check of a pair, which always holds": (
        tutorial("assert (seq_length == 0, 'must be 0')"),
        "has no check: at least one `assert`",
    ),
    "extension that watches commands taken away": (
        tutorial(WORK, "get_ipython().extension_manager.loaded.clear()"),
        "ran without helpers.notebook.strict_kernel",
    ),
    "check that is not reached": (tutorial("for _ in []:\n    assert seq_length"), "ran none of its checks"),
    "figure that is not shown": (
        tutorial("from matplotlib import pyplot\npyplot.switch_backend('agg')\npyplot.plot([1])\npyplot.show()"),
        "shows a figure, and there is none in its output",
    ),
    "promised figure that is not shown": (
        tutorial("import matplotlib.pyplot as plt\nplt.plot([1]); plt.savefig('a.png'); plt.close()", makes=["a.png"]),
        "promises figures and shows none",
    ),
    "seconds as evidence": (tutorial(WORK, min_seconds=1), "metadata.tutorial has min_seconds"),
    "broken promise": (tutorial(WORK, makes=["net.onnx"]), "promises net.onnx"),
    "exception in a thread": (
        tutorial("import threading\nt = threading.Thread(target=lambda: 1 / 0)\nt.start(); t.join()"),
        "printed a traceback and went on (ZeroDivisionError: division by zero)",
    ),
    "broken builtins": (
        tutorial(WORK, "import builtins\nimport IPython\nIPython.get_ipython = None"),
        "left a kernel that does not say",
    ),
    "wall of log": (tutorial("for i in range(61): print(i)"), "one output has 61 lines; 60 are allowed"),
    "key of the metadata misspelt": (tutorial(WORK, make=["net.onnx"]), "metadata.tutorial has make"),
}


@pytest.mark.slow
@pytest.mark.parametrize("trap", TRAPS)
def test_trap(trap, fails, tmp_path):
    notebook, message = TRAPS[trap]
    papermill_alone(notebook, tmp_path)
    assert message in fails(notebook)


@pytest.mark.parametrize("source", ["!false &", "x = !false &"])
def test_command_in_the_background(source, fails):
    assert "runs in the background, where nobody sees it fail" in fails(tutorial(source))


def test_check_that_failed_as_it_may_is_none_that_passed(fails):
    assert "ran none of its checks" in fails(tutorial(cell("assert seq_length == 0", "raises-exception")))


def test_unknown_parameter(fails, tmp_path):
    notebook = tutorial(WORK)
    papermill_alone(notebook, tmp_path, {"seq_lenght": 1})
    assert fails(notebook, {"seq_lenght": 1}) == "has no parameter seq_lenght (it has seq_length)"


def test_derived_value_keeps_its_meaning_under_papermill(tmp_path):
    notebook = tutorial("assert rows == 128", parameters="seq_length = 64\nrows = seq_length * 2")
    papermill_alone(notebook, tmp_path, {"seq_length": 1})


def test_error_names_the_cell_and_the_executed_notebook_shows_it(fails, tmp_path):
    notebook = tutorial(WORK, "x = 1\nassert x == 2, 'x must be 2'", "after = 1")
    assert fails(notebook) == "cell 4 `x = 1`: AssertionError: x must be 2"
    done = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    assert [c.get("execution_count") for c in done.cells] == [None, 1, 2, 3, None]
    assert done.cells[3].outputs[0].ename == "AssertionError"


def test_a_notebook_that_takes_no_time_is_right(write, tmp_path):
    """A fast machine is no cheat: cells that do nothing but be right are right, however soon."""
    report = run_notebook(write(tutorial("pass", "assert seq_length == 64")), tmp_path / "done.ipynb", out=tmp_path)
    assert report.problems == [] and (report.cells, report.checks) == (3, 1)


SHOWS = "import matplotlib.pyplot as plt\nplt.plot([1])\nplt.show()"


def test_figures_are_shown_and_checks_run_whatever_the_environment_says(write, tmp_path, monkeypatch, fails):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.setenv("PYTHONOPTIMIZE", "1")
    run_notebook(write(tutorial(SHOWS)), tmp_path / "done.ipynb", out=tmp_path)
    outputs = nbformat.read(tmp_path / "done.ipynb", as_version=4).cells[2].outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "AssertionError: of no use" in fails(tutorial(SHOWS, "assert seq_length == 1, 'of no use'"))


def test_warnings_that_are_errors_in_the_environment_end_nothing(write, tmp_path):
    path = write(tutorial("import warnings\nwarnings.warn('old')", WORK))
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "notebooks", path, "--out", tmp_path / "out"],
        env=os.environ | {"PYTHONWARNINGS": "error"},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_figure_that_depends_is_no_promise(write, tmp_path):
    """Notebook 04 draws measured beside estimated, where there is a chip."""
    notebook = tutorial("if seq_length < 0:\n    import matplotlib.pyplot as plt\n    plt.show()")
    assert run_notebook(write(notebook), tmp_path / "done.ipynb", out=tmp_path).problems == []


WRITES = "import pathlib\npathlib.Path(out, 'a.json').write_text('[1]')"


def test_what_an_earlier_run_left_is_no_evidence(write, tmp_path, fails):
    out = tmp_path / "out"
    out.mkdir()
    run_notebook(write(tutorial(WRITES, parameters="out = ''", makes=["a.json"])), tmp_path / "done.ipynb", out=out)
    run_notebook(write(tutorial(WRITES, parameters="out = ''", makes=["a.json"])), tmp_path / "done.ipynb", out=out)
    for promise in ("a.json", "*.json"):
        said = fails(tutorial("pass", makes=[promise]))
        assert said == f"promises {promise}, which is left from an earlier run: this one did not write it"
    (out / "b.json").write_text("[2]")
    notebook = tutorial(WRITES, parameters="out = ''", makes=["*.json"])
    assert run_notebook(write(notebook), tmp_path / "done.ipynb", out=out).problems == []


@pytest.mark.parametrize("promise", ["nets", "nets/net.bin"])
def test_what_an_earlier_run_left_counts_where_a_manifest_proves_it(promise, write, tmp_path, fails):
    from helpers.artefacts import building

    with building(tmp_path / "out" / "nets", kind="test", inputs={}, settings={}) as staging:
        staging.mkdir()
        (staging / "net.bin").write_bytes(b"12345")
    notebook = tutorial("pass", makes=[promise])
    assert run_notebook(write(notebook), tmp_path / "done.ipynb", out=tmp_path / "out").problems == []
    (tmp_path / "out" / "nets" / "net.bin").write_bytes(b"12344")
    assert "net" in fails(notebook)


def test_a_patched_checkpoint_of_an_earlier_run_counts_while_it_is_as_patching_left_it(write, tmp_path, fails, tiny):
    from helpers.patching import patching

    patching.apply(tiny, out=tmp_path / "out" / "patched", seq_length=16)
    notebook = tutorial("pass", makes=["patched"])
    assert run_notebook(write(notebook), tmp_path / "done.ipynb", out=tmp_path / "out").problems == []
    code = tmp_path / "out" / "patched" / "modeling_qwen.py"
    code.write_bytes((tiny / "modeling_qwen.py").read_bytes())
    assert "is not patched" in fails(notebook)


def test_cells_must_have_run_in_order():
    notebook = tutorial("first = 1", "second = 2")
    for count, one in enumerate(notebook.cells[1:], start=1):
        one.execution_count = count
    assert checks.check_executed(notebook, []) == []
    notebook.cells[2].execution_count, notebook.cells[3].execution_count = 3, 2
    assert checks.check_executed(notebook, []) == ["cell 3 `first = 1` ran as number 3; it is code cell 2"]


def test_cell_that_hangs_is_stopped_with_what_it_started(fails, tmp_path):
    notebook = tutorial(
        "import subprocess, pathlib\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))",
        "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('waiting', flush=True)\n"
        "while True: signal.pause()",
    )
    for seconds in (2, 20, 200):  # on a busy machine the cells before it may take longer than the bound
        problem = fails(notebook, cell_seconds=seconds)
        if "cell 4" in problem:
            break
    assert problem == f"cell 4 `import signal`: ran longer than {seconds} s and was stopped"
    done = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    assert [output.output_type for output in done.cells[3].outputs] == ["stream", "error"]
    child = int((tmp_path / "pid").read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(child).wait()


def test_kernel_that_dies(fails, tmp_path):
    assert fails(tutorial(WORK, "import os\nos._exit(0)")) == "cell 4 `import os`: ended its kernel"
    done = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    assert done.cells[3].outputs[-1].evalue == "The runner: this cell ended its kernel."


def test_flood_of_output_is_stopped(fails):
    assert "printed more than 5,000,000 characters" in fails(tutorial("while True: print('x' * 1000)"))


def test_the_kernel_is_this_interpreter_whatever_is_registered(write, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "other", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    notebook = tutorial("import sys, shutil\nassert shutil.which('python').startswith(sys.prefix)", WORK)
    with pytest.raises(Exception):  # noqa: B017  papermill alone takes the registered one, and dies with it
        papermill_alone(notebook, tmp_path)
    assert run_notebook(write(notebook), tmp_path / "done.ipynb", out=tmp_path).problems == []


def test_all_that_a_parameter_cell_may_hold():
    source = "# What can be changed\na = 1  # rows\nb: float = -0.5\nc = ['x', None]\nd = {'k': (1, True)}"
    assert parameters_of(tutorial(parameters=source)) == {"a": 1, "b": -0.5, "c": ["x", None], "d": {"k": (1, True)}}
    for derived in ("a = b", "a = f'{1}'", "a = 1 + 1", "a = b = 1", "a, b = 1, 2", "a: int", "a += 1", "a = 1\na = 2"):
        with pytest.raises(ValueError, match="parameters cell"):
            parameters_of(tutorial(parameters=derived))


def is_plumbing(source: str) -> bool:
    """Whether a cell only finds paths, records or checks: it shows nothing and defines nothing."""
    if any(line.startswith(("%", "!")) or "= !" in line for line in source.splitlines()):
        return False
    body = ast.parse(source).body
    nodes = [node for statement in body for node in ast.walk(statement)]
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    ends_with_a_value = isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Call)
    if ends_with_a_value or calls & {"print", "show", "plots.show", "display", "Code", "chat_box"}:
        return False
    defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in nodes)
    checks = any(isinstance(node, ast.Assert) for node in nodes)
    return not defines and (checks or bool(calls & {"workspace", "record", "work.write"}))


@pytest.mark.parametrize("path", sorted(notebooks.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_plumbing_is_folded_in_jupyterlab_and_in_a_book_and_nothing_else_is(path):
    for number, one in enumerate(nbformat.read(path, as_version=4).cells, start=1):
        in_a_book = "hide-input" in checks.tags(one)
        in_jupyterlab = one.metadata.get("jupyter", {}).get("source_hidden", False)
        folded = one.cell_type == "code" and is_plumbing(one.source)
        assert (in_a_book, in_jupyterlab) == (folded, folded), f"cell {number}: {one.source}"


GOOD = {
    "a.json": b"{}",
    "notes.txt": b"x",
}
BAD = {
    "a.json": b"{",
    "notes.txt": b"",
    "a.png": b"\x89PNG\r\n\x1a\n",
    "a.onnx": b"x",
}


def test_artefacts_must_load(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    for name, data in GOOD.items():
        (tmp_path / name).write_bytes(data)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    onnx.save(
        helper.make_model(helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [value], [out])),
        tmp_path / "a.onnx",
    )
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.figure().savefig(tmp_path / "a.png")
    names = [*GOOD, "a.onnx", "a.png"]
    assert checks.check_artefacts(names, tmp_path, {}) == []
    picture = (tmp_path / "a.png").read_bytes()
    flat = picture[:20] + bytes(4) + picture[24:]
    for name, data in [*BAD.items(), ("a.png", picture[:-20]), ("a.png", flat)]:
        (tmp_path / name).write_bytes(data)
        problems = checks.check_artefacts([name], tmp_path, {})
        assert len(problems) == 1 and f"made {name}, which does not load" in problems[0]


def test_artefact_patterns(tmp_path):
    out = tmp_path / "out"
    (out / "empty").mkdir(parents=True)
    (out / "net_int8.txt").write_text("x")

    def check(pattern, **parameters):
        return checks.check_artefacts([pattern], out, parameters)

    assert check("net_{mode}.txt", mode="int8") == [] == check("net_*.txt")
    assert "promises net_int4.txt" in check("net_{mode}.txt", mode="int4")[0]
    assert "the folder is empty" in check("empty")[0]


def test_artefact_must_be_what_its_manifest_says(tmp_path):
    from helpers.artefacts import building

    with building(tmp_path / "nets", kind="test", inputs={}, settings={}) as staging:
        staging.mkdir()
        (staging / "net.bin").write_bytes(b"12345")
    assert checks.check_artefacts(["nets"], tmp_path, {}) == []
    (tmp_path / "nets" / "net.bin").write_bytes(b"123")
    assert "not those that its manifest lists" in checks.check_artefacts(["nets"], tmp_path, {})[0]


def test_record_merges(tmp_path):
    record(tmp_path, {"model": "tiny", "bytes": {"a": 1}, "questions": [{"question": "q", "tokens": {"pytorch": [1]}}]})
    record(tmp_path, {"bytes": {"b": 2}, "questions": [{"question": "q", "answer": "x", "tokens": {"int8": [1, 2]}}]})
    record(tmp_path, {"questions": [{"question": "r", "tokens": {"pytorch": [3]}}]})
    summary = record(tmp_path, {"questions": [{"question": "q", "tokens": {"int8": [9]}}]})
    assert (
        summary
        == json.loads((tmp_path / "summary.json").read_text())
        == {
            "model": "tiny",
            "bytes": {"a": 1, "b": 2},
            "questions": [
                {"question": "q", "answer": "x", "tokens": {"pytorch": [1], "int8": [9]}},
                {"question": "r", "tokens": {"pytorch": [3]}},
            ],
        }
    )
    with pytest.raises(ValueError, match="no modle; it has model"):
        record(tmp_path, {"modle": "tiny"})


def _record_some(out, start):
    for i in range(start, start + 25):
        record(out, {"bytes": {str(i): i}})


def test_record_loses_nothing_when_two_write(tmp_path):
    writers = [Process(target=_record_some, args=(tmp_path, start)) for start in (0, 100)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(json.loads((tmp_path / "summary.json").read_text())["bytes"]) == 50


RUNGS = ("pytorch", "patched", "onnxruntime", "bf16", "int8", "int4")
SUMMARY = {
    "model": "tiny",
    "engine": "simulator",
    "versions": {"torch": "2.11.0"},
    "questions": [{"question": "q", "answer": "a", "tokens": {rung: [1] for rung in RUNGS}}],
    "parity": {"bf16": {"block_0": {"max_abs": 0.1, "cosine": 0.999}}},
    "bytes": {"tiny.bmodel": 7},
    "estimates": {"int8": {"first_token_ms": 1.5, "decode_ms": 1}},
    "wall_s": {"00_environment": 1.0},
}


def test_complete_summary():
    assert check_summary(SUMMARY) == []


@pytest.mark.parametrize("key", SUMMARY)
def test_summary_lacks_nothing(key):
    problems = check_summary({name: value for name, value in SUMMARY.items() if name != key})
    assert len(problems) == 1 and key in problems[0]


@given(rung=st.sampled_from(RUNGS), value=st.sampled_from([None, [], ["1"], [1.5]]))
def test_summary_wants_every_rung(rung, value):
    summary = json.loads(json.dumps(SUMMARY))
    summary["questions"][0]["tokens"][rung] = value
    assert [p for p in check_summary(summary) if rung in p]


def test_summary_refuses_what_is_no_number():
    summary = json.loads(json.dumps(SUMMARY))
    summary["parity"]["bf16"]["block_0"]["max_abs"] = None
    summary["extra"] = 1
    assert len(check_summary(summary)) == 2


# The command line


@pytest.fixture
def tutorial_folder(write, monkeypatch):
    write(tutorial(WORK, parameters="seq_length = 64\nscale = 1.0"), "00_first.ipynb")
    write(tutorial("assert mode == 'int8'", parameters="mode = 'int8'"), "01_second.ipynb")
    path = write(tutorial(WORK), "02_third.ipynb")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", path.parent)
    return path.parent


def test_command_line_runs_red(tutorial_folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["notebooks", "--out", str(out), "--from", "01", "--set", "mode=bf16"]) == 1
    said = capsys.readouterr().err
    assert "error: 01_second.ipynb, cell 3 `assert mode == 'int8'`: AssertionError" in said
    assert "Traceback" not in said
    assert sorted(os.listdir(out / "notebooks")) == ["01_second.ipynb"]


def test_command_line_runs_some(tutorial_folder, tmp_path, capsys):
    out = tmp_path / "out"
    record(out, {"wall_s": {"earlier": 1.0}})
    assert main(["notebooks", "--out", str(out), "--only", "01", "--only", "02", "--set", "seq_length=8"]) == 0
    assert sorted(json.loads((out / "summary.json").read_text())["wall_s"]) == ["01_second", "02_third", "earlier"]
    assert "seq_length = 8" in (out / "notebooks" / "02_third.ipynb").read_text()
    assert "01_second.ipynb" in capsys.readouterr().out


def test_what_runs_on_demand_runs_where_it_is_asked_for_only(tutorial_folder, write, tmp_path):
    path = write(tutorial(WORK, on_demand=True), "03_download.ipynb")
    out = tmp_path / "out"
    asked = (["--only", "03"], 1), ([str(path)], 1), (["--from", "02"], 0)
    for arguments, runs in asked:
        (out / "notebooks" / path.name).unlink(missing_ok=True)
        assert main(["notebooks", "--out", str(out), *arguments]) == 0
        assert (out / "notebooks" / path.name).exists() == runs, arguments


def test_a_part_of_the_set_wants_no_whole_summary_and_proves_no_whole_run(tutorial_folder, tmp_path):
    out = tmp_path / "out"
    for arguments, code in ((["--from", "01"], 0), (["--only", "01", "--set", "mode=bf16"], 1)):
        out.mkdir(exist_ok=True)
        (out / notebooks.WALKED).write_text("{}")
        assert main(["notebooks", "--out", str(out), *arguments]) == code
        assert not (out / notebooks.WALKED).exists()


def test_whatever_decides_how_a_run_goes_is_among_its_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    places = ["requirements.txt", "helpers/a/b.py", "notebooks/0.ipynb", "patches/01.py", "models/tiny/train.py"]
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("before")
    digests = {notebooks.sources_digest()}
    for place in places:
        (tmp_path / place).write_text("after")
        digests.add(notebooks.sources_digest())
    assert len(digests) == 1 + len(places)


def test_whole_set_wants_a_whole_summary(tutorial_folder, tmp_path, capsys):
    out = tmp_path / "out"
    record(out, {"model": "of an earlier run"})
    assert main(["notebooks", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert "error: summary.json, model: Field required" in said and "parity" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "seq_lenght=8"], "no notebook of this run has that parameter"),
        (["--set", "seq_length=long"], "a value like 64 is needed"),
        (["--set", "seq_length=True"], "a value like 64 is needed"),
        (["--set", "seq_length"], "needed is NAME=VALUE"),
        (["--only", "07"], "No notebook was chosen; there are 00_first.ipynb"),
        (["--only", ""], "No notebook was chosen"),
        (["--cell-seconds", "-1"], "--cell-seconds is -1, it must be a number over 0"),
        (["--cell-seconds", "nan"], "--cell-seconds is nan, it must be a number over 0"),
        (["nonesuch.ipynb"], "does not exist"),
    ],
)
def test_command_line_refuses(arguments, message, tutorial_folder, tmp_path, capsys):
    assert main(["notebooks", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_settings_are_literals_or_text():
    assert notebooks._settings(["a=1", "b=int8", "c=['x']", "d=a=b", "e=True"]) == {
        "a": 1,
        "b": "int8",
        "c": ["x"],
        "d": "a=b",
        "e": True,
    }


BARS = """
from tqdm.auto import tqdm
for i in tqdm(range(4), desc="kept"):
    pass
print(i)
"""


def test_there_are_no_progress_bars_that_are_not_drawn_everywhere(write, tmp_path):
    run_notebook(write(tutorial(BARS, WORK)), tmp_path / "done.ipynb", out=tmp_path / "out")
    done = nbformat.read(tmp_path / "done.ipynb", as_version=4)
    assert [output.text for output in done.cells[2].outputs] == ["3\n"]


def test_not_a_notebook(tmp_path):
    for text in ("", "{}", "[1]", '{"cells": 3, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}'):
        path = tmp_path / "broken.ipynb"
        path.write_text(text)
        with pytest.raises(UserError, match="is not a notebook"):
            runner.read_notebook(path)


def test_kernel_that_does_not_start(fails, monkeypatch, tmp_path):
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert "its kernel did not start" in fails(tutorial(WORK))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_stopped_runner_leaves_no_kernel(number, code, write, tmp_path):
    path = write(
        tutorial(
            f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
            "time.sleep(600)"
        )
    )
    started = subprocess.Popen(
        [sys.executable, "-m", "helpers", "notebooks", str(path), "--out", str(tmp_path / "out")],
        cwd=runner.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert started.poll() is None
        time.sleep(0.1)
    kernel = psutil.Process(int(pid.read_text()))
    started.send_signal(number)
    _, said = started.communicate()
    assert started.returncode == code and "Traceback" not in said, said
    kernel.wait()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_summary_that_is_none_is_one_sentence(tmp_path, text):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(UserError, match="is not a summary"):
        record(tmp_path, {"model": "tiny"})
