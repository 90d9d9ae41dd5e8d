"""Run the notebooks headless, where green means that they did what they say.

Nbclient runs the cells, in a kernel that watches itself (`strict_kernel`); what it and papermill call a success without
reason is refused here, before (`check_source`) or after (`check_executed`, `check_artefacts`).
"""

import ast
import contextlib
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from papermill.translators import translate_parameters
from tqdm import tqdm

from helpers.errors import UserError
from helpers.files import write_file
from helpers.notebook import checks, strict_kernel
from helpers.notebook.checks import code_cells, name_of, parameters_of, promises_of
from helpers.notebook.workspace import ROOT

OUT = ROOT / "out"
# Bounds for what hangs, not for what is slow: of a cell; of a kernel's start and its answers, a second as a rule.
CELL_SECONDS = 36000
ANSWER_SECONDS = 3600


@dataclass
class Report:
    """How a run went. `checks`: asserts that passed; `seconds`: wall time of the cells; `problems`: none if right."""

    notebook: str
    cells: int = 0
    checks: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class NotebookFailed(Exception):
    """A notebook that is not what it should be or did not do what it says; `report` has every problem."""

    def __init__(self, report: Report):
        super().__init__("; ".join(f"{report.notebook}, {problem}" for problem in report.problems))
        self.report = report


class _Client(NotebookClient):
    """Nbclient's, in a kernel of this interpreter whatever kernels are registered."""

    def __init__(self, notebook, folder: Path, cell_seconds: float):
        super().__init__(
            notebook,
            # Without folders to look for kernels in, there is the one that this interpreter is.
            km=AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[])),
            # At its usual level the kernel writes to the runner's terminal that it listens on localhost.
            extra_arguments=[f"--IPKernelApp.extensions=['{strict_kernel.__name__}']", "--IPKernelApp.log_level=40"],
            startup_timeout=ANSWER_SECONDS,
            timeout=math.ceil(cell_seconds),
            iopub_timeout=ANSWER_SECONDS,
            raise_on_iopub_timeout=True,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(folder)}},
            coalesce_streams=True,
        )
        self.pid: int | None = None

    @contextlib.contextmanager
    def kernel(self):
        """A kernel, from the first cell to the last. Raises RuntimeError where it does not start."""
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]),
            # Whatever the environment says: figures are shown in the notebook, asserts are run, warnings are no errors.
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "PYTHONOPTIMIZE": "",
            "PYTHONWARNINGS": "",
        }
        with tempfile.TemporaryDirectory() as ipython:
            with self.setup_kernel(env=environment | {"IPYTHONDIR": ipython}, cleanup_kc=True):
                self.pid = self.km.provisioner.pid
                try:
                    yield
                finally:
                    self.set_widgets_metadata()
                    # And what it started: it leads a process group, of which some may outlive it.
                    with contextlib.suppress(ProcessLookupError, PermissionError):
                        os.killpg(self.pid, signal.SIGKILL)

    def last_words(self) -> tuple[int, list[str]]:
        """How many checks passed, and what is wrong; asked where the notebook's own names cannot stand in the way."""
        words = f"__import__('sys').modules['{strict_kernel.__name__}'].last_words()"
        reply = self.wait_for_reply(self.kc.execute("", silent=True, user_expressions={"last": words}))
        answer = reply["content"]["user_expressions"]["last"]
        if answer["status"] != "ok":
            return 0, ["left a kernel that does not say how it went: a cell broke what Python itself needs"]
        return ast.literal_eval(answer["data"]["text/plain"])


def read_notebook(path: Path):
    """The notebook (nbformat 4). Raises UserError where the file is missing or is none."""
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; the notebooks are in {ROOT / 'notebooks'}.") from None
    except (ValueError, TypeError, KeyError, AttributeError, nbformat.ValidationError) as error:
        raise UserError(f"{path} is not a notebook ({str(error).splitlines()[0]}).") from None
    return notebook


def run_notebook(
    path: str | Path,
    executed: str | Path,
    parameters: dict[str, object] | None = None,
    out: str | Path = OUT,
    cell_seconds: float | None = None,
) -> Report:
    """Run one notebook in a kernel of this interpreter, in the notebook's folder as JupyterLab does.

    executed: where the executed notebook goes, also when it failed, with the failing cell's error in it.
    out: the folder that the notebook's promises are below; a notebook that has a parameter `out` (relative to the
    repository, as written) is given it. cell_seconds: bound of each cell.
    Raises NotebookFailed, with all that is wrong, and UserError for a file that is no notebook.
    """
    path, executed, out = Path(path), Path(executed), Path(out).absolute()
    notebook, given = read_notebook(path), dict(parameters or {})
    report = Report(path.name, problems=checks.check_source(notebook, given))
    if report.problems:
        raise NotebookFailed(report)
    makes, values = promises_of(notebook), parameters_of(notebook)
    # Notebooks work in the repository's root, wherever they were started.
    if "out" in values and ROOT / values["out"] != out:
        given = {"out": str(out)} | given
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    if given:
        source = translate_parameters("python3", "python", given, "Parameters of this run")
        injected = nbformat.v4.new_code_cell(source, metadata={"tags": ["injected-parameters"]})
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in checks.tags(cell))
        notebook.cells.insert(place + 1, injected)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out) as file:
        began = os.fstat(file.fileno()).st_ctime_ns
    client = _Client(notebook, path.absolute().parent, cell_seconds or CELL_SECONDS)
    stopped, said = _run_cells(client, report)
    executed.parent.mkdir(parents=True, exist_ok=True)
    write_file(executed, (nbformat.writes(notebook) + "\n").encode())
    pictures = path.parent / "images"  # the text's links to them are relative
    if pictures.is_dir() and path.parent.resolve() != executed.parent.resolve():
        shutil.copytree(pictures, executed.parent / "images", dirs_exist_ok=True)
    report.cells = sum(cell.execution_count is not None for cell in code_cells(notebook))
    report.problems = stopped or checks.check_executed(notebook, makes) or said
    report.problems = report.problems or checks.check_artefacts(makes, out, values | given, began)
    if report.problems:
        raise NotebookFailed(report)
    return report


def _run_cells(client: _Client, report: Report) -> tuple[list[str], list[str]]:
    """Run the cells up to the first that fails: what stopped the run, and what its kernel says is wrong."""
    cells = [(index, cell) for index, cell in enumerate(client.nb.cells) if cell.cell_type == "code"]
    try:
        with client.kernel():
            started = time.monotonic()
            for index, cell in tqdm(cells, report.notebook, leave=False, disable=None):
                client.execute_cell(cell, index)
            report.seconds = round(time.monotonic() - started, 3)
            report.checks, said = client.last_words()
            return [], said
    except CellExecutionError:
        return [], []  # the error is an output of its cell, which check_executed reads
    except CellTimeoutError:
        stopped = f"ran longer than {client.timeout:g} s and was stopped"
    except DeadKernelError:
        stopped = "ended its kernel"
    except RuntimeError as error:
        if client.pid:
            raise
        return [f"its kernel did not start: {error}"], []
    message = f"The runner: this cell {stopped}."
    cell.outputs.append(nbformat.v4.new_output("error", ename="Stopped", evalue=message, traceback=[message]))
    return [f"{name_of(client.nb, cell)}: {stopped}"], []
