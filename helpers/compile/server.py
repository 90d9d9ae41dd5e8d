"""A process that has imported the tool chain once, and forks for every net.

Importing TPU-MLIR's front end takes longer than compiling a small net with it; a fork of a process that has it costs
nothing, and a net that brings its process down takes nothing else along.

A job goes to the server in one message, with a pipe for its exit status. The server keeps no thread, so that forking is
safe. It ends with its children when nobody can send more: however its parent dies, nothing is left running.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from helpers import toolchain
from helpers.compile import processes
from helpers.errors import UserError

_MESSAGE_BYTES = 1 << 16


class CompilerServer:
    """The client's end: start, run jobs from any thread, close."""

    def __init__(self):
        """Raises UserError where the tool chain cannot work on this machine."""
        toolchain.require()
        self._said = tempfile.TemporaryFile()
        self._jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "helpers.compile.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
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
        """Run one job in a fork of its own and wait: its exit status, negative for a signal.

        log: file for its output. threads: OMP_NUM_THREADS for it. arguments: JSON-serialisable, of
        helpers.compile.worker.compile_net.
        Raises UserError where the server has ended, or was closed meanwhile.
        """
        message = json.dumps({"log": str(log), "threads": threads, "arguments": arguments}).encode()
        ours, theirs = os.pipe()
        with open(ours, "rb", buffering=0) as answer:
            try:
                socket.send_fds(self._jobs, [message], [theirs])
            except OSError:
                pass  # There is no server any more, nor will there be an answer.
            finally:
                os.close(theirs)
            status = answer.read(16)
        if not status:
            raise UserError(self._why_ended())
        return int(status)

    def _why_ended(self) -> str:
        lines = []
        # Closed by ourselves it has nothing to say.
        with contextlib.suppress(ValueError):
            self._said.seek(0)
            lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if lines else "it said nothing"
        return f"TPU-MLIR's tool chain ended ({last}): `make doctor` shows what it lacks."

    def close(self) -> None:
        """End the server and every job that runs."""
        self._jobs.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def serve(jobs: socket.socket, work: Callable[..., None]) -> None:
    """The server's end: do each job that comes in a fork, until none can come any more; then end those that run."""

    def do(log: str, threads: int, arguments: dict) -> None:
        os.setpgid(0, 0)
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        work(**arguments)

    # {a pipe that is closed when the job's process has ended: (that process, where to answer)}
    running: dict[int, tuple[int, int]] = {}
    while True:
        for ready in select.select([jobs.fileno(), *running], [], [])[0]:
            if ready in running:
                pid, answer = running.pop(ready)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(BrokenPipeError):
                    os.write(answer, str(status).encode())
                os.close(ready)
                os.close(answer)
                continue
            message, descriptors, *_ = socket.recv_fds(jobs, _MESSAGE_BYTES, 1)
            if not message:
                for pid, _ in running.values():
                    os.killpg(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                return
            ended, held = os.pipe()
            pid = processes.fork(lambda message=message: do(**json.loads(message)))
            # The child does so, too: neither may come too late.
            os.setpgid(pid, pid)
            os.close(held)
            running[ended] = pid, descriptors[0]
