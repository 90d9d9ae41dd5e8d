"""IPython extension that the notebook runner loads: failing shell commands fail their cell, checks are counted.

Jupyter shows `!command` and `x = !command` as done whatever their exit status, and `%%bash` looks only at its
last line. A reader sees the message on the screen; a run without a reader would call it a success. And where no
`assert` was reached, nothing was checked: what the runner must know of that, `last_words` says after the last cell.
"""

import ast
import builtins
import functools
import subprocess
import sys
import types

import IPython
from IPython.utils.text import LSString, SList
from tqdm.notebook import tqdm_notebook

STRICT = "set -eo pipefail; "
# `long listing | head`: the listing ends by SIGPIPE, as it should.
PIPE_CLOSED = 128 + 13
# More text than this fills the memory of runner and reader before any time limit is reached.
MAX_CHARACTERS = 5_000_000

passed: list[None] = []  # one for each assert of the notebook that held
printed = 0  # characters


class _CountChecks(ast.NodeTransformer):
    """Each `assert` is followed by a call that counts it, unless it could not fail: of a constant, or of a pair."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt | list[ast.stmt]:
        if isinstance(node.test, ast.Constant | ast.Tuple):
            return node
        return [node, *ast.parse("__check_passed__()").body]


class CommandFailed(Exception):
    """A shell command of a notebook ended with another exit status than 0, or nobody would have seen how it ended."""


def _run(command: str) -> str:
    """What a command says. Raises CommandFailed where it fails; what it said is then printed."""
    if command.rstrip().endswith("&"):
        raise CommandFailed(f"`{command}` runs in the background, where nobody sees it fail")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(["bash", "-c", STRICT + command], **pipes, text=True, errors="replace", check=False)
    if done.returncode and not (done.returncode == PIPE_CLOSED and "|" in command):
        print(done.stdout, end="")
        raise CommandFailed(f"`{command}` ended with exit status {done.returncode}")
    return done.stdout


def _system(shell, command: str) -> None:
    print(_run(shell.var_expand(command, depth=1)), end="")


def _getoutput(shell, command: str, split: bool = True, depth: int = 0):
    said = _run(shell.var_expand(command, depth=depth + 1))
    return SList(said.splitlines()) if split else LSString(said)


def _ask_exit(shell) -> None:
    raise CommandFailed("the cell asked its kernel to exit")


def _write(write, text: str) -> int:
    global printed
    printed += len(text)
    if printed > MAX_CHARACTERS:
        raise CommandFailed(f"the notebook printed more than {MAX_CHARACTERS:,} characters")
    return write(text)


def last_words() -> tuple[int, list[str]]:
    """After the last cell: how many checks passed, and what is wrong with the run as the kernel sees it."""
    if __name__ not in IPython.get_ipython().extension_manager.loaded:
        return 0, [f"ran without {__name__}: failed commands would not have been seen"]
    if not passed:
        return 0, ["ran none of its checks, or has no check: at least one `assert` about what it did is needed"]
    return len(passed), []


def load_ipython_extension(shell) -> None:
    """Replace the shell's `!`, `x = !`, `%%bash` and `exit` by ones that raise CommandFailed or CalledProcessError.

    There are no progress bars: as widgets they are drawn only where the reader trusts the notebook, and their text
    elsewhere says 0 % for ever.
    """
    tqdm_notebook.__init__ = functools.partialmethod(tqdm_notebook.__init__, disable=True)
    for stream in (sys.stdout, sys.stderr):
        stream.write = functools.partial(_write, stream.write)
    builtins.__check_passed__ = lambda: passed.append(None)
    shell.ast_transformers.append(_CountChecks())
    shell.system = types.MethodType(_system, shell)
    shell.getoutput = types.MethodType(_getoutput, shell)
    shell.ask_exit = types.MethodType(_ask_exit, shell)
    cell_magics = shell.magics_manager.magics["cell"]
    lenient = cell_magics["bash"]
    cell_magics["bash"] = lambda line, cell: lenient(line, STRICT + cell)
