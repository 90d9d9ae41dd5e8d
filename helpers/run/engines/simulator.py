"""The BM1684X of the tpu-mlir wheel's bit-level simulator, in a process of its own.

Whatever a bmodel does to the simulator (it asserts, aborts, or takes all memory), the caller reads one sentence.
"""

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from socket import socketpair
from typing import BinaryIO

import numpy as np

from helpers import machine
from helpers.errors import UserError
from helpers.run.engines import yield_library
from helpers.run.engines.base import DeviceTensor, Engine, NetMemory
from helpers.run.engines.loading import checked_bmodel, device_bytes
from helpers.tensors import ADDR_MODES, HOST_DTYPE, NetInfo, TensorInfo
from helpers.toolchain import wheel_path

WORKER = Path(__file__).with_name("simulator_worker.py")
# The wheel's own files of these names are links, which its tools turn to other chips.
LIBRARIES = {"libcmodel.so": "libcmodel_bm1684x.so", "libbmlib.so.0": "libbmlib_bm1684x.so.0"}
# What the runtime and the simulator print before they give up, the most telling first.
TELLING = ("Memory exhausted", "FATAL", "ASSERT /", "BMRT_ASSERT", "ssertion", "what():", "rror")
# bmlib hands out memory from 0x105100000 on; what lies between it and 0x100000000 belongs to the firmware.
FIRMWARE_BYTES = 0x5100000
PAGE_BYTES = 4096
# What the runtime takes for itself, and alignment to pages.
RUNTIME_BYTES = 64 << 20
# For `allocate`.
SLACK_BYTES = 256 << 20
SCHEDULING = ("yield", "priority", "plain")


class SimulatorEngine(Engine):
    """A bmodel on the simulator.

    scheduling: how the simulator's threads are kept from waiting for each other. "yield": by the preloaded library
    (simulator_yield.c). "priority": by the threads' priorities, which needs no C compiler. "plain": not at all.
    None takes the best that this machine can have; why that is not "yield" is in `no_yield`. What is computed is the
    same.

    Raises UserError where the wheel is not installed, the bmodel cannot be loaded, or memory does not suffice.
    """

    name = "simulator"
    kind_of_time = "simulator wall"

    def __init__(self, bmodel: str | os.PathLike, scheduling: str | None = None):
        need, on_host = _needed_bytes(bmodel)
        if on_host > (free := machine.free_memory()):
            raise UserError(
                f"The simulator needs about {on_host / 1e9:.1f} GB of memory for {bmodel} and {free / 1e9:.1f} GB are "
                "free: close other programs, or take a smaller model."
            )
        self._worker = SimulatorProcess(scheduling, need)
        self.scheduling, self.no_yield = self._worker.scheduling, self._worker.no_yield
        try:
            nets, own_memory = _nets(self._worker.call("open", str(bmodel), subject=f"{bmodel} could not be opened"))
        except BaseException:
            self._worker.close()
            raise
        super().__init__((0,), nets, own_memory, need)
        self._room = SLACK_BYTES

    def _take_room(self, shape: tuple[int, ...], dtype: str) -> None:
        size = TensorInfo("", shape, dtype).bytes + PAGE_BYTES
        # Where its memory is exhausted the simulator does not say so, it aborts.
        if size > self._room:
            raise UserError(
                f"No device memory for {dtype} {list(shape)}: beside the bmodel the simulator was opened with room for "
                f"{SLACK_BYTES >> 20} MB, {self._room >> 20} MB are left."
            )
        self._room -= size

    def _allocate(self, shape: tuple[int, ...], dtype: str, device: int) -> int:
        return self._worker.call("allocate", TensorInfo("", shape, dtype).bytes)

    def _view(self, tensor: DeviceTensor, offset_elements: int, shape: tuple[int, ...]) -> int:
        return tensor.memory + offset_elements * HOST_DTYPE[tensor.dtype].itemsize

    def _write(self, tensor: DeviceTensor, values: np.ndarray) -> None:
        self._worker.call("write", tensor.memory, data=values)

    def _read(self, tensor: DeviceTensor) -> np.ndarray:
        data = self._worker.call("read", tensor.memory, tensor.bytes)
        return np.frombuffer(bytearray(data), dtype=HOST_DTYPE[tensor.dtype]).reshape(tensor.shape)

    def _copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        self._worker.call("copy", source.memory, target.memory, source.bytes)

    def _run(self, net: str, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> None:
        described = [[(t.memory, t.shape, t.dtype) for t in tensors] for tensors in (inputs, outputs)]
        self._worker.call("run", net, *described, subject=f"The simulator stopped while running {net}")

    def processor_seconds(self) -> float:
        """Processor time that the simulator's process has taken, all of its threads together."""
        return self._worker.processor_seconds()

    def close(self) -> None:
        self._worker.close()


def simulators_at_once(bmodels: Sequence[str | os.PathLike]) -> int:
    """How many of these bmodels can run side by side: one at least, as many as free memory holds.

    Raises UserError for a bmodel that the simulator cannot take.
    """
    largest = max(_needed_bytes(bmodel)[1] for bmodel in bmodels)
    return max(1, min(len(bmodels), machine.free_memory() // largest))


def _needed_bytes(bmodel: str | os.PathLike) -> tuple[int, int]:
    """Memory of the simulated device, and of the host while the bmodel is opened."""
    described = checked_bmodel(bmodel, devices=1)
    need = device_bytes(described)
    # The runtime holds the file while it copies it to the device.
    return need, need + described.file_bytes


def _nets(answer: dict) -> tuple[dict[str, NetInfo], NetMemory]:
    """What the worker's `open` answers."""
    nets, own_memory = {}, {}
    for net, (*sides, addr_mode, dynamic) in answer.items():
        infos = [tuple(TensorInfo(*tensor) for *tensor, _ in side) for side in sides]
        nets[net] = NetInfo(net, *infos, ADDR_MODES[addr_mode], dynamic)
        if nets[net].addr_mode == "io_alone":
            for kind, side in zip(("inputs", "outputs"), sides, strict=True):
                for index, (_, shape, dtype, address) in enumerate(side):
                    own_memory[net, kind, index] = DeviceTensor(shape, dtype, 0, address)
    return nets, own_memory


class SimulatorProcess:
    """The simulator's process and the conversation with it.

    The conversation is held by a thread: Ctrl-C interrupts the one who waits for an answer, never an answer half read,
    so that after it the engine can be used again (the next call waits for the run that was interrupted).
    """

    def __init__(self, scheduling: str | None, need: int):
        libraries = wheel_path() / "lib"
        if not (libraries / "libcmodel_bm1684x.so").exists():
            raise UserError(f"No simulator in {libraries}: install tpu-mlir again (`make setup`).")
        self.no_yield = ""
        self._closed = False
        self._lock = threading.Lock()
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        try:
            with contextlib.ExitStack() as undo:
                self._scratch = Path(tempfile.mkdtemp(prefix="qwen-simulator-"))
                undo.callback(shutil.rmtree, self._scratch, ignore_errors=True)
                self._log = self._scratch / "log"
                for name, library in LIBRARIES.items():
                    try:
                        (self._scratch / name).symlink_to(libraries / library)
                    except OSError:  # a disk without links
                        shutil.copyfile(libraries / library, self._scratch / name)
                connection = self._start_best(libraries, scheduling, need)
                undo.pop_all()
        except OSError as error:
            raise UserError(f"The simulator's process could not be started: {error}.") from error
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._process, self._requests, self._scratch)
        threading.Thread(target=_converse, args=(connection, self._requests), name="simulator", daemon=True).start()

    def _start_best(self, libraries: Path, scheduling: str | None, need: int) -> Connection:
        """Start the process so that its threads yield, if this machine loads the library, else as asked for."""
        failures = []
        for library in yield_library.candidates() if scheduling in (None, "yield") else ():
            if isinstance(library, str):
                failures.append(library)
                continue
            for in_memory in (True, False):
                with contextlib.suppress(OSError), self._file_of(library, in_memory) as preload:
                    if connection := self._start(libraries, "yield", need, preload.fileno()):
                        yield_library.keep(library)
                        return connection
            said = self._logged() or ["the system says nothing"]
            failures.append(f"The library is not loaded ({said[-1]})")
        self.no_yield = "; ".join(dict.fromkeys(failures))
        if scheduling == "yield":
            raise UserError(f"The simulator's threads cannot be made to yield. {self.no_yield}.")
        if not (connection := self._start(libraries, scheduling or "priority", need)):
            raise UserError(f"The simulator's process could not be started: {self._cause_of_death()}")
        return connection

    @contextlib.contextmanager
    def _file_of(self, library: bytes, in_memory: bool) -> Iterator[BinaryIO]:
        """The library as an open file, on no disk or, where code in anonymous memory cannot be run, on one."""
        if in_memory and not hasattr(os, "memfd_create"):  # a Python that was built on an old system
            raise OSError
        place = os.memfd_create("simulator_yield") if in_memory else self._scratch / "simulator_yield.so"
        with open(place, "wb") as file:
            file.write(library)
            file.flush()
            yield file

    def _start(self, libraries: Path, scheduling: str, need: int, preload: int | None = None) -> Connection | None:
        """Start the process; None where it ends at once, or it was to yield and has not loaded the library."""
        self.scheduling = scheduling
        ours, theirs = socketpair()
        with contextlib.ExitStack() as opened:
            opened.enter_context(theirs)
            connection = Connection(ours.detach())
            log = opened.enter_context(open(self._log, "ab"))
            log.truncate(0)
            # The loader splits its variables at colons, and LD_PRELOAD at spaces; /proc/self/fd/N has neither.
            folders = [os.open(folder, os.O_PATH) for folder in (self._scratch, libraries)]
            for folder in folders:
                opened.callback(os.close, folder)
            environment = os.environ | {
                "LD_LIBRARY_PATH": ":".join(f"/proc/self/fd/{folder}" for folder in folders),
                "OMP_NUM_THREADS": "1",
                # Hexadecimal. The simulator takes it from the host page by page, as it is touched.
                "CMODEL_GLOBAL_MEM_SIZE": hex(FIRMWARE_BYTES + need + need // 4 + RUNTIME_BYTES + SLACK_BYTES),
            }
            inherited = [theirs.fileno(), *folders]
            if preload is not None:
                environment["LD_PRELOAD"] = f"/proc/self/fd/{preload}"
                inherited.append(preload)
            arguments = (libraries, theirs.fileno(), os.getpid(), self._scratch, scheduling)
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER), *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=inherited,
                start_new_session=True,  # Ctrl-C in the terminal is the caller's to answer
            )
        try:
            yields = connection.recv()
            if yields or preload is None:
                return connection
        except (EOFError, OSError):
            pass
        except BaseException:
            process.kill()
            raise
        connection.close()
        if preload is not None:
            process.kill()
        process.wait()
        return None

    def call(self, *request: object, data: np.ndarray | None = None, subject: str = "The simulator stopped") -> object:
        """One operation of the worker; raises UserError where it refuses or dies."""
        answer: Future = Future()
        with self._lock:
            if self._closed:
                raise UserError("This engine is closed: open the bmodel again.")
            self._requests.put((request, data, answer))
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
            return self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            return []

    def _cause_of_death(self) -> str:
        if self._closed:
            return "the engine was closed."
        # It ends the conversation only by ending itself.
        code = self._process.wait()
        if code == -signal.SIGKILL:
            cause = "its process was killed, most likely because the machine ran out of memory"
        elif code < 0:
            cause = f"its process died of {signal.Signals(-code).name}"
        else:
            cause = f"its process ended with code {code}"
        return f"{cause}; open the engine again, and if it happens again compile the bmodel again.{self._last_words()}"

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._finalizer()


def _converse(connection: Connection, requests: queue.SimpleQueue) -> None:
    with connection:
        while (job := requests.get()) is not None:
            request, data, answer = job
            try:
                connection.send(request)
                if data is not None:
                    connection.send_bytes(data.reshape(-1).view(np.uint8))
                status, value = connection.recv()
                if status == "ok" and request[0] == "read":
                    value = connection.recv_bytes()
                answer.set_result((status, value))
            except (EOFError, OSError) as error:
                answer.set_exception(error)


def _end(owner: int, process: subprocess.Popen, requests: queue.SimpleQueue, scratch: Path) -> None:
    if os.getpid() != owner:  # a forked copy of the caller ends
        return
    requests.put(None)
    process.kill()
    process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
