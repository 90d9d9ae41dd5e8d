"""One level deeper, by the wheel's own tools: which operation of a compiled net is the first that is wrong.

`model_deploy.py --compare_all` compiles the net once more. npz_tool sets each tensor of the lowered graph beside that
of float32: what the mode's rounding costs. `bmodel_checker.py` then steps through the commands of the net in the file
that was found, on the simulator, and sets what they leave in memory beside the lowered graph.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from helpers import artefacts, machine, toolchain
from helpers.bmodel.bmodel import read_bmodel
from helpers.compile.log import own_error, read_log
from helpers.compile.options import net_settings
from helpers.errors import UserError
from helpers.nets import INPUT_NAMES, net_kind
from helpers.tensors import HOST_DTYPE, to_bf16

# What model_deploy.py itself asks of a bmodel: cosine, and 1 - |error| / |expected|.
TOLERANCE = "0.99,0.90"
# As helpers.compile.worker does it: with other edits the commands would be others.
_TRANSFORM = """
import json, sys
from pathlib import Path
from helpers.compile import frontend, worker
frontend.preload()
worker.transform(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]), Path(), Path())
from tpu_mlir.python.utils import mlir_shell
mlir_shell.mlir_opt_for_top(f"{sys.argv[1]}.mlir", "top.mlir")
"""
_COMPARED = re.compile(
    r"^\[(\S+) *\].*\[(?:PASSED|FAILED)\]\s*\n.*\n(?: +cosine\S+ += (\S+)\n.*\n +sqnr\S+ += (\S+))?", re.M
)


@dataclass(frozen=True)
class Deeper:
    """lowered: {tensor: (cosine, SQNR in dB)} of npz_tool, in the graph's order. checked: results that bmodel_checker
    compared. wrong: those past TOLERANCE, in the order of the commands. commands: as they were run in the folder."""

    lowered: dict[str, tuple[float, float]]
    checked: int
    wrong: list[str]
    commands: list[str]


def go_deeper(onnx: Path, bmodel: Path, net: str, inputs: Sequence[np.ndarray], folder: Path) -> Deeper:
    """Both comparisons of one block. onnx: what the bmodel was compiled from. inputs: as helpers.nets has them.

    folder: new, for the tools' files and logs. Raises UserError for a bmodel of several devices, or if a tool fails.
    """
    described, made = read_bmodel(bmodel), artefacts.read_manifest(bmodel)["settings"]
    own, kind, context, inputs = described.nets[net], net_kind(net), folder / "found", list(inputs)
    if own.devices > 1:
        raise UserError(f"{bmodel} is for {own.devices} devices, the wheel's checker has one: compile it for one.")
    if kind == "block":
        # Rows of padding see nothing, and a mean over nothing is arbitrary: here each sees itself.
        inputs[2] = np.where(np.eye(inputs[2].shape[-1]), 0, inputs[2]).astype(np.float32)
    context.mkdir(parents=True)
    np.savez(folder / "in.npz", **dict(zip(INPUT_NAMES[kind], inputs, strict=True)))
    settings = net_settings(net, made["mode"], 1, made["addr_mode"], made["dynamic"], made.get("head_mode"))
    _tool(folder, "model_transform", net, Path(onnx, f"{net}.onnx").absolute(), json.dumps(settings))
    flags = [f"--{name}" for name in ("quant_input", "quant_output", "dynamic") if settings[name]]
    flags += [f"--{name}={settings[name]}" for name in ("quantize", "q_group_size", "addr_mode")]
    # Its own run of the bmodel would put links in place of the wheel's libraries.
    flags += ["--chip=bm1684x", f"--model={net}.bmodel", "--debug", "--skip_validation"]
    deploy = _tool(folder, "model_deploy.py", "--mlir=top.mlir", *flags, "--test_input=in.npz", "--compare_all")
    for file in ("final.mlir", "tensor_location.json"):
        shutil.copy(folder / net / file, context)
    _extract(bmodel, list(described.nets).index(net), context / "compilation.bmodel")
    with open(context / "input_ref_data.dat", "wb") as file:
        for tensor, array in zip(own.info.inputs, inputs, strict=True):
            array = to_bf16(array) if tensor.dtype == "bfloat16" else array
            file.write(np.asarray(array, dtype=HOST_DTYPE[tensor.dtype]).tobytes())
    # Without a size it takes 4 GiB, and is slow.
    memory = 1 << max(28, 1 + (described.kernel_bytes + own.weight_bytes + own.scratch_bytes).bit_length())
    reference = f"{net}_bm1684x_{settings['quantize'].lower()}_tpu_outputs.npz"
    flags = [f"--tolerance={TOLERANCE}", f"--ddr_size={memory}", "--no_interactive", "--quiet"]
    check = _tool(folder, "bmodel_checker.py", "found", reference, *flags)
    lowered = {n: (float(c or 1), float(s or "inf")) for n, c, s in _COMPARED.findall(_log(folder, "model_deploy.py"))}
    # Of each operation "(line operands|results)", a mark for each: √, x, or ? where there is nothing to compare with.
    marks = re.findall(r"\(\d+[√x?-]*\|([√x?-]*)\)", re.sub(r"\s", "", _log(folder, "bmodel_checker.py")))
    summary = folder / "bmodel_failed_summary.json"
    failed = json.loads(summary.read_bytes()) if summary.exists() else []
    wrong = dict.fromkeys(entry["loc"] for entry in failed if not entry["operand"])
    return Deeper(lowered, sum(mark in "√x" for mark in "".join(marks)), list(wrong), [deploy, check])


def _extract(bmodel: Path, number: int, target: Path) -> None:
    """Write one net of a combined bmodel, by its place in it, as a bmodel of its own."""
    command = [toolchain.wheel_path() / "bin" / "model_tool", "--extract", Path(bmodel).absolute()]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        done = subprocess.run(command, cwd=folder, env=toolchain.environment(), capture_output=True, check=False)
        part = Path(folder, f"bm_net{number}_stage0.bmodel")
        if done.returncode or not part.is_file():
            raise UserError(f"model_tool could not take {bmodel} apart (status {done.returncode}): compile it again.")
        part.rename(target)


def _log(folder: Path, program: str) -> str:
    return read_log(folder / f"{program}.log")


def _tool(folder: Path, program: str, *arguments) -> str:
    """Run a Python program of the wheel in the folder; returns the command."""
    script = [toolchain.wheel_path() / "python" / "tools" / program] if program.endswith(".py") else ["-c", _TRANSFORM]
    env = toolchain.environment(machine.cores(), kernel_locks=False) | {
        "COLUMNS": "999",
        "PPL_CACHE_PATH": "./kernels/",
    }
    env.pop("FORCE_COLOR", None)  # a notebook has it
    env["PYTHONPATH"] = f"{Path(__file__).resolve().parents[2]}:{env['PYTHONPATH']}"
    command = [sys.executable, *map(str, [*script, *arguments])]
    with open(folder / f"{program}.log", "w", encoding="utf-8") as log:
        done = subprocess.run(
            command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        )
    if done.returncode:
        said = own_error(_log(folder, program), done.returncode)
        raise UserError(f"{program} of the wheel failed ({said}): its log is {folder / program}.log.")
    return " ".join([program, *map(str, arguments)])
