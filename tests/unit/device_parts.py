"""A net split over devices, as one bmodel a part: what each device does between two exchanges with the others.

    python -m tests.unit.device_parts ONNX MODE DEVICES      # in an empty folder; leaves parts.json

The simulator has one device, so a bmodel for several cannot run on it; its parts can, one after the other. The
compiler's splitting pass leaves each as a module with inputs and outputs that have names; what one device hands to
another has the same name in both. Each module is compiled here as if it were the net.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

from helpers import toolchain
from helpers.compile import frontend, graph, options, worker


def _blocks(lines: list[str], start: int, indent: str) -> list[tuple[int, int]]:
    """(first, last) line of every block of this indentation from a line on, to the end of what holds them."""
    found, first = [], None
    for number in range(start, len(lines)):
        if lines[number].startswith(indent + "module @"):
            first = number
        elif lines[number].startswith(indent + "}") and first is not None:
            found.append((first, number))
            first = None
        elif lines[number].startswith("}"):
            break
    return found


def single_device_modules(mlir: str) -> dict[str, dict]:
    """name -> {"mlir", "step", "device", "inputs", "outputs"} of every part of a split net, as a net for one device."""
    lines = mlir.split("\n")
    top = next(number for number, line in enumerate(lines) if line.startswith("module @"))
    end = next(number for number, line in enumerate(lines) if number > top and line.startswith("}"))
    names = dict(re.findall(r'^(#loc\d*) = loc\("(.*)"\)$', mlir, re.MULTILINE))
    parts = {}
    for first, last in _blocks(lines, top + 1, "  "):
        body = lines[first : last + 1]
        name = re.search(r"@(\S+)", body[0])[1]
        device, step = (int(re.search(rf"module\.{key} = (\d+)", body[0])[1]) for key in ("device_id", "step"))
        inputs = re.findall(r'loc\("([^"]+)"\)', body[1])
        returned = next(line for line in body if line.lstrip().startswith("return "))
        made_by = {match[1]: line for line in body if (match := re.match(r"\s*(%\d+) = ", line))}
        outputs = []
        for value in re.findall(r"%\d+", returned.split(" : ")[0]):
            outputs.append(names[re.search(r"loc\((#loc\d*)\)$", made_by[value])[1]])
        body[0] = re.sub(r"(device_id|step) = \d+", r"\1 = 0", body[0])
        head = re.sub(r"module @\S+", f"module @{name}", lines[top])
        head = re.sub(r"module\.devices = \d+", "module.devices = 1", head)
        for kind, found in (("inputs", inputs), ("outputs", outputs)):
            head = re.sub(rf"module\.{kind} = \[[^\]]*\]", f"module.{kind} = {json.dumps(found)}", head)
        text = "\n".join([*lines[:top], head, *body, *lines[end:]])
        parts[name] = {"mlir": text, "step": step, "device": device, "inputs": inputs, "outputs": outputs}
    return parts


def main(onnx: str, mode: str, devices: str) -> None:
    net = Path(onnx).stem
    settings = options.net_settings(net, mode, int(devices), "basic", False)
    frontend.preload()
    child = multiprocessing.get_context("fork").Process(target=frontend.transform, args=(net, onnx))
    child.start()
    child.join()
    mlir = Path(f"{net}.mlir")
    if settings["merge_cache"]:
        mlir.write_text(graph.merge_cache(mlir.read_text()))
    passes = worker.compiler_options(net, "part.bmodel", settings)
    split = passes.index("--dev-parallel")
    parts_mlir = worker.split_over_devices(mlir, passes[: split + 1])
    text = parts_mlir.read_text(encoding="utf-8")
    parts = single_device_modules(text)
    for name, part in parts.items():
        Path(f"{name}.mlir").write_text(part.pop("mlir"))
        rest = [option.replace("part.bmodel", f"{name}.bmodel") for option in passes[split + 1 :]]
        subprocess.run(["tpuc-opt", f"{name}.mlir", *rest, "-o", os.devnull], check=True)
    outputs = json.loads(re.search(r"module\.outputs = (\[[^\]]*\])", text)[1])
    Path("parts.json").write_text(json.dumps({"parts": parts, "outputs": outputs}))


if __name__ == "__main__":
    os.environ.update(toolchain.environment(threads=1))
    main(*sys.argv[1:])
