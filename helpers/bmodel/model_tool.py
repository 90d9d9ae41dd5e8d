"""What a bmodel contains and what memory it needs on the device; combine bmodels, extract nets.

    python -m helpers info --model FILE [--json]
    python -m helpers info --model FILE --extract DIR
    python -m helpers info --combine FILE FILE … --out FILE

The report needs nothing of Sophgo's; combining and extracting use model_tool of the TPU-MLIR wheel.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from helpers import artefacts, toolchain
from helpers.bmodel.bmodel import Bmodel, read_bmodel, require_qwen
from helpers.errors import UserError
from helpers.files import sha256_file


def memory_report(model: Bmodel) -> dict:
    """Device memory that a bmodel needs, in bytes, over all of its devices.

    Keys: weights (what nets share counted once), instructions, scratch (one net runs at a time, so the largest counts;
    each device has its own), cache (all keys and values of a Qwen; None for other nets), total, and nets {name:
    {devices, addr_mode, dynamic, inputs, outputs, weights, instructions, scratch}}.
    """
    nets = {
        name: {
            "devices": net.devices,
            "addr_mode": net.info.addr_mode,
            "dynamic": net.info.dynamic,
            "inputs": [[t.name, list(t.shape), t.dtype, t.device] for t in net.info.inputs],
            "outputs": [[t.name, list(t.shape), t.dtype, t.device] for t in net.info.outputs],
            "weights": net.weight_bytes,
            "instructions": net.instruction_bytes,
            "scratch": net.scratch_bytes,
        }
        for name, net in model.nets.items()
    }
    try:
        shape = require_qwen(model)
        cache = shape.cache_bytes(max(1, model.nets["block_0"].devices))
    except UserError:
        cache = None
    report = {
        "file": str(model.path),
        "chip": model.chip,
        "version": model.version,
        "devices": model.device_num,
        "file_bytes": model.file_bytes,
        "firmware": model.kernel_bytes,
        "weights": model.weight_bytes,
        "instructions": sum(net["instructions"] for net in nets.values()),
        "scratch": max(net["scratch"] for net in nets.values()),
        "cache": cache,
    }
    report["total"] = sum(report[key] or 0 for key in ("weights", "instructions", "scratch", "cache"))
    return report | {"nets": nets}


def format_bytes(count: int | None) -> str:
    """1536 -> "1.5 KB", in powers of 1024."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GB"


def format_report(model: Bmodel) -> str:
    """The memory report as text for people."""
    report = memory_report(model)
    lines = [
        f"{model.path}: {model.chip}, {model.device_num} device{'s' if model.device_num > 1 else ''}, "
        f"{len(model.nets)} nets, {format_bytes(model.file_bytes)}, compiler {model.version}"
    ]
    try:
        shape = require_qwen(model)
        lines.append(
            f"Qwen: {shape.layers} layers, S = {shape.seq_length}, hidden size {shape.hidden_size}, "
            f"{shape.heads} heads of {shape.head_dim}{' on each device' if model.device_num > 1 else ''}"
        )
    except UserError as error:
        lines.append(f"not a Qwen that can chat: {error}")
    lines += ["", "device memory"]
    for key, what in {
        "weights": "weights",
        "cache": "keys and values, bfloat16",
        "instructions": "instructions",
        "scratch": "scratch (largest net)",
        "total": "total",
    }.items():
        lines.append(f"  {what:28}{format_bytes(report[key]):>12}")
    lines += ["", f"{'net':24}{'mode':>10}{'weights':>12}{'instructions':>14}{'scratch':>12}"]
    for name, net in report["nets"].items():
        mode = "dynamic" if net["dynamic"] else net["addr_mode"]
        sizes = [format_bytes(net[key]) for key in ("weights", "instructions", "scratch")]
        lines.append(f"{name:24}{mode:>10}{sizes[0]:>12}{sizes[1]:>14}{sizes[2]:>12}")
    return "\n".join(lines)


def combine(bmodels: list[str | Path], target: str | Path) -> Path:
    """Combine bmodels to one; weights that they share are stored once. The manifest names what it was made from.

    Raises UserError where one is no bmodel, two have a net of one name, chips differ, or model_tool fails.
    """
    from helpers.compile import compiling

    target = Path(target)
    models = [read_bmodel(path) for path in bmodels]
    if len({model.chip for model in models}) > 1:
        raise UserError("The bmodels are for different chips: " + ", ".join(f"{m.path} {m.chip}" for m in models))
    names = [name for model in models for name in model.nets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Two of the bmodels have a net named {twice[0]}: take one of them out.")
    inputs = {str(model.path): sha256_file(model.path) for model in models}
    with artefacts.building(target, kind="bmodel", inputs=inputs, settings={"via": "combine"}) as partial:
        compiling.combine([model.path.absolute() for model in models], partial)
    return target


def extract(path: str | Path, folder: str | Path) -> list[Path]:
    """Write each net of a bmodel as a bmodel of its own: folder/<net>.bmodel.

    Raises UserError where it is no bmodel, is for several devices, has nets in io_alone, or model_tool fails.
    """
    model, folder = read_bmodel(path), Path(folder)
    if model.device_num > 1:
        raise UserError(
            f"{path} is for {model.device_num} devices: its nets are split in parts that are of no use alone; extract "
            "from a bmodel for one device."
        )
    if alone := [name for name, net in model.nets.items() if net.info.addr_mode != "basic"]:
        raise UserError(
            f"{path} has {alone[0]} in {model.nets[alone[0]].info.addr_mode}, which model_tool loses when it extracts: "
            "take the net's own bmodel from the compile's folder, or compile with --addr_mode basic."
        )
    folder.mkdir(parents=True, exist_ok=True)
    tool = toolchain.wheel_path() / "bin" / "model_tool"
    made = []
    with tempfile.TemporaryDirectory(prefix=".extract.", dir=folder) as scratch:
        command = [str(tool), "--extract", str(model.path.absolute())]
        done = subprocess.run(
            command, cwd=scratch, env=toolchain.environment(), capture_output=True, text=True, check=False
        )
        parts = sorted(Path(scratch).glob("*.bmodel"))
        if done.returncode or not parts:
            said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
            raise UserError(f"model_tool could not extract from {path}: {said}")
        for part in parts:
            (name,) = read_bmodel(part).nets
            os.replace(part, folder / f"{name}.bmodel")
            made.append(folder / f"{name}.bmodel")
    return made


def add_arguments(parser) -> None:
    parser.add_argument("--model", metavar="FILE", help="bmodel to report on, or to extract from")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    parser.add_argument("--extract", metavar="DIR", help="write each net as a bmodel of its own")
    parser.add_argument("--combine", metavar="FILE", nargs="+", help="bmodels to combine; needs --out")
    parser.add_argument("--out", metavar="FILE", help="the combined bmodel")


def run(args) -> int:
    if args.combine:
        if not args.out:
            raise UserError("--combine needs --out FILE, the bmodel to write.")
        print(combine(args.combine, args.out))
    elif not args.model:
        raise UserError("--model FILE is needed, or --combine FILE FILE … --out FILE.")
    elif args.extract:
        print("\n".join(map(str, extract(args.model, args.extract))))
    elif args.json:
        print(json.dumps(memory_report(read_bmodel(args.model))))
    else:
        print(format_report(read_bmodel(args.model)))
    return 0
