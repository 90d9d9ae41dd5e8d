"""A small real bmodel for the tests of the engines: the nets of tests.engine_nets, made here as ONNX and compiled."""

import shutil
import subprocess
from pathlib import Path

import numpy as np

from helpers import artefacts, toolchain
from helpers.compile import jobs
from helpers.compile.options import net_settings
from helpers.files import sha256_file
from tests import engine_nets
from tests.engine_nets import ROWS, VOCABULARY, WIDTH, weights
from tests.unit.small_nets import task

ROOT = Path(__file__).resolve().parents[1]
# net: settings of model_deploy.py in which it is not as helpers.compile.options has it.
NETS = {
    "embedding": {"quantize": "BF16", "quant_input": True, "quant_output": True},
    "cache": {"quantize": "BF16", "quant_input": True, "quant_output": True},
    "logits": {"quantize": "BF16", "quant_input": True, "quant_output": False},
    "greedy_head": {"quantize": "F32", "quant_input": False, "quant_output": False},
}


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


def _compile(net: str, addr_mode: str, folder: Path) -> str:
    """Path of the net's bmodel."""
    settings = net_settings(net, "bf16", 1, addr_mode, dynamic=False) | NETS[net] | {"addr_mode": addr_mode}
    return jobs.compile_net(task(folder, folder / addr_mode, net, settings))["bmodel"]


def build() -> dict[str, Path]:
    """{"basic": FILE, "io_alone": FILE}: the address mode is the one of `cache`. Made once, kept under out/tests."""
    kept = ROOT / "out" / "tests" / "engine_bmodel"
    inputs = {"recipe": sha256_file(__file__), "nets": sha256_file(engine_nets.__file__)}
    code = artefacts.code_of(
        "compile.frontend", "compile.graph", "compile.jobs", "compile.options", "compile.worker"
    )
    if not artefacts.up_to_date(kept, inputs, {}, code):
        with artefacts.building(kept, kind="engine test bmodel", inputs=inputs, settings={}, code=code) as partial:
            partial.mkdir(parents=True)
            work = partial / "work"
            work.mkdir()
            _export(work)
            for mode in ("basic", "io_alone"):
                parts = [_compile(net, mode if net == "cache" else "basic", work) for net in NETS]
                subprocess.run(
                    ["model_tool", "--combine", *parts, "-o", partial / f"{mode}.bmodel"],
                    env=toolchain.environment(threads=1),
                    cwd=work,
                    check=True,
                    capture_output=True,
                )
            shutil.rmtree(work)
    return {mode: kept / f"{mode}.bmodel" for mode in ("basic", "io_alone")}
