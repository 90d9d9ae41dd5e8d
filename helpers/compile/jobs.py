"""Jobs of the compiler: one net each, as a plain function of plain data, so that any executor can run them.

Locally that is a pool of threads; with a Dask scheduler, its workers. Either way each machine has one compiler server
and one account of its free memory.
"""

import atexit
import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from helpers import artefacts, machine
from helpers.bmodel import bmodel
from helpers.compile.profile import PROFILE, read_profile
from helpers.compile.server import CompilerServer
from helpers.errors import UserError
from helpers.files import digest_of, sha256_file

# Peak memory of one net, measured at Qwen-7B's size: 1.7 GB for a block (0.81 GB of float32 weights), 7.5 GB for an
# embedding and 8.6 GB for lm_head (2.49 GB each). The base is the front end's own, with room to spare.
BASE_MEMORY = 500_000_000
MEMORY_PER_WEIGHT_BYTE = 3.3
# Left to everything else on the machine.
MEMORY_SHARE = 0.9
# Seconds for a scheduler that accepts a connection, and for an address where nobody says whether there is one.
SCHEDULER_TIMEOUT, CONNECT_TIMEOUT = 600, 60
# A net that failed on a disk with less than this, and its weights once more, is taken to have failed for want of space.
SPACE_LEFT_BYTES = 16_000_000
RESULT = "result.json"
# What of these helpers decides the content of a net and of its record.
_CODE = artefacts.code_of("compile.graph", "compile.jobs", "compile.profile", "compile.worker")


def needed_memory(weights_bytes: int) -> int:
    """Bytes of memory that compiling a net takes at its peak. weights_bytes: size of its ONNX with its weights."""
    return int(BASE_MEMORY + MEMORY_PER_WEIGHT_BYTE * weights_bytes)


def memory_budget() -> int:
    """Bytes of memory that nets may take together: most of what could be used now without swapping."""
    return int(MEMORY_SHARE * machine.free_memory())


class MemoryGate:
    """Lets as many jobs run as fit into a budget of memory, in bytes. Jobs that come first go first where they fit."""

    def __init__(self, budget: int):
        self.budget = budget
        self._used = 0
        self._changed = threading.Condition()
        self._closed = False

    @contextlib.contextmanager
    def room_for(self, need: int) -> Iterator[None]:
        """Wait until `need` fits beside what runs. Raises UserError where it never will, or the gate was closed."""
        if need > self.budget:
            raise UserError(
                f"This net needs {need / 1e9:.1f} GB of memory to compile, {self.budget / 1e9:.1f} GB are free: close "
                "other programs, add swap, or compile on a larger machine (--scheduler)."
            )
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._used + need <= self.budget)
            if self._closed:
                raise UserError("The compile was ended before this net began.")
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Shared:
    """What the jobs of one process share: the server, started when first needed, and the gate."""

    def __init__(self):
        self._lock = threading.Lock()
        self._server: CompilerServer | None = None
        self._gate: MemoryGate | None = None
        self._digests: dict[tuple, str] = {}
        self._digesting: dict[tuple, threading.Lock] = {}

    def server(self) -> CompilerServer:
        with self._lock:
            if self._server is None or not self._server.alive:
                self._server = CompilerServer()
            return self._server

    def gate(self) -> MemoryGate:
        with self._lock:
            if self._gate is None:
                self._gate = MemoryGate(memory_budget())
            return self._gate

    def measure(self) -> None:
        """Look at the free memory anew, before a compile: nothing of this process runs."""
        with self._lock:
            self._gate = None

    def digest(self, path: Path) -> str:
        """SHA-256 of a file, computed once while it does not change: blocks share their weights."""
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns, state.st_ino)
        with self._lock:
            one = self._digesting.setdefault(key, threading.Lock())
        with one:
            if key not in self._digests:
                self._digests[key] = sha256_file(path)
            return self._digests[key]

    def close(self) -> None:
        with self._lock:
            if self._gate is not None:
                self._gate.close()
            if self._server is not None:
                self._server.close()
            self._server = self._gate = None


shared = _Shared()
atexit.register(shared.close)


def compile_net(task: dict) -> dict:
    """Compile one net if it is not there already, made from the same inputs and settings; return its record.

    task: net, onnx and files (paths of the ONNX file and of its outside weights), recorded {file name: sha256 that
    the export wrote down}, folder (of all nets of this mode), settings (helpers.compile.worker), memory (bytes),
    weights (bytes of its ONNX with its weights), shapes (of its inputs), threads. Returns {net, bmodel, sha256, bytes
    (weights and instructions), cycles, ms, ddr_bw, flops, seconds, made: bool}; the figures of the
    profile are None where the compiler has none (helpers.compile.profile).
    Raises UserError with the net's own error and the path of its log.
    """
    net, folder = task["net"], Path(task["folder"])
    inputs = {}
    for path in map(Path, task["files"]):
        inputs[path.name] = shared.digest(path)
        recorded = task["recorded"].get(path.name)
        if recorded and recorded != inputs[path.name]:
            raise UserError(
                f"{path} is not what the export wrote (its SHA-256 differs): export again with `python -m helpers "
                "export`, which makes just the damaged files anew."
            )
    artefact = folder / net
    made = not artefacts.up_to_date(artefact, inputs, task["settings"], _CODE)
    if made:
        _build(task, artefact, inputs)
    record = artefacts.read_manifest(artefact)
    file = f"{net}.bmodel"
    return {
        "net": net,
        "bmodel": str(artefact / file),
        "sha256": record["outputs"][file]["sha256"],
        "bytes": record["weight_bytes"] + record["instruction_bytes"],
        "seconds": record["seconds"],
        "made": made,
        **{key: (record["profile"] or {}).get(key) for key in ("cycles", "ms", "ddr_bw", "flops")},
    }


def _build(task: dict, artefact: Path, inputs: dict) -> None:
    net = task["net"]
    log = artefact.with_name(f"{net}.log")
    extra: dict = {}
    server = shared.server()
    with (
        shared.gate().room_for(task["memory"]),
        artefacts.building(
            artefact, kind="net", inputs=inputs, settings=task["settings"], code=_CODE, extra=extra
        ) as partial,
    ):
        partial.mkdir()
        job = {key: task[key] for key in ("net", "onnx", "settings", "threads")}
        # Kernels depend on shapes and settings, which all blocks of a model share; a machine has its own.
        kind = digest_of([task["settings"], task["shapes"], _CODE, machine.tool_versions()])[:16]
        kernels = artefact.parent / f".kernels.{socket.gethostname()}" / kind
        job |= {"work": str(partial), "log": str(log), "kernels": str(kernels)}
        status = server.run(job)
        if status:
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            # The tools say of a full disk whatever they fail at because of it; what they wrote is still there.
            if (free := machine.free_disk(partial)) < task["weights"] + SPACE_LEFT_BYTES:
                raise UserError(
                    f"{net} did not compile, and the disk that holds {artefact.parent} has only {free / 1e6:.0f} MB "
                    f"left: free some, or choose another --out, and run the same command again; what was finished is "
                    f"kept (its log is {log})."
                )
            raise UserError(f"{net} did not compile: {own_error(text, status)} (its log is {log})")
        result = partial / RESULT
        extra.update(json.loads(result.read_text(encoding="utf-8")))
        result.unlink()
        extra["profile"] = read_profile(partial / PROFILE, task["settings"]["num_device"])
        made = bmodel.read_bmodel(partial / f"{net}.bmodel")
        if net.startswith("block"):
            _require_split(made, task["settings"]["num_device"])
        extra["weight_bytes"] = made.weight_bytes
        extra["instruction_bytes"] = sum(part.instruction_bytes for part in made.nets.values())
        bmodel.strip_time(made.path)


def _require_split(made: bmodel.Bmodel, devices: int) -> None:
    """Raises UserError where a block was not split over its devices in full: each has states, key and value."""
    (net,) = made.nets.values()
    if len(net.info.outputs) != 3 * devices:
        raise UserError(
            f"The compiler does not split {net.info.name} over {devices} devices: it leaves matrices of a few million "
            "weights whole, so the model is too small for it. Take --num_device 1, or --via llm_convert, which gives "
            "each device all of the work."
        )


_NOISE = re.compile(
    r".*onnxruntime|ConstantFolding|#\d|PLEASE submit|Stack dump|\d+\.\s+Program arguments|\[Running\]|\[ *\]"
    r"|\S+ was ended by"
)
_ERROR = re.compile(
    r"error|assert|unreachable|abort|terminate|not support|unsupport|failed|exception|ended by SIG", re.IGNORECASE
)
_EXCEPTION = re.compile(r"^\w[\w.]*(Error|Exception|Interrupt)\b.*")


def own_error(log: str, status: int) -> str:
    """The line of a net's log that says why it failed. status: its exit status, negative for a signal."""
    lines = [re.split(r"\r|\x08", line)[-1].strip() for line in log.splitlines()]
    lines = [line for line in lines if line and not _NOISE.match(line)]
    # The wheel's scripts end in such an exception when a program that they ran has said why it failed.
    exceptions = [line for line in lines if _EXCEPTION.match(line) and "[!Error]" not in line]
    ours = [line for line in lines if line.startswith("error: ")]
    telling = [line for line in lines if line.startswith("what():")] or [line for line in lines if _ERROR.search(line)]
    if locked := re.search(r"Failed to open: (\S+\.lock)", log):
        owner = f"uid {os.stat(locked[1]).st_uid}" if os.path.exists(locked[1]) else "another user"
        return f"{locked[1]} belongs to {owner}: have its owner or root delete it, then run the same command again"
    if ours:
        return ours[-1].removeprefix("error: ")[:500]
    if exceptions:
        return exceptions[-1][:500]
    if telling:
        return telling[0][:500]
    how = f"status {status}" if status > 0 else f"signal {-status}"
    return f"it ended with {how}" + (f" after: {lines[-1][:300]}" if lines else " and said nothing")


@contextlib.contextmanager
def executor(jobs: int, scheduler: str | None = None) -> Iterator[Executor]:
    """A concurrent.futures executor: `jobs` threads here, or the workers of the Dask cluster at an address.

    Workers and this machine must see the same folders under the same paths.
    Raises UserError where no scheduler answers at the address.
    """
    if scheduler is None:
        shared.measure()
        pool = ThreadPoolExecutor(jobs, thread_name_prefix="compile")
        try:
            yield pool
        except BaseException:
            # Ctrl-C or a net that failed: nothing goes on in the background.
            pool.shutdown(wait=False, cancel_futures=True)
            shared.close()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return
    from distributed import Client
    from distributed.comm import get_address_host_port, resolve_address

    try:
        # A client that was given an impossible address takes 20 s to end, with a traceback.
        address = resolve_address(scheduler)
        # And one where nobody listens keeps it trying until its time is up.
        if not address.startswith("inproc:"):
            socket.create_connection(get_address_host_port(address), CONNECT_TIMEOUT).close()
        client = Client(scheduler, timeout=SCHEDULER_TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No Dask scheduler answers at {scheduler} ({error}): start one with `dask scheduler` and workers with "
            "`dask worker ADDRESS` in the same environment, or leave --scheduler out."
        ) from error
    with client:
        pool = client.get_executor()
        try:
            yield pool
        finally:
            # Without waiting, which cancels what has not begun.
            pool.shutdown(wait=False)
