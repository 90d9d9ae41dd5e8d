"""The BM1684X of the tpu-mlir wheel's bit-level simulator, in a process of its own.

Whatever a bmodel does to the simulator (it asserts, aborts, or takes all memory), the caller reads one sentence.
"""

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import BinaryIO

import numpy as np

from helpers import machine
from helpers.bmodel.bmodel import Bmodel, runnable_bmodel
from helpers.errors import UserError
from helpers.run.engines.base import DeviceTensor, Engine, NetMemory
from helpers.tensors import HOST_DTYPE, NetInfo, TensorInfo
from helpers.toolchain import wheel_path

WORKER = Path(__file__).with_name("simulator_worker.py")
YIELD_SOURCE = Path(__file__).with_name("simulator_yield.c")
# Only a compiler that hangs is given up.
COMPILER_SECONDS = 60
CMODEL = "libcmodel_bm1684x.so"
# What the runtime and the simulator print before they give up, the most telling first.
TELLING = ("Memory exhausted", "FATAL", "ASSERT /", "BMRT_ASSERT", "ssertion", "what():", "rror")
# bmlib hands out memory from 0x105100000 on; what lies between it and 0x100000000 belongs to the firmware.
FIRMWARE_BYTES = 0x5100000
# 64 MB for the runtime itself and alignment to pages, 256 MB for `allocate`.
RUNTIME_BYTES = (64 + 256) << 20


class SimulatorEngine(Engine):
    """A bmodel on the simulator.

    scheduling: "yield" where a preloaded library (simulator_yield.c) keeps the simulator's threads from waiting for
    each other, "plain" where not, which is 20 to 100 times slower. What is computed is the same. Where "yield" is asked
    for and this machine cannot, it is "plain", and `no_yield` says why.

    Raises UserError where the wheel is not installed, the bmodel cannot be loaded, or memory does not suffice.
    """

    name = "simulator"
    kind_of_time = "simulator wall"

    def __init__(self, bmodel: str | os.PathLike, scheduling: str = "yield"):
        described = runnable_bmodel(bmodel, devices=1)
        need, on_host = described.device_bytes, _host_bytes(described)
        if on_host > (free := machine.free_memory()):
            raise UserError(
                f"The simulator needs about {on_host / 1e9:.1f} GB of memory for {bmodel} and {free / 1e9:.1f} GB are "
                "free: close other programs, or take a smaller model."
            )
        self._worker = SimulatorProcess(scheduling, need)
        self.scheduling, self.no_yield = self._worker.scheduling, self._worker.no_yield
        try:
            self._worker.call("open", os.path.abspath(bmodel), subject=f"{bmodel} could not be opened")
            nets = {name: net.info for name, net in described.nets.items()}
            own_memory = self._own_memory([net for net in nets.values() if net.addr_mode == "io_alone"])
        except BaseException:
            self._worker.close()
            raise
        super().__init__((0,), nets, own_memory, need)

    def _own_memory(self, nets: Sequence[NetInfo]) -> NetMemory:
        found = {}
        for net in nets:
            for kind, addresses in zip(("inputs", "outputs"), self._worker.call("addresses", net.name), strict=True):
                for index, (info, address) in enumerate(zip(getattr(net, kind), addresses, strict=True)):
                    found[net.name, kind, index] = DeviceTensor(info.shape, info.dtype, 0, address)
        return found

    def _allocate(self, shape: tuple[int, ...], dtype: str, device: int) -> int:
        return self._worker.call("allocate", TensorInfo("", shape, dtype).bytes)

    def _view(self, tensor: DeviceTensor, offset_elements: int, shape: tuple[int, ...]) -> int:
        return tensor.memory + offset_elements * HOST_DTYPE[tensor.dtype].itemsize

    def _write(self, tensor: DeviceTensor, values: np.ndarray) -> None:
        self._worker.call("write", tensor.memory, values.tobytes())

    def _read(self, tensor: DeviceTensor) -> np.ndarray:
        data = self._worker.call("read", tensor.memory, tensor.bytes)
        return np.frombuffer(bytearray(data), dtype=HOST_DTYPE[tensor.dtype]).reshape(tensor.shape)

    def _copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        self._worker.call("copy", source.memory, target.memory, source.bytes)

    def _run(self, net: str, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> None:
        described = [[(t.memory, t.shape, t.dtype) for t in tensors] for tensors in (inputs, outputs)]
        self._worker.call("run", net, *described, subject=f"The simulator stopped while running {net}")

    def close(self) -> None:
        self._worker.close()


def simulators_at_once(bmodels: Sequence[str | os.PathLike]) -> int:
    """How many of these bmodels can run side by side: one at least, as many as free memory holds.

    Raises UserError for a bmodel that the simulator cannot take.
    """
    largest = max(_host_bytes(runnable_bmodel(bmodel, devices=1)) for bmodel in bmodels)
    return max(1, min(len(bmodels), machine.free_memory() // largest))


def _host_bytes(bmodel: Bmodel) -> int:
    """Memory of the host while a bmodel is opened: the runtime holds the file while it copies it to the device."""
    return bmodel.device_bytes + bmodel.file_bytes


class SimulatorProcess:
    """The simulator's process and the conversation with it.

    The conversation is held by a thread: Ctrl-C interrupts the one who waits for an answer, never an answer half read,
    so that after it the engine can be used again (the next call waits for the run that was interrupted).
    """

    def __init__(self, scheduling: str, need: int):
        libraries = wheel_path() / "lib"
        if not (libraries / CMODEL).exists():
            raise UserError(f"No simulator in {libraries}: install tpu-mlir again (`make setup`).")
        self._closed = False
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        try:
            with tempfile.TemporaryDirectory(prefix="qwen-simulator-", ignore_cleanup_errors=True) as scratch:
                self._log = open(f"{scratch}/log", "ab+")  # noqa: SIM115  it outlives its name
                # The wheel's own file of this name is a link, which its tools turn to other chips.
                os.symlink(libraries / CMODEL, f"{scratch}/libcmodel.so")
                self.no_yield = _build_yield_library(scratch) if scheduling == "yield" else "It was not asked for"
                connection, yields = self._start(scratch, libraries, need)
        except OSError as error:
            raise UserError(f"The simulator's process could not be started: {error}.") from error
        if not yields and not self.no_yield:
            self.no_yield = " ".join(["The library is not loaded:", *self._logged()[-1:]])
        self.scheduling = "yield" if yields else "plain"
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._process, self._requests, self._log)
        threading.Thread(target=_converse, args=(connection, self._requests), name="simulator", daemon=True).start()

    def _start(self, scratch: str, libraries: Path, need: int) -> tuple[Connection, bool]:
        """Start the process; the conversation with it, and whether it has loaded the library that makes it yield."""
        ours, theirs = socketpair()
        connection = Connection(ours.detach())
        environment = os.environ | {
            # These are split at colons, and the second at spaces too: no name of a folder is among them.
            "LD_LIBRARY_PATH": ".",
            "LD_PRELOAD": "" if self.no_yield else "./simulator_yield.so",
            "OMP_NUM_THREADS": "1",
            # Hexadecimal. The simulator takes it from the host page by page, as it is touched.
            "CMODEL_GLOBAL_MEM_SIZE": hex(FIRMWARE_BYTES + need + need // 4 + RUNTIME_BYTES),
        }
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", WORKER, libraries, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                cwd=scratch,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is the caller's to answer
            )
        try:
            return connection, connection.recv()
        except (EOFError, OSError):
            raise UserError(f"The simulator's process could not be started: {self._cause_of_death()}") from None
        except BaseException:
            self._process.kill()
            raise

    def call(self, *request: object, subject: str = "The simulator stopped") -> object:
        """One operation of the worker and its arguments; raises UserError where it refuses or dies."""
        answer: Future = Future()
        with self._lock:
            if self._closed:
                raise UserError("This engine is closed: open the bmodel again.")
            self._requests.put((request, answer))
        try:
            status, value = answer.result()
        except (EOFError, OSError):
            raise UserError(f"{subject}: {self._cause_of_death()}") from None
        if status == "error":
            raise UserError(f"{subject}: {value}.{self._last_words()}")
        return value

    def _last_words(self) -> str:
        """The most telling line of the log, as the end of a message; empty where there is none."""
        lines = self._logged()
        told = next((line for mark in TELLING for line in lines if mark in line), None)
        return f" The runtime's last words: {' '.join(told.split())}" if told else ""

    def _logged(self) -> list[str]:
        try:
            log = os.pread(self._log.fileno(), os.stat(self._log.fileno()).st_size, 0)
            return log.decode(errors="replace").strip().splitlines()
        except ValueError:  # closed meanwhile
            return []

    def _cause_of_death(self) -> str:
        if self._closed:
            return "the engine was closed."
        # It ends the conversation only by ending itself.
        code = self._process.wait()
        cause = f"its process ended with {signal.Signals(-code).name if code < 0 else f'code {code}'}"
        if code == -signal.SIGKILL:
            cause += ", most likely because the machine ran out of memory"
        return f"{cause}; open the engine again, and if it happens again compile the bmodel again.{self._last_words()}"

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._finalizer()


def _converse(connection: Connection, requests: queue.SimpleQueue) -> None:
    with connection:
        while (job := requests.get()) is not None:
            request, answer = job
            try:
                connection.send(request)
                answer.set_result(connection.recv())
            except (EOFError, OSError) as error:
                answer.set_exception(error)


def _end(owner: int, process: subprocess.Popen, requests: queue.SimpleQueue, log: BinaryIO) -> None:
    if os.getpid() != owner:  # a forked copy of the caller ends
        return
    requests.put(None)
    process.kill()
    process.wait()
    log.close()


def _build_yield_library(folder: str) -> str:
    """Make simulator_yield.so in a folder, in some fifty milliseconds; why that failed in a sentence, else nothing."""
    compiler = os.environ.get("CC", "").split() or ["cc"]
    if not shutil.which(compiler[0]):
        return f"No C compiler ({compiler[0]}) was found: install one"
    try:
        subprocess.run(
            [*compiler, "-O2", "-shared", "-fPIC", "-o", f"{folder}/simulator_yield.so", YIELD_SOURCE, "-ldl"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=os.environ | {"TMPDIR": folder, "LC_ALL": "C"},
            timeout=COMPILER_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        said = next((line for line in lines if "error" in line), f"it ended with code {error.returncode}")
        return f"{compiler[0]} could not build it: {said}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler[0]} could not build it: {error}"
    return ""
