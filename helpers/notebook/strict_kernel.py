"""IPython extension that the notebook runner loads: a shell command that fails, fails its cell; checks are counted.

Jupyter shows `!command` and `x = !command` as done whatever their exit status, and `%%bash` looks only at its
last line. A reader sees the message on the screen; a run without a reader would call it a success. And where no
`assert` was reached, nothing was checked: what the runner must know of that, `last_words` says after the last cell.
"""

import ast
import builtins
import subprocess
import types
from collections.abc import Iterator

import IPython
from IPython.utils.text import LSString, SList

STRICT = "set -eo pipefail; "
# `long listing | head`: the listing ends by SIGPIPE, as it should.
PIPE_CLOSED = 128 + 13

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


def _lines(command: str) -> Iterator[str]:
    """What a command says, line by line as it comes. Raises CommandFailed where it fails, at its end."""
    if command.rstrip().endswith("&"):
        raise CommandFailed(f"`{command}` runs in the background, where nobody sees it fail")
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(["bash", "-c", STRICT + command], **pipe, text=True, errors="replace") as process:
        yield from process.stdout
    if process.returncode and not (process.returncode == PIPE_CLOSED and "|" in command):
        raise CommandFailed(f"`{command}` ended with exit status {process.returncode}")


def _system(shell, command: str) -> None:
    for line in _lines(shell.var_expand(command, depth=1)):
        print(line, end="")


def _getoutput(shell, command: str, split: bool = True, depth: int = 0):
    said = []
    try:
        for line in _lines(shell.var_expand(command, depth=depth + 1)):
            said.append(line)
    except CommandFailed:
        print("".join(said), end="")
        raise
    return SList("".join(said).splitlines()) if split else LSString("".join(said))


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
