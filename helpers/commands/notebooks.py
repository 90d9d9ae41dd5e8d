"""`python -m helpers notebooks`: run the notebooks headless, in order, up to the first that fails."""

import ast
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

from helpers.errors import UserError
from helpers.files import digest_of, sha256_file, write_json
from helpers.notebook.checks import parameters_of
from helpers.notebook.lab import cells_digest
from helpers.notebook.runner import OUT, NotebookFailed, read_notebook, run_notebook
from helpers.notebook.summary import SUMMARY, check_summary, record
from helpers.notebook.workspace import ROOT

NOTEBOOKS = ROOT / "notebooks"
# Of a whole run that was green: what it was of. `make test` takes that run's artefacts where nothing has changed since.
WALKED = "walked.json"


def sources_digest() -> str:
    """What decides how a run goes, as one digest: code, notebooks, patches, the embedded model, the environment."""
    files = [ROOT / "requirements.txt"]
    for folder in ("helpers", "notebooks", "patches", "models"):
        files += (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".tiktoken")
    files = [path for path in files if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)]
    # A reader may run and save a notebook: what counts is its cells.
    of_kind = {".ipynb": cells_digest}
    return digest_of({str(path.relative_to(ROOT)): of_kind.get(path.suffix, sha256_file)(path) for path in files})


def add_arguments(parser) -> None:
    parser.add_argument("notebooks", nargs="*", type=Path, help="these instead of notebooks/NN*.ipynb")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the artefacts (default: out)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebooks that have it"
    )
    parser.add_argument("--only", action="append", metavar="NN", help="notebooks whose names start so; repeatable")
    parser.add_argument("--from", dest="first", metavar="NN", help="this notebook and those after it")
    parser.add_argument("--cell-seconds", type=float, help="stop a cell that runs longer")


def on_demand(path: Path) -> bool:
    """Whether a notebook runs only where it is asked for by name."""
    return read_notebook(path).metadata.get("tutorial", {}).get("on_demand", False)


def _chosen(args) -> list[Path]:
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]*.ipynb"))
    chosen = args.notebooks or [path for path in every if args.only or not on_demand(path)]
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


def _shares(settings: dict[str, object], paths: list[Path]) -> dict[Path, dict[str, object]]:
    """Each notebook's own part of the settings; a setting that no notebook has is an error."""
    defaults: dict[Path, dict[str, object]] = dict.fromkeys(paths, {})
    for path in paths:
        with contextlib.suppress(ValueError):  # running it will say what is wrong with its parameters
            defaults[path] = parameters_of(read_notebook(path))
    for name, value in settings.items():
        examples = [of_one[name] for of_one in defaults.values() if name in of_one]
        if not examples:
            known = ", ".join(sorted({name for of_one in defaults.values() for name in of_one}))
            raise UserError(f"--set {name}: no notebook of this run has that parameter; they have {known}.")
        whole_for_float = isinstance(examples[0], float) and type(value) is int
        if examples[0] is not None and type(value) is not type(examples[0]) and not whole_for_float:
            raise UserError(f"--set {name}={value!r}: a value like {examples[0]!r} is needed.")
    return {path: {name: settings[name] for name in of_one if name in settings} for path, of_one in defaults.items()}


def run(args) -> int:
    """Run the chosen notebooks in order; stop at the first that fails. Exit code 0 or 1."""
    if args.cell_seconds is not None and not 0 < args.cell_seconds < math.inf:
        raise UserError(f"--cell-seconds is {args.cell_seconds:g}, it must be a number over 0.")
    notebooks = _chosen(args)
    shares = _shares(_settings(args.set), notebooks)
    whole = not (args.notebooks or args.only or args.first)
    out = args.out.absolute()
    (out / WALKED).unlink(missing_ok=True)
    if whole:
        (out / SUMMARY).unlink(missing_ok=True)
    sources, started = sources_digest(), time.monotonic()
    for path in notebooks:
        executed = out / "notebooks" / path.name
        try:
            report = run_notebook(path, executed, shares[path], out=out, cell_seconds=args.cell_seconds)
        except NotebookFailed as failed:
            for problem in failed.report.problems:
                print(f"error: {path.name}, {problem}", file=sys.stderr)
            if executed.exists():
                print(f"  as far as it came: {os.path.relpath(executed)}", file=sys.stderr)
            return 1
        record(out, {"wall_s": {path.stem: report.seconds}})
        done = f"{report.cells:3} cells {report.checks:5} checks {report.seconds:7.1f} s"
        print(f"{path.name:32} ok  {done}", flush=True)
    if whole:
        problems = check_summary(json.loads((out / SUMMARY).read_text(encoding="utf-8")))
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            return 1
        write_json(out / WALKED, {"sources": sources, "settings": args.set})
    print(f"{len(notebooks)} notebooks in {time.monotonic() - started:.0f} s; executed: {out / 'notebooks'}")
    return 0
