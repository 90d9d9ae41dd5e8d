"""Jobs of the compiler: one net each, as a plain function of plain data, so that any executor can run them.

Locally that is a pool of threads; with a Dask scheduler, its workers. Either way the nets of one process share its
compile servers and one account of its free memory.
"""

import atexit
import contextlib
import functools
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.bmodel import bmodel
from helpers.compile import memory
from helpers.compile.log import own_error, read_log
from helpers.compile.profile import FIGURES, PROFILE, net_figures
from helpers.compile.server import CompilerServer
from helpers.errors import UserError
from helpers.export.signature import Signature
from helpers.files import digest_of, sha256_file

# Seconds for a scheduler that accepts a connection, and for an address where nobody says whether there is one.
SCHEDULER_TIMEOUT, CONNECT_TIMEOUT = 600, 60
# A net that failed on a disk with less than this, and its weights once more, is taken to have failed for want of space.
SPACE_LEFT_BYTES = 16_000_000
# What of these helpers decides the content of a net and of its record.
_CODE = artefacts.code_of("compile.frontend", "compile.graph", "compile.jobs", "compile.profile", "compile.worker")


@dataclass(frozen=True)
class NetToCompile:
    """A net and what it is compiled with, as plain data: an executor may take it to another machine.

    onnx: its file, and signature what that says of itself. folder: of all nets of this mode. settings: of
    helpers.compile.options.net_settings. recorded: {file name: SHA-256 that the export wrote down}. threads: how many
    the compiler may have.
    """

    net: str
    onnx: Path
    signature: Signature
    folder: Path
    settings: dict
    recorded: dict[str, str] = field(default_factory=dict)
    threads: int = 1

    def inputs(self) -> dict[str, str]:
        """{file name: SHA-256} of the ONNX file and of those with its weights.

        Raises UserError where one is not what the export wrote.
        """
        digests = {}
        for path in [self.onnx, *(self.onnx.with_name(name) for name in sorted(self.signature.external))]:
            digests[path.name] = digest(path)
            if self.recorded.get(path.name, digests[path.name]) != digests[path.name]:
                raise UserError(
                    f"{path} is not what the export wrote (its SHA-256 differs): export again with `python -m helpers "
                    "export`, which makes just the damaged files anew."
                )
        return digests


def digest(path: Path) -> str:
    """SHA-256 of a file, computed once while it does not change: nets share their weights."""
    state = path.stat()
    return _digest(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.cache
def _digest(path: Path, *state: int) -> str:
    return sha256_file(path)


class _Shared:
    """What the nets that one process compiles share: a server for each thread, and the gate."""

    def __init__(self):
        self.servers: dict[int, CompilerServer] = {}
        self.close()

    def server(self, log: Path) -> CompilerServer:
        """This thread's server. log: of the net that it is for. Raises UserError where the compile was ended."""
        server = self.servers.get(thread := threading.get_ident())
        if server is None or not server.alive:
            server = self.servers[thread] = CompilerServer(log)
        if self._ended:
            server.close()
            raise UserError("The compile was ended before this net began.")
        return server

    def close(self, ended: bool = False) -> None:
        """End the servers and what they run; the gate will look at the free memory anew.

        ended: nets that have not begun never will, until the next call.
        """
        self._ended = ended
        for server in list(self.servers.values()):
            server.close()
        self.servers.clear()
        self.gate = memory.MemoryGate()


shared = _Shared()
atexit.register(shared.close)


def compile_net(task: NetToCompile) -> dict:
    """Compile one net if it is not there already, made from the same inputs and settings; return its record.

    Returns {bmodel (path), sha256, bytes (weights and instructions), seconds, cycles, ms, ddr_bw, flops}; the last four
    are None where the compiler's profile has none (helpers.compile.profile).
    Raises UserError with the net's own error and the path of its log.
    """
    artefact, file = task.folder / task.net, f"{task.net}.bmodel"
    inputs = task.inputs()
    if not artefacts.up_to_date(artefact, inputs, task.settings, _CODE):
        _build(task, artefact, inputs)
    record = artefacts.read_manifest(artefact)
    return {
        "bmodel": str(artefact / file),
        "sha256": record["outputs"][file]["sha256"],
        **{key: record[key] for key in ("seconds", *FIGURES)},
    }


def _build(task: NetToCompile, artefact: Path, inputs: dict[str, str]) -> None:
    task.folder.mkdir(parents=True, exist_ok=True)
    log = artefact.with_name(f"{task.net}.log")
    # Kernels depend on shapes and settings, which all blocks of a model share; a machine has its own.
    shapes = sorted(task.signature.inputs.items())
    kind = digest_of([task.settings, shapes, _CODE, machine.tool_versions()])[:16]
    kernels = artefact.parent / f".kernels.{socket.gethostname()}" / kind
    extra: dict = {}
    # Before it waits for memory: where the compile is ended meanwhile, it finds this one closed.
    server = shared.server(log)
    with (
        shared.gate.room_for(task.net, memory.needed(task.signature.weights_bytes)),
        artefacts.building(
            artefact, kind="net", inputs=inputs, settings=task.settings, code=_CODE, extra=extra
        ) as partial,
    ):
        partial.mkdir()
        arguments = {"net": task.net, "onnx": task.onnx, "settings": task.settings, "work": partial, "kernels": kernels}
        if status := server.run(log, task.threads, **arguments):
            raise _failure(task, log, status, machine.free_disk(partial))
        made = bmodel.read_bmodel(partial / f"{task.net}.bmodel")
        (net,) = made.nets.values()
        if task.net.startswith("block"):
            _require_split(net, task.settings["num_device"])
        extra |= net_figures(net, partial / PROFILE)
        bmodel.strip_time(made.path)


def _failure(task: NetToCompile, log: Path, status: int, free: int) -> UserError:
    """What to say of a net that failed. free: bytes of the disk that it was written to, as it left them."""
    # The tools say of a full disk whatever they fail at because of it.
    if free < task.signature.weights_bytes + SPACE_LEFT_BYTES:
        return UserError(
            f"{task.net} did not compile, and the disk that holds {task.folder} has only {free / 1e6:.0f} MB left: "
            "free some, or choose another --out, and run the same command again; what was finished is kept (its log is "
            f"{log})."
        )
    return UserError(f"{task.net} did not compile: {own_error(read_log(log), status)} (its log is {log})")


def _require_split(net: bmodel.Net, devices: int) -> None:
    """Raises UserError where a block was not split over its devices in full: each has states, key and value."""
    if len(net.info.outputs) != 3 * devices:
        raise UserError(
            f"The compiler does not split {net.info.name} over {devices} devices: it leaves matrices of a few million "
            "weights whole, so the model is too small for it. Take --num_device 1, or --via llm_convert, which gives "
            "each device all of the work."
        )


def compile_nets(tasks: list[NetToCompile], jobs: int, scheduler: str | None, title: str) -> dict[str, dict]:
    """Compile nets: `jobs` of them at a time here, or on the Dask cluster at an address; {net: its record}.

    title: of a bar. Raises UserError as `compile_net`, and where nobody answers.
    """
    # The first of each kind goes first: those after it find its kernels (helpers.compile.worker), and the prefill block
    # takes longest.
    ordered = sorted(tasks, key=lambda task: ("block_0", "block_cache_0", task.net).index(task.net))
    records: dict[str, dict] = {}
    with _threads(jobs) if scheduler is None else _cluster(scheduler) as pool:
        nets = {pool.submit(compile_net, task): task.net for task in ordered}
        for future in (bar := tqdm(as_completed(nets), desc=title, total=len(nets), unit="net")):
            records[nets[future]] = future.result()
            bar.set_postfix_str(nets[future], refresh=False)
    return {task.net: records[task.net] for task in tasks}


@contextlib.contextmanager
def _threads(jobs: int) -> Iterator[Executor]:
    shared.close()
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="compile")
    try:
        yield pool
    finally:
        # After Ctrl-C, or a net that failed, none goes on in the background and none begins there.
        pool.shutdown(wait=False, cancel_futures=True)
        shared.close(ended=True)
        pool.shutdown()
        shared.close()


@contextlib.contextmanager
def _cluster(scheduler: str) -> Iterator[Executor]:
    """The workers of a Dask cluster, which see the same folders under the same paths as this machine.

    Raises UserError where no scheduler answers at the address.
    """
    # Only here: it takes a second to import.
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
