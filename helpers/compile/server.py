"""A process that has imported the tool chain once, and forks for every net; each net at a time has one of its own.

A fork takes no time, importing TPU-MLIR's front end as long as compiling a small net; and a net that brings its process
down takes nothing else along. The server keeps no thread, so that forking is safe. It, the net's process and the tools
that this runs are one process group: when the client's end of the pipe closes, however the client dies, the server ends
the group.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
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
        """log: for what it says before its first job. Raises UserError where the tool chain cannot work."""
        toolchain.require()
        self._jobs, theirs = multiprocessing.Pipe()
        with theirs, open(log, "wb") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.compile.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env=toolchain.environment(threads=1, kernel_locks=False),  # each net has kernels of its own
                # From there it takes these helpers; a folder's name may have a colon, which PYTHONPATH cannot hold.
                cwd=Path(__file__).resolve().parents[2],
                # Ctrl-C goes to the whole foreground group: the parent decides what it means.
                start_new_session=True,
            )

    def run(self, log: Path, threads: int, **arguments) -> int:
        """Run one job and wait: its exit status, negative for a signal.

        log: file for its output. threads: OMP_NUM_THREADS for it. arguments: of the stages in helpers.compile.worker.
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


_servers: dict[int, CompilerServer] = {}  # by thread


def own(log: Path) -> CompilerServer:
    """The server of this thread. log: of the net that it is for. Raises UserError where the tool chain cannot work."""
    server = _servers.get(threading.get_ident())
    if server is None or server._process.poll() is not None:
        server = _servers[threading.get_ident()] = CompilerServer(log)
    return server


def close_all() -> None:
    """End the servers of all threads, and what they run."""
    while _servers:
        _servers.popitem()[1].close()


def serve(jobs: Connection, *stages: Callable[..., None]) -> None:
    """The server's end: do the stages of each job that comes; end with the client, and all that runs.

    Each stage is a fork, so that its memory is given back before the next takes its own.
    """

    def do(stage: Callable[..., None], output: int, threads: int, arguments: dict) -> None:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        stage(**arguments)

    with suppress(EOFError):
        while True:
            log, threads, arguments = jobs.recv()
            with open(log, "wb") as file:
                for stage in stages:
                    process = _FORK.Process(target=do, args=(stage, file.fileno(), threads, arguments))
                    process.start()
                    if jobs in wait([jobs, process.sentinel]):
                        os.killpg(0, signal.SIGKILL)
                    process.join()
                    if process.exitcode:
                        break
            jobs.send(process.exitcode)
