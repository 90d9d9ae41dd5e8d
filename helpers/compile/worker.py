"""What happens to one net inside a fork of the compile server: ONNX to MLIR to a bmodel of one net.

    python -m helpers.compile.worker DESCRIPTOR      # the server's end, as helpers.compile.server starts it

Only that process imports TPU-MLIR. Everything is written to the net's own folder: the tools use fixed names in the
current one.
"""

import contextlib
import ctypes
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import toolchain
from helpers.compile import frontend, graph
from helpers.compile.processes import die_with_parent, in_child
from helpers.compile.profile import PROFILE
from helpers.compile.server import serve
from helpers.files import locked

CHIP = "bm1684x"
KERNELS = "kernels"
_SPLITTING_PASS = "--dev-parallel"
# <sys/personality.h>
_ADDR_NO_RANDOMIZE = 0x0040000
_ENVIRONMENT_BYTES = 1 << 15


def compile_net(net: str, onnx: str, settings: dict, work: str, result: str, kernels: str) -> None:
    """Compile one net in the folder `work`; leaves <net>.bmodel, <net>.mlir and the compiler's profile.

    onnx: path of the net. settings: of helpers.compile.options.net_settings. result: file for what was measured, as
    JSON. kernels: folder of a cache for nets that need the same kernels.
    Raises UserError, RuntimeError, or SystemExit after a tool that failed; what the tools say goes to standard output.
    """
    os.chdir(work)
    started = time.monotonic()
    # In a process of its own, so that its memory is given back before the compiler takes its own.
    transform_bytes = in_child("the transform", lambda: frontend.transform(net, onnx))
    mlir, bmodel = Path(f"{net}.mlir"), Path(f"{net}.bmodel")
    edits = {name: 0 for name in graph.EDITS if settings[name]}
    for name in edits:
        text, edits[name] = graph.EDITS[name](mlir.read_text(encoding="utf-8"))
        mlir.write_text(text, encoding="utf-8")
    transformed = time.monotonic()
    with _kernels(Path(kernels)) as folder:
        os.environ["PPL_CACHE_PATH"] = f"{folder}/" if folder.is_absolute() else f"./{folder}/"
        deploy_bytes = _deploy(mlir, bmodel, settings)
    if not bmodel.is_file() or not bmodel.stat().st_size:
        raise RuntimeError("error: the compiler ended without an error and without a bmodel")
    measured = {
        "edits": edits,
        "transform_s": round(transformed - started, 3),
        "deploy_s": round(time.monotonic() - transformed, 3),
        "transform_bytes": transform_bytes,
        "deploy_bytes": deploy_bytes,
    }
    for path in Path().iterdir():
        if path.is_file() and path.name not in (bmodel.name, mlir.name, PROFILE):
            path.unlink()
    Path(result).write_text(json.dumps(measured), encoding="utf-8")


@contextlib.contextmanager
def _kernels(cache: Path):
    """Yields a folder for the kernels of fused attention, which the compiler builds with cmake for each shape.

    They are not in the home folder: the compiler remembers there for good that a kernel could not be built (for want
    of cmake, say), and goes without; and two of its processes that build one kernel spoil each other's. So the first
    net of a kind builds them alone, and they move to the cache when they are whole: one that was killed, or found the
    disk full, leaves none half built there, which the compiler would take and stop at. Those after it take a copy:
    there are disks without links. cmake does not work in folders with every name.
    """
    cache.mkdir(parents=True, exist_ok=True)
    whole, made = cache / "whole", Path(f"{KERNELS}.made")
    with contextlib.ExitStack() as stack:
        ours = Path(KERNELS)
        if not toolchain.is_plain(Path.cwd()):
            ours = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=toolchain.plain_parent()))) / KERNELS
        with locked(cache / "lock"):
            if not whole.exists():
                ours.mkdir()
                yield ours
                shutil.move(ours, made)
                # Without a lock another net may have been faster.
                with contextlib.suppress(OSError):
                    made.rename(whole)
                shutil.rmtree(made, ignore_errors=True)
                return
        shutil.copytree(whole, ours)
        yield ours
        shutil.rmtree(ours)


def _prepare_tool() -> None:
    die_with_parent()
    # The compiler writes some bytes of a dynamic net's code without having set them. They are the same each time if
    # its memory is laid out the same each time, the environment at its top included; where that may not be asked for,
    # only these bytes differ.
    ctypes.CDLL(None).personality(_ADDR_NO_RANDOMIZE)


def _run_tool(command: list[str]) -> int:
    """Run a program of the wheel; its peak memory in bytes. Raises SystemExit where it failed; how is printed."""
    print("[Running]:", shlex.join(command), flush=True)
    env = {name: os.environ[name] for name in toolchain.VARIABLES if name in os.environ}
    # Without PWD and HOME it aborts.
    env |= {"PWD": ".", "HOME": ".", "PPL_CACHE_PATH": os.environ.get("PPL_CACHE_PATH", f"./{KERNELS}/")}
    # Always as long, whatever the PATH is and wherever the program: see _prepare_tool.
    program = shutil.which(command[0], path=env.get("PATH")) or command[0]
    length = len(program) + sum(len(name) + len(value) for name, value in env.items())
    env["PADDING"] = "." * (_ENVIRONMENT_BYTES - length)
    process = subprocess.run(command, env=env, preexec_fn=_prepare_tool, check=False)
    if process.returncode < 0:
        # The program's own last words are above in the log.
        print(f"{command[0]} was ended by {signal.Signals(-process.returncode).name}", flush=True)
    if process.returncode:
        sys.exit(1)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _deploy(mlir: Path, bmodel: Path, settings: dict) -> int:
    """Compile MLIR of the top dialect to a bmodel; peak memory in bytes."""
    options = compiler_options(mlir.stem, bmodel.name, settings)
    split = options.index(_SPLITTING_PASS)
    if settings["num_device"] == 1:
        return _run_tool(["tpuc-opt", mlir.name, *options, "-o", os.devnull])
    parts, peak = split_over_devices(mlir, options[: split + 1])
    return max(peak, _run_tool(["tpuc-opt", parts.name, *options[split + 1 :], "-o", os.devnull]))


def split_over_devices(mlir: Path, options: list[str]) -> tuple[Path, int]:
    """Lower MLIR and split it over devices; the MLIR of all devices' parts, and the peak memory in bytes.

    options: the passes up to and with the splitting one, which gets its input as it takes it for granted.
    """
    *lowering, splitting = options
    lowered, parts = (mlir.with_name(f"{mlir.stem}_{stage}.mlir") for stage in ("tpu", "parts"))
    peak = _run_tool(["tpuc-opt", mlir.name, *lowering, "-o", lowered.name])
    text = graph.order_projections(lowered.read_text(encoding="utf-8"))
    lowered.write_text(graph.pair_groups(text), encoding="utf-8")
    peak = max(peak, _run_tool(["tpuc-opt", lowered.name, splitting, "-o", parts.name]))
    parts.write_text(graph.unpair_groups(parts.read_text(encoding="utf-8")), encoding="utf-8")
    return parts, peak


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
    frontend.preload()
    serve(socket.socket(fileno=int(sys.argv[1])), compile_net)
