"""What a bmodel contains and what memory it needs on the device, as `info` prints it."""

from dataclasses import astuple

from helpers.bmodel.bmodel import Bmodel, require_qwen
from helpers.errors import UserError


def memory_report(model: Bmodel) -> dict:
    """Device memory that a bmodel needs, in bytes, over all of its devices; and so for each of its nets.

    weights: what nets share counted once. scratch: one net runs at a time, so the largest counts. cache: all keys and
    values of a Qwen; None for other nets.
    """
    nets = {
        name: {
            "devices": net.devices,
            "addr_mode": net.info.addr_mode,
            "dynamic": net.info.dynamic,
            "inputs": [astuple(tensor) for tensor in net.info.inputs],
            "outputs": [astuple(tensor) for tensor in net.info.outputs],
            "weights": net.weight_bytes,
            "instructions": net.instruction_bytes,
            "scratch": net.scratch_bytes,
        }
        for name, net in model.nets.items()
    }
    try:
        cache = require_qwen(model).cache_bytes(model.nets["block_0"].devices)
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
    for power, unit, digits in ((3, "GB", 2), (2, "MB", 1), (1, "KB", 1)):
        if count >= 1024**power:
            return f"{count / 1024**power:.{digits}f} {unit}"
    return f"{count} B"


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
    shown = {"cache": "keys and values, bfloat16", "scratch": "scratch (largest net)"}
    for key in ("weights", "cache", "instructions", "scratch", "total"):
        lines.append(f"  {shown.get(key, key):28}{format_bytes(report[key]):>12}")
    lines += ["", f"{'net':24}{'mode':>10}{'weights':>12}{'instructions':>14}{'scratch':>12}"]
    for name, net in report["nets"].items():
        mode = "dynamic" if net["dynamic"] else net["addr_mode"]
        sizes = [format_bytes(net[key]) for key in ("weights", "instructions", "scratch")]
        lines.append(f"{name:24}{mode:>10}{sizes[0]:>12}{sizes[1]:>14}{sizes[2]:>12}")
    return "\n".join(lines)
