"""What happens to one net in forks of the compile server: ONNX to MLIR to a bmodel of one net.

    python -m helpers.compile.worker DESCRIPTOR      # the server's end, as helpers.compile.server starts it

Only that process imports TPU-MLIR. The tools write files of fixed names to the current folder: it is the net's own.
"""

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

from helpers import toolchain
from helpers.compile import frontend, graph
from helpers.compile.profile import PROFILE
from helpers.compile.server import serve
from helpers.errors import UserError

CHIP = "bm1684x"
_ADDR_NO_RANDOMIZE = 0x0040000  # <sys/personality.h>
_ENVIRONMENT_BYTES = 1 << 15


def transform(net: str, onnx: Path, settings: dict, work: Path, kernels: Path) -> None:
    """Write a net as <net>.mlir of the top dialect, with the edits of its settings, and its weights to a folder.

    settings: of helpers.compile.options.net_settings. work: the folder. Raises UserError.
    """
    os.chdir(work)
    frontend.transform(net, onnx)
    mlir = Path(f"{net}.mlir")
    for name, edit in graph.EDITS.items():
        if settings[name]:
            mlir.write_text(edit(mlir.read_text(encoding="utf-8")), encoding="utf-8")


def deploy(net: str, onnx: Path, settings: dict, work: Path, kernels: Path) -> None:
    """Compile <net>.mlir in that folder; leaves <net>.bmodel, <net>.mlir and the compiler's profile there.

    kernels: a cache for nets that need the same kernels. Raises UserError, or SystemExit after a tool that failed.
    """
    os.chdir(work)
    mlir, bmodel = Path(f"{net}.mlir"), Path(f"{net}.bmodel")
    options = compiler_options(net, bmodel.name, settings)
    with _kernels(kernels) as os.environ["PPL_CACHE_PATH"]:
        source = mlir
        if settings["num_device"] > 1:
            split = options.index("--dev-parallel") + 1
            source, options = split_over_devices(mlir, options[:split]), options[split:]
        _run_tool("tpuc-opt", source.name, *options, "-o", os.devnull)
    if not bmodel.is_file() or not bmodel.stat().st_size:
        raise UserError("the compiler ended without an error and without a bmodel")
    for path in Path().iterdir():
        if path.is_file() and path.name not in (bmodel.name, mlir.name, PROFILE):
            path.unlink()


@contextlib.contextmanager
def _kernels(cache: Path):
    """Yields a folder for the kernels of fused attention, which the compiler builds with cmake for each shape.

    Not the one in the home folder: there it remembers for good that a kernel could not be built (for want of cmake,
    say), and two processes that build one kernel spoil each other's. So each net has a folder of its own, which begins
    as a copy of the cache (there are disks without links); or becomes the cache, when it is whole: the compiler would
    take a half built kernel, and stop at it. cmake does not work in folders with every name: there, nets share none.
    """
    if not toolchain.is_plain(Path.cwd()):
        with tempfile.TemporaryDirectory(dir=toolchain.plain_parent()) as elsewhere:
            yield f"{elsewhere}/"
        return
    folder = Path("kernels")
    folder.mkdir()
    if cache.exists():
        shutil.copytree(cache, folder, dirs_exist_ok=True)
    yield "./kernels/"
    cache.parent.mkdir(parents=True, exist_ok=True)
    # Another net was faster, as a rule: a folder that is not empty stays.
    with contextlib.suppress(OSError):
        folder.rename(cache)
    shutil.rmtree(folder, ignore_errors=True)


def _run_tool(*command: str) -> None:
    """Run a program of the wheel. Raises SystemExit where it failed; how is printed."""
    print("[Running]:", shlex.join(command), flush=True)
    env = {name: os.environ[name] for name in toolchain.VARIABLES if name in os.environ}
    # Without PWD and HOME it aborts.
    env |= {"PWD": ".", "HOME": ".", "PPL_CACHE_PATH": os.environ.get("PPL_CACHE_PATH", "./kernels/")}
    # Always as long, whatever the PATH is and wherever the program: for the bytes that are never set, below.
    program = shutil.which(command[0], path=env.get("PATH")) or command[0]
    length = len(program) + sum(len(name) + len(value) for name, value in env.items())
    env["PADDING"] = "." * (_ENVIRONMENT_BYTES - length)
    status = subprocess.run(command, env=env, check=False).returncode
    if status < 0:
        # The program's own last words are above in the log.
        print(f"{command[0]} was ended by {signal.Signals(-status).name}", flush=True)
    if status:
        sys.exit(1)


def split_over_devices(mlir: Path, options: list[str]) -> Path:
    """Lower MLIR and split it over devices; the MLIR of all devices' parts.

    options: the passes up to and with the splitting one, which gets its input as it takes it for granted.
    """
    *lowering, splitting = options
    lowered, parts = (mlir.with_name(f"{mlir.stem}_{stage}.mlir") for stage in ("tpu", "parts"))
    _run_tool("tpuc-opt", mlir.name, *lowering, "-o", lowered.name)
    text = graph.order_projections(lowered.read_text(encoding="utf-8"))
    lowered.write_text(graph.pair_groups(text), encoding="utf-8")
    _run_tool("tpuc-opt", lowered.name, splitting, "-o", parts.name)
    parts.write_text(graph.unpair_groups(parts.read_text(encoding="utf-8")), encoding="utf-8")
    return parts


def compiler_options(net: str, bmodel: str, settings: dict) -> list[str]:
    """All the passes of model_transform.py and model_deploy.py for one tpuc-opt call, as the wheel defines them."""
    from tpu_mlir.python.utils import mlir_shell

    quantize = settings["quantize"].lower()
    options = [
        *mlir_shell.top_opt_options(),
        *mlir_shell.lowering_options(
            quantize,
            CHIP,
            num_device=settings["num_device"],
            num_core=1,
            weight_name=f"{net}_{CHIP}_{quantize}_tpu_weights.npz",
            q_group_size=settings["q_group_size"],
            addr_mode=settings["addr_mode"],
        ),
        *mlir_shell.tpu_opt_options(settings["quant_input"], settings["quant_output"]),
        *mlir_shell.tpu_ada_options(dynamic=settings["dynamic"], enable_affine=True),
        *mlir_shell.codegen_options(bmodel, model_version="latest"),
    ]
    return shlex.split(" ".join(options))


if __name__ == "__main__":
    # Where the compiler lets the chip's scalar core run an operator (TopK, what is dynamic), it writes three bytes that
    # it never set: they are those of its stack, the same each time where that begins at the same address.
    ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE)
    frontend.preload()
    serve(Connection(int(sys.argv[1])), transform, deploy)
