"""Jobs of the compiler, one net each: a plain function of plain data for any executor, threads here or Dask's workers.

The nets of one process share its compile servers and one account of its free memory.
"""

import contextlib
import functools
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from helpers import artefacts, machine
from helpers.bmodel import bmodel
from helpers.compile import memory, server
from helpers.compile.log import own_error, read_log
from helpers.compile.needs import FIRST, Needs, needs_of
from helpers.compile.profile import FIGURES, PROFILE, net_figures
from helpers.cost import Work
from helpers.errors import UserError
from helpers.export.signature import Signature
from helpers.files import digest_of, sha256_file

# Seconds for a scheduler that accepts a connection, and for an address that may have none.
SCHEDULER_TIMEOUT, CONNECT_TIMEOUT = 600, 60
# What of these helpers decides the content of a net and of its record.
_CODE = artefacts.code_of("compile.frontend", "compile.graph", "compile.jobs", "compile.profile", "compile.worker")


@dataclass(frozen=True)
class NetToCompile:
    """A net and what it is compiled with, by helpers.compile.options.net_settings.

    folder: of all nets of this mode. recorded: {file name: SHA-256 that the export wrote down}. threads: how many the
    compiler may have.
    """

    net: str
    onnx: Path
    signature: Signature
    folder: Path
    settings: dict
    recorded: dict[str, str] = field(default_factory=dict)
    threads: int = 1

    @property
    def needs(self) -> Needs:
        """What compiling it takes."""
        return needs_of(self.net, self.signature.weights_bytes, self.settings["quantize"])

    def seems_made(self) -> bool:
        """Whether compile_net would find it made, as far as can be said without reading the files."""
        files = (self.onnx.name, *self.signature.external)
        inputs = {name: self.recorded[name] for name in files if name in self.recorded}
        return artefacts.up_to_date(self.folder / self.net, inputs, self.settings, _CODE, read=False)

    def inputs(self) -> dict[str, str]:
        """{file name: SHA-256} of the net's files. Raises UserError where one is not what the export wrote."""
        digests = {}
        for path in [self.onnx, *(self.onnx.with_name(name) for name in sorted(self.signature.external))]:
            state = path.stat()
            digests[path.name] = _digest(path, state.st_size, state.st_mtime_ns, state.st_ino)
            if self.recorded.get(path.name, digests[path.name]) != digests[path.name]:
                raise UserError(
                    f"{path} is not what the export wrote (its SHA-256 differs): export again with `python -m helpers "
                    "export`, which makes just the damaged files anew."
                )
        return digests


@functools.cache  # nets share their weights
def _digest(path: Path, *state: int) -> str:
    return sha256_file(path)


def compile_net(task: NetToCompile) -> dict:
    """Compile one net if it is not there already, made from the same inputs and settings.

    Returns its record: {bmodel (path), sha256, seconds, and the FIGURES of helpers.compile.profile}.
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
    log = artefact.with_name(f"{task.net}.log")
    # Kernels depend on shapes and settings, which all blocks of a model share; a machine has its own.
    shapes = sorted(task.signature.inputs.items())
    kind = digest_of([task.settings, shapes, _CODE, machine.tool_versions()])[:16]
    kernels = artefact.parent / f".kernels.{socket.gethostname()}" / kind
    extra: dict = {}
    with (
        memory.gate.room_for(task.net, task.needs.memory),
        artefacts.building(
            artefact, kind="net", inputs=inputs, settings=task.settings, code=_CODE, extra=extra
        ) as partial,
    ):
        partial.mkdir()
        arguments = {"net": task.net, "onnx": task.onnx, "settings": task.settings, "work": partial, "kernels": kernels}
        if status := server.own(log).run(log, task.threads, **arguments):
            # The tools say of a full disk whatever they fail at because of it.
            raise UserError(
                f"{task.net} did not compile: {own_error(read_log(log), status)} (its log is {log}; the disk has "
                f"{machine.free_disk(partial) / 1e9:.2f} GB left; what was finished is kept)"
            )
        made = bmodel.read_bmodel(partial / f"{task.net}.bmodel")
        (net,) = made.nets.values()
        if task.net.startswith("block"):
            _require_split(net, task.settings["num_device"])
        extra |= net_figures(net, partial / PROFILE)
        bmodel.strip_time(made.path)


def _require_split(net: bmodel.Net, devices: int) -> None:
    """Raises UserError where a block was not split over its devices in full: each has states, key and value."""
    if len(net.info.outputs) != 3 * devices:
        raise UserError(
            f"The compiler does not split {net.info.name} over {devices} devices, it is too small for that: take "
            "--num_device 1, or --via llm_convert, which gives each device all of the work."
        )


def in_order(tasks: list[NetToCompile]) -> list[NetToCompile]:
    """The first of each kind goes first: those after it find its kernels; and the prefill block takes longest."""
    return sorted(tasks, key=lambda task: (*FIRST, task.net).index(task.net))


def compile_nets(
    tasks: list[NetToCompile], jobs: int, scheduler: str | None, title: str, work: Work | None = None
) -> dict[str, dict]:
    """{net: its record}; `jobs` nets at a time here, or on the Dask cluster at an address. Raises UserError.

    work: is told of each net that is done.
    """
    records: dict[str, dict] = {}
    memory.gate = memory.MemoryGate()
    with ThreadPoolExecutor(jobs) if scheduler is None else _cluster(scheduler) as pool:
        nets: dict[Future, str] = {}
        try:
            for task in in_order(tasks):
                nets[pool.submit(compile_net, task)] = task.net
            for future in (bar := tqdm(as_completed(nets), desc=title, total=len(nets), unit="net")):
                records[nets[future]] = future.result()
                if work:
                    work.done(nets[future])
                bar.set_postfix_str(nets[future], refresh=False)
        finally:
            # After Ctrl-C, or a net that failed, none goes on in the background and none begins there.
            for future in nets:
                future.cancel()
            while scheduler is None and not all(future.done() for future in nets):
                server.close_all()
                time.sleep(0.05)
            server.close_all()
    return {task.net: records[task.net] for task in tasks}


@contextlib.contextmanager
def _cluster(scheduler: str) -> Iterator[Executor]:
    """The workers of a Dask cluster, which see the same folders under the same paths. Raises UserError."""
    # Only here: it takes a second to import.
    from distributed import Client
    from distributed.comm import get_address_host_port, resolve_address

    try:
        # Of an address that is none, or where nobody listens, a client tells late, and with a traceback.
        socket.create_connection(get_address_host_port(resolve_address(scheduler)), CONNECT_TIMEOUT).close()
        client = Client(scheduler, timeout=SCHEDULER_TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"No Dask scheduler answers at {scheduler} ({error}): start one with `dask scheduler` and workers with "
            "`dask worker ADDRESS` in the same environment, or leave --scheduler out."
        ) from error
    # Its end cancels what has not begun.
    with client:
        yield client.get_executor()
