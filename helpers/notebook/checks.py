"""What a notebook declares, and whether it is and did that: before the run (`check_source`) and after (the others).

A notebook declares in its metadata, all of it optional:

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
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from IPython.core.inputtransformer2 import TransformerManager
from PIL import Image

from helpers.artefacts import is_whole, manifest_path, read_manifest
from helpers.bmodel.bmodel import read_bmodel
from helpers.files import sha256_file
from helpers.patching import patching

IMAGES = (".png", ".svg")
SHOWS_FIGURE = ("plt.show(", "pyplot.show(", "plots.show(")


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
        if unknown := sorted(set(declared) - {f.name for f in fields(cls)}):
            raise ValueError(f"metadata.tutorial has {', '.join(unknown)}, which the runner does not know")
        return cls(**declared)


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


def parameters_of(notebook) -> dict[str, object]:
    """Names and default values of the notebook's parameters.

    Raises ValueError unless just one cell has the tag `parameters` and holds nothing but `name = literal`: a value
    derived there keeps its old meaning when the runner sets another one after it.
    """
    tagged = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(tagged) != 1:
        raise ValueError(f"{len(tagged)} code cells have the tag `parameters`; needed: just one")
    try:
        statements = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise ValueError(f"the parameters cell is not plain Python: {error}") from None
    values: dict[str, object] = {}
    for statement in statements:
        try:
            match statement:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                    literal = ast.literal_eval(value)
                case _:
                    raise ValueError
        except ValueError:
            raise ValueError(
                f"the parameters cell holds `{ast.unparse(statement)}`; only `name = literal` may stand there "
                "(derive other values in the next cell)"
            ) from None
        if name in values:
            raise ValueError(f"the parameters cell sets {name} twice")
        values[name] = literal
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


def check_source(notebook) -> list[str]:
    """What is wrong with a notebook as written: the ways in which a cell would silently not count."""
    problems = []
    try:
        Declaration.of(notebook)
        names = set(parameters_of(notebook))
    except ValueError as error:
        return [str(error)]
    for cell in notebook.cells:
        first = cell.source.lstrip().split("\n", 1)[0]
        sets_them = {"parameters", "injected-parameters"} & set(tags(cell))
        again = ", ".join(sorted(_assigned(cell) & names)) if cell.cell_type == "code" and not sets_them else ""
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


def check_executed(notebook, declaration: Declaration) -> list[str]:
    """What an executed notebook shows to be wrong. Every code cell must have run, once, in order."""
    problems = []
    for count, cell in enumerate(code_cells(notebook), start=1):
        where = name_of(notebook, cell)
        errors = [output for output in cell.outputs if output.output_type == "error"]
        wanted = "raises-exception" in tags(cell)
        for error in errors:
            if error.ename == "SystemExit" or not wanted:
                problems.append(f"{where}: {error.ename}: {error.evalue}".rstrip(": "))
        if wanted and not errors and cell.execution_count is not None:
            problems.append(f"{where} has the tag `raises-exception` and raised nothing")
        if problems:
            return problems  # what comes after did not run because of it
        if cell.execution_count != count:
            ran = "did not run" if cell.execution_count is None else f"ran as number {cell.execution_count}"
            return [f"{where} {ran}; it is code cell {count}"]
        problems += [f"{where}: {noise}" for noise in _noise(cell, max_lines=declaration.max_lines)]
        if _shows_figure(cell) and not _figures(cell):
            problems.append(f"{where} shows a figure, and there is none in its output")
    promises_figures = any(name.endswith(IMAGES) for name in declaration.makes)
    if not problems and promises_figures and not any(map(_figures, code_cells(notebook))):
        problems.append("promises figures and shows none")
    return problems


def _shows_figure(cell) -> bool:
    """Whether a cell shows a figure whatever happens: under no condition."""
    calls = [ast.unparse(statement) for statement in ast.parse(_python(cell)).body if isinstance(statement, ast.Expr)]
    return any(call.startswith(SHOWS_FIGURE) for call in calls)


def _figures(cell) -> list:
    return [o for o in cell.outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]


def _noise(cell, max_lines: int) -> Iterator[str]:
    for output in cell.outputs:
        text = output.get("text") or output.get("data", {}).get("text/plain", "")
        if output.output_type == "error" or "text/html" in output.get("data", {}):
            continue
        lines = text.splitlines()
        if "Traceback (most recent call last)" in text:
            yield f"printed a traceback and went on ({[line for line in lines if line.strip()][-1].strip()})"
        if text.startswith("Couldn't find program:"):
            yield lines[0]
        if len(lines) > max_lines:
            yield f"one output has {len(lines)} lines; {max_lines} are allowed"


# What it made


def _promised(template: str, out: Path, parameters: dict[str, object]) -> tuple[str, list[Path]]:
    """A promise with its parameters filled in, and what is there of it below `out`. Raises ValueError without one."""
    try:
        pattern = template.format(**parameters)
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"promises {template}, which names a parameter that it does not have") from None
    found = out.glob(pattern) if not Path(pattern).is_absolute() else []
    return pattern, sorted(path for path in found if path.resolve().is_relative_to(out.resolve()))


def _written(path: Path) -> dict[str, tuple]:
    """What changes where something is written: each file with its inode, size and time of modification."""
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    status = {str(file): file.lstat() for file in files}
    return {name: (found.st_ino, found.st_size, found.st_mtime_ns) for name, found in status.items()}


def snapshot(makes: list[str], out: Path, parameters: dict[str, object]) -> dict[Path, dict]:
    """What is there of the promised artefacts before a run: for `check_artefacts`, after it."""
    there: dict[Path, dict] = {}
    for template in makes:
        with contextlib.suppress(ValueError):
            there |= {path: _written(path) for path in _promised(template, out, parameters)[1]}
    return there


def check_artefacts(
    makes: list[str], out: Path, parameters: dict[str, object], before: dict[Path, dict] | None = None
) -> list[str]:
    """Which of the promised artefacts are missing, do not load, or are not of this run.

    makes: paths below `out`, `{name}` standing for a parameter's value and `*` for anything. A file is loaded as its
    suffix says; a folder must hold something; where there is a manifest, all that it lists must be as it says.
    before: what was there before the run (`snapshot`). What the run did not write must be proven by a manifest.
    """
    problems = []
    for template in makes:
        try:
            pattern, found = _promised(template, out, parameters)
        except ValueError as error:
            problems.append(str(error))
            continue
        if not found:
            problems.append(f"promises {pattern} in {out}, where it is not")
        left = []
        for path in found:
            try:
                _load(path)
                if before and before.get(path) == _written(path) and not _proven(path, out):
                    left.append(path)
            except Exception as error:  # whatever a loader raises, the artefact does not load
                problems.append(f"made {path.relative_to(out)}, which does not load: {error}")
        if found and left == found:
            problems.append(f"promises {pattern}, which is left from an earlier run: this one did not write it")
    return problems


def _load(path: Path) -> None:
    """Raise where a file is not what its suffix says, a folder is empty, or either is not what its manifest says."""
    if path.is_dir():
        if not any(path.iterdir()):
            raise ValueError("the folder is empty")
    elif path.stat().st_size == 0:
        raise ValueError("the file is empty")
    elif path.suffix == ".json":
        json.loads(path.read_bytes())
    elif path.suffix == ".onnx":
        import onnx

        if not onnx.load(path, load_external_data=False).graph.output:
            raise ValueError("its graph is empty")
    elif path.suffix == ".bmodel":
        read_bmodel(path)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            image.verify()
    if manifest_path(path).exists() and not is_whole(path, read_manifest(path)):
        raise ValueError("its files are not those that its manifest lists")


def _proven(path: Path, out: Path) -> bool:
    """Whether a manifest, its own or that of a folder above, says that this is the content that was made.

    Its own has been compared by `_load`. A patched checkpoint's is the record of its patches. Raises UserError where
    that does not fit.
    """
    if (path / patching.RECORD).exists():
        patching.require_patched(path)
        return True
    if manifest_path(path).exists():
        return True
    folder = next((folder for folder in path.parents if manifest_path(folder).exists()), None)
    if folder is None or not folder.is_relative_to(out) or not path.is_file():
        return False
    listed = read_manifest(folder).get("outputs", {}).get(str(path.relative_to(folder)))
    return bool(listed) and sha256_file(path) == listed["sha256"]
