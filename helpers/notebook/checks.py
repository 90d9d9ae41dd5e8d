"""What a notebook promises, and whether it is and did that: before the run (`check_source`) and after (the others).

A notebook may say in its metadata what it makes, as paths below the out folder:

    "tutorial": {"makes": ["patched/config.json", "{name}_{mode}_1dev.bmodel"]}   # {parameter}, *

and, with "on_demand": true, that it runs only where it is asked for by name: it downloads, or takes long.

That a notebook did its work is never told by the clock, since a fast machine would be called a cheat. Evidence tells:
every code cell ran, in order; checks (`assert`) ran, and passed; each promised artefact was written by this run, or has
a manifest that proves its content; a cell that shows a figure has one.
"""

import ast
import contextlib
import json
import symtable
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from helpers.artefacts import is_whole, manifest_path, read_manifest
from helpers.bmodel.bmodel import read_bmodel
from helpers.patching import patching

MAX_LINES = 60  # no output is longer: a wall of log is not a tutorial
SHOWS_FIGURE = ("plt.show(", "pyplot.show(", "plots.show(")
# What raises an exception where a file is not what its suffix says.
LOADERS = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".onnx": lambda path: onnx.load(path, load_external_data=False),
    ".bmodel": read_bmodel,
    ".png": lambda path: Image.open(path).verify(),
}


def tags(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def name_of(notebook, cell) -> str:
    """`cell 5 \\`first line\\``, counted from 1 over the cells that the author wrote."""
    written = [c for c in notebook.cells if "injected-parameters" not in tags(c)]
    first = next((line for line in cell.source.splitlines() if line.strip()), "").strip()
    first = first if len(first) <= 60 else first[:57] + "..."
    return f"cell {written.index(cell) + 1} `{first}`" if cell in written else f"the injected cell `{first}`"


# As written


def promises_of(notebook) -> list[str]:
    """What a notebook's metadata.tutorial says that it makes. Raises ValueError where that has any other key."""
    declared = notebook.metadata.get("tutorial", {})
    if unknown := sorted(set(declared) - {"makes", "on_demand"}):
        raise ValueError(f"metadata.tutorial has {', '.join(unknown)}, which the runner does not know")
    return declared.get("makes", [])


def parameters_of(notebook) -> dict[str, object]:
    """Names and default values of the notebook's parameters.

    Raises ValueError unless just one cell has the tag `parameters` and holds nothing but `name = literal`: a value
    derived there keeps its old meaning when the runner sets another one after it.
    """
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise ValueError(f"{len(tagged)} code cells have the tag `parameters`; needed: just one")
    values: dict[str, object] = {}
    for statement in ast.parse(_python(tagged[0])).body:
        match statement:
            case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value) if name not in values:
                with contextlib.suppress(ValueError):
                    values[name] = ast.literal_eval(value)
                    continue
        code = ast.unparse(statement)
        raise ValueError(f"the parameters cell holds `{code}`; only `name = literal`, once a name, may stand there")
    return values


def _python(cell) -> str:
    """A cell's code, shell commands and magics as the calls that they are; empty where it is no Python."""
    code = TransformerManager().transform_cell(cell.source)
    try:
        ast.parse(code)
    except SyntaxError:
        return ""  # running it will say so, better
    return code


def _assigned(cell) -> set[str]:
    """Names that a cell gives a value at its top level: by assignment, in a loop, as a function, by import."""
    symbols = symtable.symtable(_python(cell), "cell", "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned()}


def check_source(notebook, given: Iterable[str] = ()) -> list[str]:
    """What is wrong with a notebook as written: the ways in which a cell, or a given parameter, would not count."""
    try:
        promises_of(notebook)
        names = parameters_of(notebook)
    except ValueError as error:
        return [str(error)]
    known = ", ".join(names) or "none"
    problems = [f"has no parameter {name} (it has {known})" for name in given if name not in names]
    for cell in notebook.cells:
        first = cell.source.lstrip().split("\n", 1)[0]
        sets_them = {"parameters", "injected-parameters"} & set(tags(cell))
        again = ", ".join(sorted(_assigned(cell) & set(names))) if cell.cell_type == "code" and not sets_them else ""
        wrong = {
            "is a raw cell, which never runs": cell.cell_type == "raw",
            "is empty": cell.cell_type == "code" and not first,
            "has the tag `skip-execution`: it would not run": "skip-execution" in tags(cell),
            "is left from an earlier run: remove it": "injected-parameters" in tags(cell),
            "hides whether its script fails": first.startswith("%%")
            and ("--no-raise-error" in first or "--bg" in first.split()),
            f"sets the parameter {again} anew: the value given to the run is lost": again,
        }
        problems += [f"{name_of(notebook, cell)} {what}" for what, is_so in wrong.items() if is_so]
    return problems


# As run


def check_executed(notebook, makes: list[str]) -> list[str]:
    """What an executed notebook shows to be wrong. Every code cell must have run, once, in order."""
    problems = []
    for count, cell in enumerate(code_cells(notebook), start=1):
        where = name_of(notebook, cell)
        errors = [output for output in cell.outputs if output.output_type == "error"]
        wanted = "raises-exception" in tags(cell)
        unwanted = [error for error in errors if error.ename == "SystemExit" or not wanted]
        problems += [f"{where}: {error.ename}: {error.evalue}".rstrip(": ") for error in unwanted]
        if wanted and not errors and cell.execution_count is not None:
            problems.append(f"{where} has the tag `raises-exception` and raised nothing")
        if problems:
            return problems  # what comes after did not run because of it
        if cell.execution_count != count:
            ran = "did not run" if cell.execution_count is None else f"ran as number {cell.execution_count}"
            return [f"{where} {ran}; it is code cell {count}"]
        problems += [f"{where}: {noise}" for noise in _noise(cell)]
        if _shows_figure(cell) and not _figures(cell):
            problems.append(f"{where} shows a figure, and there is none in its output")
    promised = any(name.endswith((".png", ".svg")) for name in makes)
    if not problems and promised and not any(map(_figures, code_cells(notebook))):
        problems.append("promises figures and shows none")
    return problems


def _shows_figure(cell) -> bool:
    """Whether a cell shows a figure whatever happens: under no condition."""
    calls = [ast.unparse(statement) for statement in ast.parse(_python(cell)).body if isinstance(statement, ast.Expr)]
    return any(call.startswith(SHOWS_FIGURE) for call in calls)


def _figures(cell) -> list:
    return [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]


def _noise(cell) -> Iterator[str]:
    for output in cell.outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        if output.output_type == "error" or "text/html" in output.get("data", {}):
            continue
        lines = text.splitlines()
        if "Traceback (most recent call last)" in text:
            yield f"printed a traceback and went on ({[line for line in lines if line.strip()][-1].strip()})"
        if text.startswith("Couldn't find program:"):
            yield lines[0]
        if len(lines) > MAX_LINES:
            yield f"one output has {len(lines)} lines; {MAX_LINES} are allowed"


# What it made


def check_artefacts(makes: list[str], out: Path, parameters: dict[str, object], since: int = 0) -> list[str]:
    """Which of the promised artefacts are missing, do not load, or are not of this run.

    makes: paths below `out`, `{name}` standing for a parameter's value and `*` for anything. A file is loaded as its
    suffix says; a folder must hold something; where there is a manifest, all that it lists must be as it says.
    since: when the run began, in ns by the clock of `out`'s disk. What was written before must be proven by a manifest.
    """
    problems = []
    for template in makes:
        pattern = template.format(**parameters)
        found = sorted(out.glob(pattern))
        if not found:
            problems.append(f"promises {pattern} in {out}, where it is not")
        left = []
        for path in found:
            try:
                files = _load(path)
                if not _proven(path, out) and all(file.lstat().st_ctime_ns < since for file in files):
                    left.append(path)
            except Exception as error:  # whatever a loader raises, the artefact does not load
                problems.append(f"made {path.relative_to(out)}, which does not load: {error}")
        if found and left == found:
            problems.append(f"promises {pattern}, which is left from an earlier run: this one did not write it")
    return problems


def _load(path: Path) -> list[Path]:
    """A file, or a folder and all that is in it. Raises where a file is not what its suffix says, either is empty."""
    files = [path, *path.rglob("*")]
    if path.is_dir() and len(files) == 1:
        raise ValueError("the folder is empty")
    if path.is_file() and not path.stat().st_size:
        raise ValueError("the file is empty")
    if path.suffix in LOADERS and path.is_file():
        LOADERS[path.suffix](path)
    return files


def _proven(path: Path, out: Path) -> bool:
    """Whether a manifest, its own or that of a folder above, says that this is the content that was made.

    A patched checkpoint's is the record of its patches. Raises ValueError or UserError where that does not fit.
    """
    if (path / patching.RECORD).exists():
        patching.require_patched(path)
        return True
    for made in (path, *path.parents):
        if made.is_relative_to(out) and manifest_path(made).exists():
            manifest = read_manifest(made)
            if not is_whole(made, manifest):
                raise ValueError("its files are not those that its manifest lists")
            return made == path or str(path.relative_to(made)) in manifest["outputs"]
    return False
