"""A process that has imported the tool chain once, and forks for every net.

Importing TPU-MLIR's front end takes longer than compiling a small net with it; a fork of a process that has it costs
nothing, and a net that brings its process down takes nothing else along.

The server speaks JSON, a line a message, over its standard input and output, and keeps no thread, so that forking is
safe. It ends with its children when its input ends: however its parent dies, nothing is left running.
"""

import contextlib
import ctypes
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from helpers import toolchain
from helpers.errors import UserError

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies (Linux). For children of processes without threads."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class CompilerServer:
    """The client's end: start, submit jobs from any thread, close. A context manager."""

    def __init__(self):
        """Raises UserError where the tool chain cannot work on this machine."""
        toolchain.require()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[threading.Event, list]] = {}
        self._numbers = itertools.count()
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.compile.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Each net has kernels of its own, or those of a net before it (helpers.compile.worker).
            env=toolchain.environment(threads=1, kernel_locks=False),
            # From there it takes these helpers; a folder's name may have a colon, which PYTHONPATH cannot hold.
            cwd=Path(__file__).resolve().parents[2],
            # Ctrl-C goes to the whole foreground group: the parent decides what it means.
            start_new_session=True,
        )
        self._ready = threading.Event()
        self._dead = False
        self._reader = threading.Thread(target=self._read, name="compiler-server", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            message = json.loads(line)
            if "ready" in message:
                self._ready.set()
                continue
            with self._lock:
                event, answer = self._waiting.pop(message["id"])
            answer.append(message["status"])
            event.set()
        with self._lock:
            self._dead = True
            waiting, self._waiting = self._waiting, {}
        self._ready.set()
        for event, _ in waiting.values():
            event.set()

    @property
    def alive(self) -> bool:
        return not self._dead

    def run(self, job: dict) -> int:
        """Run one job in a fork of its own and wait: its exit status, negative for a signal.

        Raises UserError where the server has ended, or was closed meanwhile.

        job: JSON-serialisable, for helpers.compile.worker.compile_net; "log" names the file for its output.
        """
        self._ready.wait()
        event, answer = threading.Event(), []
        number = next(self._numbers)
        with self._lock:
            if self._dead:
                raise UserError(self._why_dead())
            self._waiting[number] = (event, answer)
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"id": number, "job": job}).encode() + b"\n")
                self._process.stdin.flush()
        event.wait()
        if not answer:
            raise UserError(self._why_dead())
        return answer[0]

    def _why_dead(self) -> str:
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it said nothing"
        return f"TPU-MLIR's tool chain ended ({last}): `make doctor` shows what it lacks."

    def close(self) -> None:
        """End the server and every job that runs."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> "CompilerServer":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _run_child(job: dict) -> None:
    """In the fork: become a group of its own, send all output to the job's log, work, exit."""
    status = 1
    try:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.environ["OMP_NUM_THREADS"] = str(job["threads"])
        from helpers.compile import worker

        worker.compile_net(job)
        status = 0
    except UserError as error:
        print(f"error: {error}", flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(requests: int, answers: int) -> None:
    def say(**message) -> None:
        os.write(answers, json.dumps(message).encode() + b"\n")

    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    selector = selectors.DefaultSelector()
    selector.register(requests, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    pending = b""
    say(ready=True)
    server = os.getpid()
    while True:
        for key, _ in selector.select():
            if key.fd == wake_read:
                os.read(wake_read, 4096)
                continue
            chunk = os.read(requests, 1 << 16)
            if not chunk:
                for pid in running:
                    # A child that was forked a moment ago may not lead its group yet.
                    for kill in (os.killpg, os.kill):
                        with contextlib.suppress(ProcessLookupError):
                            kill(pid, signal.SIGKILL)
                return
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    die_with_parent()
                    if os.getppid() != server:
                        os._exit(1)
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for descriptor in (requests, answers, wake_read, wake_write):
                        os.close(descriptor)
                    _run_child(request["job"])
                running[pid] = request["id"]
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            if pid in running:
                say(id=running.pop(pid), status=os.waitstatus_to_exitcode(status))


def main() -> None:
    """Import the tool chain, then serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    # Whatever the tool chain prints while it is imported must not be taken for an answer.
    os.dup2(2, 1)
    from helpers.compile import worker

    worker.preload()
    _serve(requests, answers)


if __name__ == "__main__":
    main()
