"""A process that has imported the tool chain once, and forks for every net; each net at a time has one of its own.

Importing TPU-MLIR's front end takes longer than compiling a small net with it; a fork of a process that has it costs
nothing, and a net that brings its process down takes nothing else along.

The server, the net's process and the tools that this runs are one process group. The server keeps no thread, so that
forking is safe. When the client's end of the pipe closes, however the client dies, it ends the group and itself.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

from helpers import toolchain
from helpers.compile.log import own_error, read_log
from helpers.errors import UserError

_FORK = multiprocessing.get_context("fork")


class CompilerServer:
    """The client's end: start, run one job after another, close."""

    def __init__(self, log: Path):
        """log: of its first job, for what it says before that. Raises UserError where the tool chain cannot work."""
        toolchain.require()
        self._jobs, theirs = multiprocessing.Pipe()
        with theirs, open(log, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.compile.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                # Each net has kernels of its own, or those of a net before it (helpers.compile.worker).
                env=toolchain.environment(threads=1, kernel_locks=False),
                # From there it takes these helpers; a folder's name may have a colon, which PYTHONPATH cannot hold.
                cwd=Path(__file__).resolve().parents[2],
                # Ctrl-C goes to the whole foreground group: the parent decides what it means.
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def run(self, log: Path, threads: int, **arguments) -> int:
        """Run one job in a fork and wait: its exit status, negative for a signal.

        log: file for its output. threads: OMP_NUM_THREADS for it. arguments: of helpers.compile.worker.compile_net.
        Raises UserError where the server has ended, or was closed meanwhile.
        """
        try:
            self._jobs.send((log, threads, arguments))
            return self._jobs.recv()
        except (EOFError, OSError):
            self.close()
            why = own_error(read_log(log), self._process.returncode)
            raise UserError(f"TPU-MLIR's tool chain ended ({why}): `make doctor` shows what it lacks.") from None

    def close(self) -> None:
        """End the server and all that it runs."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def serve(jobs: Connection, work: Callable[..., None]) -> None:
    """The server's end: do each job that comes in a fork; end with the client, and all that runs with it."""

    def do(log: Path, threads: int, arguments: dict) -> None:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        work(**arguments)

    with suppress(EOFError):
        while True:
            process = _FORK.Process(target=do, args=jobs.recv())
            process.start()
            if jobs in wait([jobs, process.sentinel]):
                os.killpg(0, signal.SIGKILL)
            process.join()
            jobs.send(process.exitcode)


def in_child(name: str, function: Callable[..., None], *arguments: object) -> None:
    """Run a function in a child and wait. name: of what it does, for messages.

    Raises UserError where a signal ended it, and SystemExit where it failed otherwise: why is printed by then.
    """
    process = _FORK.Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode < 0:
        raise UserError(f"{name} was ended by {signal.Signals(-process.exitcode).name}")
    if process.exitcode:
        sys.exit(1)
