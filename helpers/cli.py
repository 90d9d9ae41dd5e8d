"""`python -m helpers COMMAND`: every step of the notebooks for people who want no notebook.

Each command lives in the module of its step, as `add_arguments(parser)` and `run(args)`.
"""

import argparse
import importlib
import sys

from helpers.errors import UserError

COMMANDS = {
    "doctor": ("helpers.environment", "what this machine has, what it lacks, and the remedy"),
    "fetch": ("helpers.fetching", "bring a checkpoint or a prepared artefact to this machine"),
    "patch": ("helpers.patching", "change Qwen's code so that it exports; --revert takes it back"),
    "export": ("helpers.exporting", "write every net of a patched checkpoint as ONNX"),
    "compile": ("helpers.compiling", "compile the ONNX nets to one bmodel for BM1684X"),
    "chat": ("helpers.chat", "talk with a bmodel, on the chip or on the simulator"),
    "serve": ("helpers.service", "serve a bmodel over HTTP"),
    "info": ("helpers.bmodel_tools", "what a bmodel contains and what memory it needs; combine and extract"),
    "notebooks": ("helpers.notebooks", "run the notebooks headless"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m helpers", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        # Only the asked command's module is imported: a box with a chip lacks what the others need.
        if name == asked:
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return implementation.run(args) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: what was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130
