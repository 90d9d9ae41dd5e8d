"""`python -m helpers COMMAND`: every step of the notebooks for people who want no notebook.

Each command is the module of its name in helpers.commands, with `add_arguments(parser)` and `run(args)`.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

from helpers.errors import UserError
from helpers.files import remedy

# In the order in which one needs them. What each does is said at the top of its module.
COMMANDS = (
    *("doctor", "fetch", "patch", "calibrate", "export", "compile", "chat", "serve"),
    *("info", "diagnose", "forecast", "notebooks"),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    _open_closed_streams()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # Whatever the locale: a character that it lacks is a question mark, not the end; a byte that is none is kept.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        _let_go_of_stdout()
        if isinstance(error, BrokenPipeError):
            return 1  # whoever read the output has enough: `… | head`
        if (cure := remedy(error)) is None:
            raise
        print(f"error: {error.filename or 'A file'}: {error.strerror}. {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130


def _open_closed_streams() -> None:
    """Where a standard stream is closed (`<&- >&-`), open it on nothing: a file would else get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            if (null := os.open(os.devnull, os.O_RDWR)) != number:
                os.dup2(null, number)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))


def _let_go_of_stdout() -> None:
    """Where standard output cannot be written to, drop what is still buffered: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    if sys.flags.optimize > 1:
        raise UserError("Python leaves out docstrings, which transformers and patches read: unset PYTHONOPTIMIZE.")
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name in COMMANDS:
        module = Path(__file__).with_name("commands") / f"{name}.py"
        summary = module.read_text(encoding="utf-8").splitlines()[0].partition(": ")[2].rstrip('."')
        command = commands.add_parser(name, help=summary, description=summary)
        # Only the asked command's module is imported: a box with a chip lacks what the others need.
        if name == asked:
            implementation = importlib.import_module(f"helpers.commands.{name}")
            implementation.add_arguments(command)
    try:
        args = parser.parse_args(argv)
        return implementation.run(args) or 0
    finally:
        # What does not reach its reader must not end as success, nor in a traceback at the interpreter's end.
        sys.stdout.flush()
