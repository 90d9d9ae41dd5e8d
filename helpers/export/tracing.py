"""From a module to an ONNX file: the trace, in which every weight is a named input, and the files of the weights.

A net is traced with weights that were never filled in (`export_params=False` leaves each of them as an input of the
graph). A layer's file is then a copy of that graph with the layer's own weights attached, by reference to a file beside
it. So `block_i` and `block_cache_i` are two graphs over one weight file, and so are `embedding` and `embedding_cache`.
"""

import io
import warnings
from collections.abc import Iterable
from pathlib import Path

import onnx
import onnxsim
import torch
from onnx import ModelProto, TensorProto
from torch import nn

from helpers.nets import INPUT_NAMES, OUTPUT_NAMES

# The operator set that the documented export uses, and TPU-MLIR's front end was made for.
OPSET = 15
FLOAT32_BYTES = 4
_COPY_BYTES = 64 << 20


def trace(module: nn.Module, net: str, example: tuple[torch.Tensor, ...]) -> ModelProto:
    """Trace a module to a graph whose weights are named inputs without data. net: its kind, which names the rest.

    Shape arithmetic is folded by onnxsim, which sees a graph of some kilobytes: the weights are not in it.
    """
    file = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns of shape comparisons in Qwen's code that are constant for a fixed S, and of its own age.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            example,
            file,
            export_params=False,
            keep_initializers_as_inputs=True,  # or equal weights are stored once, and the others lost
            do_constant_folding=False,
            input_names=INPUT_NAMES[net],
            output_names=OUTPUT_NAMES[net],
            opset_version=OPSET,
            dynamo=False,
        )
    graph, checked = onnxsim.simplify(onnx.load_from_string(file.getvalue()))
    if not checked:
        raise ValueError(f"onnxsim changed what {net} computes")
    return graph


def keep_attention_unfused(model: ModelProto) -> None:
    """Write the additive mask as the first operand of its Add, in place: the compiler then sees no attention to fuse.

    Its fused attention loads 8 rows of keys at a time. With 10 new rows a decode block of the
    embedded model (S = 256, io_alone) costs 101,640 cycles fused, 17,678 unfused in bf16; 124,396, 42,023 in int8;
    at Qwen-7B's size (int4, S = 512) 2,941,941 and 2,429,237. Measured with `python -m benchmarks.fused_attention`.
    Raises ValueError where the graph has no softmax over a masked sum.
    """
    made_by = {output: node for node in model.graph.node for output in node.output}
    inputs = {value.name for value in model.graph.input}
    for softmax in (node for node in model.graph.node if node.op_type == "Softmax"):
        add = made_by.get(softmax.input[0])
        if add is not None and add.op_type == "Add" and add.input[1] in inputs:
            add.input[:] = [add.input[1], add.input[0]]
            return
    raise ValueError("the block has no softmax over scores to which a mask is added")


class WeightFile:
    """A file of float32 tensors at page-aligned offsets, and their places in it."""

    def __init__(self, path: Path):
        self.path = path
        self.places: dict[str, tuple[int, int]] = {}

    def write(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write named tensors (any float dtype, widened to float32 in pieces of 64 MB), one at a time."""
        with open(self.path, "wb") as file:
            for name, tensor in tensors:
                file.write(b"\0" * (-file.tell() % 4096))
                offset = file.tell()
                flat = tensor.reshape(-1)
                step = _COPY_BYTES // FLOAT32_BYTES
                for start in range(0, flat.numel(), step):
                    file.write(flat[start : start + step].float().numpy().tobytes())
                self.places[name] = (offset, file.tell() - offset)


def attach_weights(graph: ModelProto, module: nn.Module, weights: WeightFile | None) -> ModelProto:
    """A copy of a traced graph with its weights, from a weight file by reference; buffers are constants in it already.

    Raises ValueError where the graph leaves out a weight of the module.
    """
    model = ModelProto()
    model.CopyFrom(graph)
    parameters = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if lost := sorted(parameters.keys() - {value.name for value in model.graph.input}):
        raise ValueError(f"the exporter dropped weights: {', '.join(lost)}")
    kept = []
    for value in model.graph.input:
        if value.name in parameters:
            offset, length = weights.places[value.name]
            tensor = TensorProto(name=value.name, data_type=TensorProto.FLOAT, dims=parameters[value.name])
            tensor.data_location = TensorProto.EXTERNAL
            for key, entry in (("location", weights.path.name), ("offset", str(offset)), ("length", str(length))):
                tensor.external_data.add(key=key, value=entry)
            model.graph.initializer.append(tensor)
        else:
            kept.append(value)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model
