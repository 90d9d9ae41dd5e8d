"""Run the notebooks headless, where green means that they did what they say.

Papermill executes; what it calls a success without reason is refused here, before (`check_source`) or after
(`check_executed`, `check_artefacts`). What a notebook declares in its metadata, all of it optional:

    "tutorial": {
        "makes": ["patched/config.json", "{name}_{mode}_1dev.bmodel"],   # paths below the out folder; {parameter}, *
        "cell_seconds": 36000,   # a cell that runs longer hangs
        "max_lines": 60          # no output is longer: a wall of log is not a tutorial
    }

That a notebook did its work is never told by the clock, since a fast machine would be called a cheat. Evidence tells:
every code cell ran, in order; checks (`assert`) ran, and passed; each promised artefact was written by this run, or has
a manifest that proves its content; a cell that shows a figure has one.
"""

import ast
import contextlib
import json
import math
import os
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from helpers.artefacts import is_whole, manifest_path, read_manifest
from helpers.errors import UserError
from helpers.files import digest_of, locked, sha256_file, write_json
from helpers.patching import patching

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
OUT = ROOT / "out"
# Of a whole run that was green: what it was of. `make test` takes that run's artefacts where nothing has changed since.
WALKED = "walked.json"
SUMMARY_KEYS = ("model", "engine", "versions", "questions", "parity", "bytes", "estimates", "wall_s")
# Bounds for what hangs, not for what is slow: a second as a rule, on a slow and busy machine hundreds of times that.
KERNEL_START_SECONDS = 3600
OUTPUT_SECONDS = 3600
# More text than this in one cell fills the memory of runner and reader before any time limit is reached.
MAX_CELL_CHARACTERS = 5_000_000


@dataclass
class Declaration:
    """What a notebook's metadata.tutorial says about it. Seconds are wall time."""

    makes: list[str] = field(default_factory=list)
    cell_seconds: float = 36000
    max_lines: int = 60

    @classmethod
    def of(cls, notebook) -> "Declaration":
        """Raises ValueError where the metadata has a key that is not one of these."""
        declared = dict(notebook.metadata.get("tutorial", {}))
        unknown = sorted(set(declared) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"metadata.tutorial has {', '.join(unknown)}, which the runner does not know")
        return cls(**declared)


@dataclass
class Report:
    """How a run went. `checks`: asserts that passed; `seconds`: wall time of the cells; `problems`: none if right."""

    notebook: str
    executed: Path
    cells: int = 0
    checks: int = 0
    seconds: float = 0.0
    stderr_outputs: int = 0
    problems: list[str] = field(default_factory=list)


class NotebookFailed(Exception):
    """A notebook that is not what it should be or did not do what it says; `report` has every problem."""

    def __init__(self, report: Report):
        super().__init__("; ".join(f"{report.notebook}, {problem}" for problem in report.problems))
        self.report = report


# Before the run


def _tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def _code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _name(notebook, cell) -> str:
    """`cell 5 \\`first line\\``, counted from 1 over the cells that the author wrote."""
    written = [c for c in notebook.cells if "injected-parameters" not in _tags(c)]
    first = next((line for line in cell.source.splitlines() if line.strip()), "").strip()
    first = first if len(first) <= 60 else first[:57] + "..."
    return f"cell {written.index(cell) + 1} `{first}`" if cell in written else f"the injected cell `{first}`"


def parameters_of(notebook) -> dict[str, object]:
    """Names and default values of the notebook's parameters.

    Raises ValueError unless just one cell has the tag `parameters` and holds nothing but `name = literal`: a value
    derived there keeps its old meaning when the runner sets another one after it.
    """
    tagged = [cell for cell in _code_cells(notebook) if "parameters" in _tags(cell)]
    if len(tagged) != 1:
        raise ValueError(f"{len(tagged)} code cells have the tag `parameters`; needed: just one")
    values: dict[str, object] = {}
    try:
        statements = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise ValueError(f"the parameters cell is not plain Python: {error}") from None
    for statement in statements:
        if isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        else:
            targets = getattr(statement, "targets", [])
        try:
            if len(targets) != 1 or not isinstance(targets[0], ast.Name):
                raise ValueError
            value = ast.literal_eval(statement.value)
        except (ValueError, TypeError, AttributeError):
            raise ValueError(
                f"the parameters cell holds `{ast.unparse(statement)}`; only `name = literal` may stand there "
                "(derive other values in the next cell)"
            ) from None
        if targets[0].id in values:
            raise ValueError(f"the parameters cell sets {targets[0].id} twice")
        values[targets[0].id] = value
    return values


def _parsed(cell) -> ast.Module:
    """A cell's code, shell commands and magics as the calls that they are; empty where it is no Python."""
    from IPython.core.inputtransformer2 import TransformerManager

    try:
        return ast.parse(TransformerManager().transform_cell(cell.source))
    except SyntaxError:
        return ast.Module([], [])  # running it will say so, better


def _checks(cell) -> bool:
    """Whether a cell has an `assert` of something that could be otherwise."""
    asserts = [node for node in ast.walk(_parsed(cell)) if isinstance(node, ast.Assert)]
    return any(not isinstance(node.test, ast.Constant | ast.Tuple) for node in asserts)


def _assigned(cell) -> set[str]:
    """Names that a cell assigns at its top level."""
    body = _parsed(cell).body
    targets = [target for statement in body for target in getattr(statement, "targets", [])]
    targets += [statement.target for statement in body if isinstance(statement, ast.AnnAssign | ast.AugAssign)]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def check_source(notebook) -> list[str]:
    """What is wrong with a notebook as written: the ways in which a cell would silently not count."""
    problems = []
    try:
        Declaration.of(notebook)
        names = set(parameters_of(notebook))
    except ValueError as error:
        return [str(error)]
    for cell in notebook.cells:
        where = _name(notebook, cell)
        if cell.cell_type == "raw":
            problems.append(f"{where} is a raw cell, which never runs")
        if cell.cell_type != "code":
            continue
        if not cell.source.strip():
            problems.append(f"{where} is empty")
        if "skip-execution" in _tags(cell):
            problems.append(f"{where} has the tag `skip-execution`: it would not run")
        if "injected-parameters" in _tags(cell):
            problems.append(f"{where} is left from an earlier run: remove it")
            continue
        first = cell.source.lstrip().split("\n", 1)[0]
        if first.startswith("%%") and ("--no-raise-error" in first or "--bg" in first.split()):
            problems.append(f"{where} hides whether its script fails")
        if "parameters" not in _tags(cell) and (again := sorted(_assigned(cell) & names)):
            problems.append(f"{where} sets the parameter {', '.join(again)} anew: the value given to the run is lost")
    if not problems and not any(map(_checks, _code_cells(notebook))):
        problems.append("has no check: at least one `assert` about what it did is needed, or doing nothing would pass")
    return problems


# The run


def _kernel_manager(root: Path, ipython_dir: str):
    """A kernel manager whose kernel is this interpreter, whatever kernels are registered on the machine."""
    from ipykernel.kernelspec import make_ipkernel_cmd
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    argv = make_ipkernel_cmd(executable=sys.executable)
    # At its usual level the kernel writes to the runner's terminal that it listens on localhost.
    argv += ["--IPKernelApp.extensions=['helpers.notebook.strict_kernel']", "--IPKernelApp.log_level=40"]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
        "IPYTHONDIR": ipython_dir,
        # Whatever the environment says: figures are shown in the notebook, asserts are run, warnings are no errors.
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "PYTHONOPTIMIZE": "",
        "PYTHONWARNINGS": "",
    }

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self):
            return KernelSpec(argv=argv, display_name="this interpreter", language="python", env=environment)

    return ThisInterpreter


# Evaluated in the kernel after the last cell, where the notebook's own names cannot stand in the way.
LAST_WORDS = {
    "prefix": "__import__('sys').prefix",
    "strict": "'helpers.notebook.strict_kernel' in __import__('IPython').get_ipython().extension_manager.loaded",
    "alive": "not __import__('IPython').get_ipython().exit_now",
    "checks": "__import__('sys').modules['helpers.notebook.strict_kernel'].passed",
}


@dataclass
class _Client:
    """What the runner keeps of a run beside the notebook."""

    last_words: dict[str, object] = field(default_factory=dict)
    flooded: bool = False
    pid: int | None = None


def _engine(state: _Client):
    """Papermill's own engine, with a look at the kernel after the last cell and a bound on what a cell prints."""
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine

    class Client(PapermillNotebookClient):
        def papermill_execute_cells(self):
            state.pid = self.km.provisioner.pid
            super().papermill_execute_cells()
            if any(cell.metadata.papermill.get("exception") for cell in self.nb.cells):
                return
            reply = self.wait_for_reply(self.kc.execute("", silent=True, user_expressions=LAST_WORDS))
            for name, answer in reply["content"]["user_expressions"].items():
                if answer["status"] == "ok":
                    state.last_words[name] = ast.literal_eval(answer["data"]["text/plain"])

        def process_message(self, msg, cell, cell_index):
            output = super().process_message(msg, cell, cell_index)
            if msg["msg_type"] == "stream" and not state.flooded:
                printed = sum(len(o.text) for o in cell.outputs if o.output_type == "stream")
                if printed > MAX_CELL_CHARACTERS:
                    state.flooded = True
                    _kill_group(state.pid)
            return output

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, log_output=False, start_timeout=None, **options):
            for unused in ("input_path", "stdout_file", "stderr_file", "execution_timeout"):
                options.pop(unused, None)
            Client(nb_man, kernel_name=kernel_name, startup_timeout=start_timeout, **options).execute()

    return Engine


def _kill_group(pid: int) -> None:
    """Kill the kernel and what it started: it leads a process group, of which some may outlive it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _started_last(notebook):
    begun = [cell for cell in _code_cells(notebook) if cell.metadata.get("papermill", {}).get("start_time")]
    return begun[-1] if begun else None


def run_notebook(
    path: str | Path,
    executed: str | Path,
    parameters: dict[str, object] | None = None,
    out: str | Path = OUT,
    cell_seconds: float | None = None,
    progress: bool = False,
) -> Report:
    """Run one notebook in a kernel of this interpreter, in the notebook's folder as JupyterLab does.

    executed: where the executed notebook goes, also when it failed, with the failing cell's error in it.
    parameters: values by name.
    out: the folder that the notebook's promises are below; a notebook that has a parameter `out` (relative to the
    repository, as written) is given it.
    cell_seconds: bound of each cell instead of the declared one.
    Raises NotebookFailed, with all that is wrong, and UserError for a file that is no notebook.
    """
    import nbformat
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import execute_notebook
    from papermill.engines import papermill_engines
    from papermill.exceptions import PapermillExecutionError

    path, executed, out = Path(path), Path(executed), Path(out).absolute()
    parameters = dict(parameters or {})
    report = Report(path.name, executed)
    notebook = read_notebook(path)
    report.problems += check_source(notebook)
    if not report.problems:
        declared = parameters_of(notebook)
        # Notebooks work in the repository's root, wherever they were started.
        if "out" in declared and "out" not in parameters and ROOT / declared["out"] != out:
            parameters["out"] = str(out)
        report.problems += [
            f"has no parameter {name} (it has {', '.join(declared) or 'none'})"
            for name in parameters
            if name not in declared
        ]
    if report.problems:
        raise NotebookFailed(report)

    declaration = Declaration.of(notebook)
    cell_seconds = cell_seconds or declaration.cell_seconds
    before = {path: _written(path) for path in _promised(declaration.makes, out, {**declared, **parameters})}
    for cell in _code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    state, stopped = _Client(), None
    executed.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="notebook-") as scratch:
        working = Path(scratch) / path.name
        papermill_engines.register("tutorial", _engine(state))
        try:
            execute_notebook(
                notebook,
                str(working),
                parameters=parameters,
                engine_name="tutorial",
                kernel_name="python3",
                language="python",
                progress_bar={"desc": path.stem, "leave": False, "disable": None} if progress else False,
                kernel_manager_class=_kernel_manager(ROOT, scratch),
                start_timeout=KERNEL_START_SECONDS,
                timeout=cell_seconds,
                iopub_timeout=OUTPUT_SECONDS,
                shutdown_kernel="immediate",
                resources={"metadata": {"path": str(path.absolute().parent)}},
                coalesce_streams=True,
            )
        except PapermillExecutionError:
            pass  # the error is an output of its cell, which check_executed reads
        except CellTimeoutError:
            stopped = f"ran longer than {cell_seconds:g} s and was stopped"
        except DeadKernelError:
            stopped = "ended its kernel"
        except RuntimeError as error:
            if state.pid:
                raise
            report.problems.append(f"its kernel did not start: {error}")
        finally:
            if state.pid:
                _kill_group(state.pid)
            if working.exists():
                result = nbformat.read(working, as_version=4)
        if state.flooded:
            stopped = f"printed more than {MAX_CELL_CHARACTERS:,} characters and was stopped"
        result.cells = [cell for cell in result.cells if "papermill-error-cell-tag" not in _tags(cell)]
        settle_progress(result)
        if not report.problems:
            _finish(result, report, stopped, state, declaration)
        _write_notebook(result, executed)
    if not report.problems:
        report.problems += check_artefacts(declaration.makes, out, {**declared, **parameters}, before)
    if report.problems:
        raise NotebookFailed(report)
    return report


def read_notebook(path: Path):
    """The notebook (nbformat 4). Raises UserError where the file is missing or is none."""
    import nbformat

    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the notebooks are in {NOTEBOOKS}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise UserError(f"{path} is not a notebook ({str(error).splitlines()[0]}).") from None
    return notebook


def _write_notebook(notebook, path: Path) -> None:
    import nbformat

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)


def _finish(notebook, report: Report, stopped: str | None, state: _Client, declaration: Declaration) -> None:
    """Fill the report from an executed notebook; show in the notebook what stopped it from outside."""
    import nbformat

    cells = _code_cells(notebook)
    ran = [cell for cell in cells if cell.execution_count is not None]
    report.cells = len(ran)
    report.seconds = round(sum(c.metadata.get("papermill", {}).get("duration") or 0 for c in cells), 3)
    report.stderr_outputs = sum(
        output.output_type == "stream" and output.name == "stderr" for cell in cells for output in cell.outputs
    )
    if stopped:
        cell = _started_last(notebook)
        report.problems.append(f"{_name(notebook, cell)}: {stopped}")
        message = f"The runner: this cell {stopped}."
        cell.outputs.append(
            nbformat.v4.new_output("error", ename="Stopped", evalue=message, traceback=[message])
        )
        for output in cell.outputs:
            if output.output_type == "stream":
                output.text = output.text[-10_000:]
        return
    report.problems += check_executed(notebook, declaration)
    if not report.problems:
        report.problems += _check_last_words(state.last_words)
    report.checks = state.last_words.get("checks", 0)


_VIEW = "application/vnd.jupyter.widget-view+json"
_STATES = "application/vnd.jupyter.widget-state+json"


def settle_progress(notebook) -> None:
    """Give the progress bars of an executed notebook their last text; take away those that took themselves away.

    A bar is a widget, which is drawn only where the reader trusts the notebook. Everywhere else there is the text that
    came with it when it was made, and that says 0 % for ever.
    """
    import html

    models = notebook.metadata.get("widgets", {}).get(_STATES, {}).get("state", {})

    def state(reference: str | None) -> dict:
        return models.get((reference or "").removeprefix("IPY_MODEL_"), {}).get("state", {})

    for cell in _code_cells(notebook):
        for output in list(cell.outputs):
            box = state(output.get("data", {}).get(_VIEW, {}).get("model_id"))
            parts = [state(child) for child in box.get("children", ())]
            if [part.get("_model_name") for part in parts] != ["HTMLModel", "FloatProgressModel", "HTMLModel"]:
                continue
            if state(box.get("layout")).get("visibility") == "hidden":
                cell.outputs.remove(output)
                continue
            left, bar, right = parts
            filled = round(10 * bar["value"] / (bar["max"] or 1))
            text = f"{left['value']}|{'█' * filled}{' ' * (10 - filled)}|{right['value']}"
            output.data["text/plain"] = html.unescape(text)


def _check_last_words(words: dict[str, object]) -> Iterator[str]:
    if missing := LAST_WORDS.keys() - words.keys():
        yield f"left a kernel that does not say {', '.join(sorted(missing))}: a cell broke what Python itself needs"
    elif not words.get("alive"):
        yield "a cell asked its kernel to exit"
    elif words.get("prefix") != sys.prefix:
        yield f"ran in {words.get('prefix')}, not in {sys.prefix}"
    elif not words.get("strict"):
        yield "ran without helpers.notebook.strict_kernel: failed commands would not have been seen"
    elif not words.get("checks"):
        yield "ran none of its checks (`assert`)"


def check_executed(notebook, declaration: Declaration) -> list[str]:
    """What an executed notebook shows to be wrong. Every code cell must have run, once, in order."""
    problems = []
    for count, cell in enumerate(_code_cells(notebook), start=1):
        where = _name(notebook, cell)
        errors = [output for output in cell.outputs if output.output_type == "error"]
        wanted = "raises-exception" in _tags(cell)
        for error in errors:
            if error.ename == "SystemExit" or not wanted:
                problems.append(f"{where}: {error.ename}: {error.evalue}".rstrip(": "))
        if wanted and not errors and cell.execution_count is not None:
            problems.append(f"{where} has the tag `raises-exception` and raised nothing")
        if problems:
            break  # what comes after did not run because of it
        if cell.execution_count != count:
            ran = "did not run" if cell.execution_count is None else f"ran as number {cell.execution_count}"
            problems.append(f"{where} {ran}; it is code cell {count}")
            break
        problems += [f"{where}: {noise}" for noise in _noise(cell, declaration.max_lines)]
        if _shows_figure(cell) and not _figures(cell):
            problems.append(f"{where} shows a figure, and there is none in its output")
    if not problems and any(name.endswith(IMAGES) for name in declaration.makes):
        if not any(map(_figures, _code_cells(notebook))):
            problems.append("promises figures and shows none")
    return problems


IMAGES = (".png", ".svg")


def _shows_figure(cell) -> bool:
    """Whether a cell asks for a figure whatever happens: `plt.show()` under no condition."""
    calls = [statement.value for statement in _parsed(cell).body if isinstance(statement, ast.Expr)]
    return any(ast.unparse(call).startswith(("plt.show(", "pyplot.show(")) for call in calls)


def _figures(cell) -> list:
    return [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]


def _noise(cell, max_lines: int) -> Iterator[str]:
    for output in cell.outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        if output.output_type == "error" or "text/html" in output.get("data", {}):
            continue
        if "Traceback (most recent call last)" in text:
            last = [line for line in text.splitlines() if line.strip()][-1]
            yield f"printed a traceback and went on ({last.strip()})"
        if text.startswith("Couldn't find program:"):
            yield text.splitlines()[0]
        lines = len(text.splitlines())
        if lines > max_lines:
            yield f"one output has {lines} lines; {max_lines} are allowed"


# The artefacts


def _load_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _load_onnx(path: Path) -> None:
    import onnx

    model = onnx.load(path, load_external_data=False)
    if not model.graph.node or not model.graph.output:
        raise ValueError("its graph is empty")


def _load_bmodel(path: Path) -> None:
    from helpers.bmodel.bmodel import read_bmodel

    read_bmodel(path)


def _load_png(path: Path) -> None:
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[-8:-4] != b"IEND":
        raise ValueError("it is not a whole PNG")
    if 0 in struct.unpack(">II", data[16:24]):
        raise ValueError("it has no pixels")


def _load_svg(path: Path) -> None:
    from xml.etree import ElementTree

    if not ElementTree.parse(path).getroot().tag.endswith("svg"):
        raise ValueError("it is not SVG")


def _load_npz(path: Path) -> None:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        if not [arrays[name].shape for name in arrays.files]:
            raise ValueError("it holds no array")


LOADERS = {
    ".json": _load_json,
    ".onnx": _load_onnx,
    ".bmodel": _load_bmodel,
    ".png": _load_png,
    ".svg": _load_svg,
    ".npz": _load_npz,
}


def _promised(makes: list[str], out: Path, parameters: dict[str, object]) -> list[Path]:
    """What is there of the promised artefacts."""
    found = []
    for template in makes:
        with contextlib.suppress(KeyError, IndexError, ValueError, NotImplementedError):
            found += out.glob(template.format(**parameters))
    return found


def _written(path: Path) -> dict[str, tuple]:
    """What changes where something is written: each file with its inode, size and time of modification."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    status = {str(file): file.lstat() for file in files}
    return {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in status.items()}


def _proven(path: Path, out: Path) -> bool:
    """Whether a manifest, its own or that of a folder above, says that this is the content that was made.

    Its own has been compared by _check_artefact. A patched checkpoint's is the record of its patches. Raises UserError
    where that does not fit.
    """
    if (path / patching.RECORD).exists():
        patching.require_patched(path)
        return True
    if manifest_path(path).exists():
        return True
    for folder in path.parents:
        if (folder / "manifest.json").exists():
            listed = read_manifest(folder).get("outputs", {}).get(str(path.relative_to(folder)))
            return bool(listed) and path.is_file() and sha256_file(path) == listed["sha256"]
        if folder == out:
            break
    return False


def check_artefacts(
    makes: list[str], out: Path, parameters: dict[str, object], before: dict[Path, dict] | None = None
) -> list[str]:
    """Which of the promised artefacts are missing, do not load, or are not of this run.

    makes: paths below `out`, `{name}` standing for a parameter's value and `*` for anything. A file is loaded as its
    suffix says; a folder must hold something; where there is a manifest, all that it lists must be as it says.
    before: what was there before the run, by path. What the run did not write must be proven by a manifest.
    """
    problems = []
    for template in makes:
        try:
            pattern = template.format(**parameters)
        except (KeyError, IndexError, ValueError):
            problems.append(f"promises {template}, which names a parameter that it does not have")
            continue
        found = sorted(out.glob(pattern)) if not Path(pattern).is_absolute() else []
        found = [path for path in found if path.resolve().is_relative_to(out.resolve())]
        if not found:
            problems.append(f"promises {pattern} in {out}, where it is not")
        left = []
        for path in found:
            try:
                _check_artefact(path)
                if before and before.get(path) == _written(path) and not _proven(path, out):
                    left.append(path)
            except Exception as error:  # whatever a loader raises, the artefact does not load
                problems.append(f"made {path.relative_to(out)}, which does not load: {error}")
        if found and left == found:
            problems.append(f"promises {pattern}, which is left from an earlier run: this one did not write it")
    return problems


def _check_artefact(path: Path) -> None:
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError("the folder is empty")
    elif path.stat().st_size == 0:
        raise ValueError("the file is empty")
    elif load := LOADERS.get(path.suffix):
        load(path)
    has_manifest = (path / "manifest.json").exists() if path.is_dir() else Path(f"{path}.json").exists()
    if has_manifest and not is_whole(path, read_manifest(path)):
        raise ValueError("its files are not those that its manifest lists")


# The summary


def record(out: str | Path, section: dict) -> dict:
    """Merge a notebook's part into out/summary.json, and return the whole.

    Dictionaries are merged key by key, `questions` by their `question`; anything else is replaced. The file is
    replaced in whole, and two that record at once lose nothing.
    Raises ValueError for a key that the summary does not have.
    """
    if unknown := sorted(set(section) - set(SUMMARY_KEYS)):
        raise ValueError(f"the summary has no {', '.join(unknown)}; it has {', '.join(SUMMARY_KEYS)}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "summary.json"
    with locked(out / ".summary.lock"):
        try:
            summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if not isinstance(summary, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise UserError(f"{path} is not a summary ({error}): delete it, the notebooks write it anew.") from None
        _merge(summary, json.loads(json.dumps(section)))
        write_json(path, summary)
    return summary


def _merge(into: dict, part: dict) -> None:
    for key, value in part.items():
        if key == "questions":
            questions = {entry["question"]: entry for entry in into.setdefault(key, [])}
            for entry in value:
                if known := questions.get(entry["question"]):
                    _merge(known, entry)
                else:
                    into[key].append(entry)
        elif isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def check_summary(summary: dict) -> list[str]:
    """What a complete out/summary.json lacks or has wrong; its keys are an interface."""
    from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, ValidationError

    class Part(BaseModel):
        model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    class Tokens(Part):
        pytorch: list[int] = Field(min_length=1)
        patched: list[int] = Field(min_length=1)
        onnxruntime: list[int] = Field(min_length=1)
        bf16: list[int] = Field(min_length=1)
        int8: list[int] = Field(min_length=1)
        int4: list[int] = Field(min_length=1)

    class Question(Part):
        question: str = Field(min_length=1)
        answer: str
        tokens: Tokens

    class Parity(Part):
        max_abs: NonNegativeFloat
        cosine: float = Field(ge=-1.0001, le=1.0001)

    class Estimate(Part):
        first_token_ms: NonNegativeFloat
        decode_ms: NonNegativeFloat

    class Summary(Part):
        model: str = Field(min_length=1)
        engine: str = Field(min_length=1)
        versions: dict[str, str] = Field(min_length=1)
        questions: list[Question] = Field(min_length=1)
        parity: dict[str, dict[str, Parity]] = Field(min_length=1)
        bytes: dict[str, NonNegativeInt] = Field(min_length=1)
        estimates: dict[str, Estimate] = Field(min_length=1)
        wall_s: dict[str, NonNegativeFloat] = Field(min_length=1)

    try:
        Summary.model_validate_json(json.dumps(summary))
    except ValidationError as error:
        return [f"summary.json, {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return []


# The command line


def sources_digest() -> str:
    """What decides how a run goes, as one digest: code, notebooks, patches, the embedded model, the environment."""
    files = [ROOT / "requirements.txt"]
    for folder in ("helpers", "notebooks", "patches", "models"):
        files += (path for path in (ROOT / folder).rglob("*") if path.is_file())
    files = [path for path in files if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]
    return digest_of({str(path.relative_to(ROOT)): sha256_file(path) for path in files if path.suffix != ".tiktoken"})


def add_arguments(parser) -> None:
    """Arguments of `python -m helpers notebooks`."""
    parser.add_argument("notebooks", nargs="*", type=Path, help="these instead of notebooks/NN*.ipynb")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the artefacts (default: out)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebooks that have it"
    )
    parser.add_argument("--only", action="append", metavar="NN", help="notebooks whose names start so; repeatable")
    parser.add_argument("--from", dest="first", metavar="NN", help="this notebook and those after it")
    parser.add_argument("--cell-seconds", type=float, help="stop a cell that runs longer")


def _chosen(args) -> list[Path]:
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]*.ipynb"))
    chosen = args.notebooks or every
    if args.only:
        chosen = [path for path in chosen if any(start and path.name.startswith(start) for start in args.only)]
    if args.first:
        chosen = [path for path in chosen if path.name[: len(args.first)] >= args.first]
    if not chosen:
        raise UserError(f"No notebook was chosen; there are {', '.join(p.name for p in every) or 'none'}.")
    return chosen


def _settings(pairs: list[str]) -> dict[str, object]:
    settings = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--set {pair}: needed is NAME=VALUE, for instance --set seq_length=128.")
        try:
            settings[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[name] = text
    return settings


def _share(settings: dict[str, object], notebooks: list[Path]) -> dict[Path, dict[str, object]]:
    """Each notebook's own part of the settings; a setting that no notebook has is an error."""
    shares: dict[Path, dict[str, object]] = {}
    known: dict[str, list[object]] = {}
    for path in notebooks:
        try:
            defaults = parameters_of(read_notebook(path))
        except ValueError:
            defaults = {}  # running it will say what is wrong with its parameters
        shares[path] = {name: value for name, value in settings.items() if name in defaults}
        for name, default in defaults.items():
            known.setdefault(name, []).append(default)
    for name, value in settings.items():
        if name not in known:
            raise UserError(
                f"--set {name}: no notebook of this run has that parameter; they have {', '.join(sorted(known))}."
            )
        for default in known[name]:
            fits = default is None or type(value) is type(default)
            if not fits and not (isinstance(default, float) and type(value) is int):
                raise UserError(f"--set {name}={value!r}: a value like {default!r} is needed.")
    return shares


def run(args) -> int:
    """Run the chosen notebooks in order; stop at the first that fails. Exit code 0 or 1."""
    if args.cell_seconds is not None and not 0 < args.cell_seconds < math.inf:
        raise UserError(f"--cell-seconds is {args.cell_seconds:g}, it must be a number over 0.")
    notebooks = _chosen(args)
    shares = _share(_settings(args.set), notebooks)
    whole = not (args.notebooks or args.only or args.first)
    out = args.out.absolute()
    (out / WALKED).unlink(missing_ok=True)
    if whole:
        (out / "summary.json").unlink(missing_ok=True)
    sources, started = sources_digest(), time.monotonic()
    for path in notebooks:
        executed = out / "notebooks" / path.name
        try:
            report = run_notebook(
                path, executed, shares[path], out=out, cell_seconds=args.cell_seconds, progress=True
            )
        except NotebookFailed as failed:
            for problem in failed.report.problems:
                print(f"error: {path.name}, {problem}", file=sys.stderr)
            if executed.exists():
                print(f"  as far as it came: {os.path.relpath(executed)}", file=sys.stderr)
            return 1
        record(out, {"wall_s": {path.stem: report.seconds}})
        noise = f"  {report.stderr_outputs} outputs on stderr" if report.stderr_outputs else ""
        done = f"{report.cells:3} cells {report.checks:5} checks {report.seconds:7.1f} s"
        print(f"{path.name:32} ok  {done}{noise}", flush=True)
    if whole:
        problems = check_summary(json.loads((out / "summary.json").read_text(encoding="utf-8")))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            return 1
        write_json(out / WALKED, {"sources": sources, "settings": args.set})
    print(f"{len(notebooks)} notebooks in {time.monotonic() - started:.0f} s; executed: {out / 'notebooks'}")
    return 0
