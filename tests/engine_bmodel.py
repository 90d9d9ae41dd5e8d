"""A small real bmodel for the tests of the engines: four nets, made here as ONNX and compiled by TPU-MLIR.

    embedding    ids int32 [1,8]                                     -> states bf16 [1,8,32]      basic
    cache        states bf16 [1,1,32], past bf16 [1,8,32]            -> states, row bf16 [1,1,32] ADDR_MODE
    logits       states bf16 [1,32]                                  -> logits float32 [1,64]     basic
    greedy_head  logits float32 [1,64]                               -> token int32 [1,1]         basic, dynamic

`cache` attends over `past` with `states` and gives a new row for it, as a decode block does.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from helpers import artefacts, toolchain

ROOT = Path(__file__).resolve().parents[1]
ROWS, WIDTH, VOCABULARY = 8, 32, 64
# net: arguments of model_deploy.py
NETS = {
    "embedding": ["--quantize", "BF16", "--quant_input", "--quant_output"],
    "cache": ["--quantize", "BF16", "--quant_input", "--quant_output"],
    "logits": ["--quantize", "BF16", "--quant_input"],
    "greedy_head": [],
}


def weights() -> dict[str, np.ndarray]:
    """float32: embedding [V,W], row [W,W], logits [W,V]."""
    random = np.random.default_rng(7)
    shapes = {"embedding": (VOCABULARY, WIDTH), "row": (WIDTH, WIDTH), "logits": (WIDTH, VOCABULARY)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _export(folder: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {name: numpy_helper.from_array(value, f"{name}_weight") for name, value in weights().items()}
    float32, int32 = TensorProto.FLOAT, TensorProto.INT32
    largest = numpy_helper.from_array(np.array([1], dtype=np.int64), "k")
    node = helper.make_node
    graphs = {
        "embedding": (
            [node("Gather", ["embedding_weight", "ids"], ["states"])],
            [("ids", int32, [1, ROWS])],
            [("states", float32, [1, ROWS, WIDTH])],
            [constants["embedding"]],
        ),
        "cache": (
            [
                node("Transpose", ["past"], ["keys"], perm=[0, 2, 1]),
                node("MatMul", ["states", "keys"], ["scores"]),
                node("Softmax", ["scores"], ["weights"], axis=-1),
                node("MatMul", ["weights", "past"], ["attended"]),
                node("Add", ["attended", "states"], ["new_states"]),
                node("MatMul", ["states", "row_weight"], ["row"]),
            ],
            [("states", float32, [1, 1, WIDTH]), ("past", float32, [1, ROWS, WIDTH])],
            [("new_states", float32, [1, 1, WIDTH]), ("row", float32, [1, 1, WIDTH])],
            [constants["row"]],
        ),
        "logits": (
            [node("MatMul", ["states", "logits_weight"], ["logits"])],
            [("states", float32, [1, WIDTH])],
            [("logits", float32, [1, VOCABULARY])],
            [constants["logits"]],
        ),
        "greedy_head": (
            [
                node("TopK", ["logits", "k"], ["value", "token64"], axis=-1),
                node("Cast", ["token64"], ["token"], to=int32),
            ],
            [("logits", float32, [1, VOCABULARY])],
            [("token", int32, [1, 1])],
            [largest],
        ),
    }
    for name, (nodes, inputs, outputs, initializers) in graphs.items():
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(*described) for described in inputs],
            [helper.make_tensor_value_info(*described) for described in outputs],
            initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        onnx.checker.check_model(model)
        onnx.save(model, folder / f"{name}.onnx")


def _tool(folder: Path, *command: object) -> None:
    environment = toolchain.environment(threads=1)
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[0]} in {folder}:\n{(done.stdout + done.stderr)[-2000:]}"


def _compile(net: str, folder: Path) -> None:
    work = folder / net
    work.mkdir()
    tools = toolchain.wheel_path() / "python" / "tools"
    python = sys.executable
    transform = [python, tools / "model_transform.py", "--model_name", net, "--model_def", f"../{net}.onnx"]
    _tool(work, *transform, "--mlir", f"{net}.mlir")
    deploy = [python, tools / "model_deploy.py", "--mlir", f"{net}.mlir", *NETS[net], "--chip", "bm1684x"]
    _tool(work, *deploy, "--model", "basic.bmodel")
    if net == "cache":
        _tool(work, *deploy, "--addr_mode", "io_alone", "--model", "io_alone.bmodel")


def build() -> dict[str, Path]:
    """{"basic": FILE, "io_alone": FILE}: the address mode is the one of `cache`. Made once, kept under out/tests."""
    kept = ROOT / "out" / "tests" / "engine_bmodel"
    inputs = {"recipe": artefacts.sha256_file(__file__)}
    if not artefacts.up_to_date(kept, inputs, {}):
        with artefacts.building(kept, kind="engine test bmodel", inputs=inputs, settings={}) as partial:
            partial.mkdir(parents=True)
            work = partial / "work"
            work.mkdir()
            _export(work)
            with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
                list(pool.map(lambda net: _compile(net, work), NETS))
            for mode in ("basic", "io_alone"):
                parts = [work / net / f"{mode if net == 'cache' else 'basic'}.bmodel" for net in NETS]
                _tool(work, "model_tool", "--combine", *parts, "-o", partial / f"{mode}.bmodel")
            shutil.rmtree(work)
    return {mode: kept / f"{mode}.bmodel" for mode in ("basic", "io_alone")}
