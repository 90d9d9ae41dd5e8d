"""IPython extension that the notebook runner loads: a shell command that fails, fails its cell; checks are counted.

Jupyter shows `!command` and `x = !command` as done whatever their exit status, and `%%bash` looks only at its
last line. A reader sees the message on the screen; a run without a reader would call it a success. And where no
`assert` was reached, nothing was checked: what the runner must know of that, `last_words` says after the last cell.
"""

import ast
import builtins
import shlex
import subprocess
import sys
import types

import IPython
from IPython.utils.process import system
from IPython.utils.text import LSString, SList

STRICT = "set -eo pipefail; "
# `long listing | head`: the listing ends by SIGPIPE, as it should.
PIPE_CLOSED = 128 + 13
# Python ignores that signal, and so would what IPython starts: the listing would go on, or fail in its own words.
_WITH_SIGPIPE = (
    "import os, signal, sys; signal.signal(signal.SIGPIPE, signal.SIG_DFL); os.execvp('bash', ['bash', *sys.argv[1:]])"
)

passed = 0  # asserts of the notebook that held


def _count() -> None:
    global passed
    passed += 1


class _CountChecks(ast.NodeTransformer):
    """Each `assert` is followed by a call that counts it, unless it could not fail: of a constant, or of a pair."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt | list[ast.stmt]:
        if isinstance(node.test, ast.Constant | ast.Tuple):
            return node
        counting = ast.parse("__check_passed__()").body[0]
        for part in ast.walk(counting):
            ast.copy_location(part, node)
        return [node, counting]


class CommandFailed(Exception):
    """A shell command of a notebook ended with another exit status than 0, or nobody would have seen how it ended."""


def _check(command: str, status: int) -> None:
    if status and not (status == PIPE_CLOSED and "|" in command):
        raise CommandFailed(f"`{command}` ended with exit status {status}")


def _refuse_background(command: str) -> None:
    if command.rstrip().endswith("&"):
        raise CommandFailed(f"`{command}` runs in the background, where nobody sees it fail")


def _system(shell, command: str) -> None:
    command = shell.var_expand(command, depth=1)
    _refuse_background(command)
    status = system(shlex.join([sys.executable, "-I", "-S", "-c", _WITH_SIGPIPE, "-c", STRICT + command]))
    shell.user_ns["_exit_code"] = status
    # IPython says -13 where the shell says 141.
    _check(command, status if status >= 0 else 128 - status)


def _getoutput(shell, command: str, split: bool = True, depth: int = 0):
    command = shell.var_expand(command, depth=depth + 1)
    _refuse_background(command)
    done = subprocess.run(
        ["bash", "-c", STRICT + command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    try:
        _check(command, done.returncode)
    except CommandFailed:
        print(done.stdout, end="")
        raise
    return SList(done.stdout.splitlines()) if split else LSString(done.stdout)


def _ask_exit(shell) -> None:
    raise CommandFailed("the cell asked its kernel to exit")


def last_words() -> tuple[int, list[str]]:
    """After the last cell: how many checks passed, and what is wrong with the run as the kernel sees it."""
    problems = []
    if __name__ not in IPython.get_ipython().extension_manager.loaded:
        problems.append(f"ran without {__name__}: failed commands would not have been seen")
    elif not passed:
        problems.append(
            "ran none of its checks, or has no check: at least one `assert` about what it did is needed, or doing "
            "nothing would pass"
        )
    return passed, problems


def load_ipython_extension(shell) -> None:
    """Replace the shell's `!`, `x = !`, `%%bash` and `exit` by ones that raise CommandFailed or CalledProcessError."""
    builtins.__check_passed__ = _count
    shell.ast_transformers.append(_CountChecks())
    shell.system = types.MethodType(_system, shell)
    shell.getoutput = types.MethodType(_getoutput, shell)
    shell.ask_exit = types.MethodType(_ask_exit, shell)
    cell_magics = shell.magics_manager.magics["cell"]
    lenient = cell_magics["bash"]
    cell_magics["bash"] = lambda line, cell: lenient(line, STRICT + cell)
