"""The ONNX front end: a net as ONNX becomes MLIR of the top dialect, by the wheel's converter with three things mended.

Its ONNX simplifier is not shown the large weights, which it copies many times over and looks at none of; where it finds
no constants to fold, as in nets that torch exports, it does not run the whole net for that; and the optimised ONNX is
not saved once more.
"""

import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from helpers.errors import UserError

# Tensors from this size on bypass the simplifier.
BYPASS_BYTES = 1 << 16


def preload() -> None:
    """Import what every net needs. The server forks after this, so no thread may be left running.

    The front end imports torch, and all of transformers by way of a converter of tokenizers: nine tenths of its start,
    for what no net of ours uses. They get empty modules instead.
    """
    tokenizers = types.ModuleType("onnxruntime_extensions.cvt")
    tokenizers.gen_processing_models = None
    sys.modules[tokenizers.__name__] = tokenizers
    sys.modules["torch"] = types.ModuleType("torch")

    environment = dict(os.environ)
    import tpu_mlir  # noqa: F401  puts the wheel's folders on sys.path

    # And on the lists of paths, before what helpers.toolchain has put there for good reason.
    os.environ.update(environment)

    # isort: split
    from tpu_mlir.python.utils import mlir_shell  # noqa: F401
    from transform import OnnxConverter  # noqa: F401


def transform(net: str, path: str) -> None:
    """ONNX file -> <net>.mlir (top dialect, before any optimisation) and its weights as .npz, in the current folder."""
    from transform import OnnxConverter as front_end

    model = onnx.load(path, load_external_data=False)
    weights = take_weights(model, Path(path).parent)
    # The optimised ONNX is saved for debugging only, in gigabytes.
    front_end.onnx.save = lambda *args, **kwargs: None
    # To fold constants the whole net is run on random inputs, though there be none.
    fold = front_end.ConstantFolding.forward_for_node_outputs
    front_end.ConstantFolding.forward_for_node_outputs = lambda self, nodes: fold(self, nodes) if nodes else {}
    converter = _converter_class(front_end.OnnxConverter)(net, model, weights)
    converter.generate_mlir(f"{net}.mlir")


def take_weights(model, folder: Path) -> dict:
    """Take the large float32 tensors out of a ModelProto, {name: array}; give the small ones their data."""
    weights, rest = {}, []
    for tensor in model.graph.initializer:
        outside = external_data_helper.uses_external_data(tensor)
        shape = tuple(tensor.dims)
        large = tensor.data_type == TensorProto.FLOAT and len(shape) > 1 and 4 * math.prod(shape) >= BYPASS_BYTES
        if large and outside:
            info = external_data_helper.ExternalDataInfo(tensor)
            weights[tensor.name] = np.memmap(folder / info.location, "<f4", "r", info.offset or 0, shape)
        elif large:
            weights[tensor.name] = numpy_helper.to_array(tensor)
        else:
            if outside:
                external_data_helper.load_external_data_for_tensor(tensor, str(folder))
                tensor.data_location = TensorProto.DEFAULT
                del tensor.external_data[:]
            rest.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
    return weights


class Weight(np.ndarray):
    """float32 that is not copied to become float32."""

    def astype(self, dtype, *args, **kwargs):
        return self if np.dtype(dtype) == self.dtype else super().astype(dtype, *args, **kwargs)


def _converter_class(front_end):
    """The wheel's OnnxConverter, whose simplifier is not shown the large weights.

    They never become part of an ONNX message either: after the simplifier the graph names them, and what asks for
    their data gets the arrays themselves. All that is computed from them alone is their transposition.
    """
    named: dict[str, np.ndarray] = {}
    to_array = numpy_helper.to_array
    numpy_helper.to_array = lambda tensor, *args: (
        named[tensor.name] if tensor.name in named and not tensor.raw_data else to_array(tensor, *args)
    )

    class Converter(front_end):
        def __init__(self, net: str, model, weights: dict):
            self.large = weights
            super().__init__(net, model, [], [], "", {}, True, dump_final_opt=False)

        def model_simplify(self, input_shapes=()):
            for name, array in self.large.items():
                self.model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape))
            super().model_simplify(list(input_shapes))
            graph = self.model.graph
            inputs = [value for value in graph.input if value.name not in self.large]
            constants = {tensor.name for tensor in graph.initializer} | set(self.large)
            attached, nodes = dict(self.large), []
            for node in graph.node:
                if node.op_type == "Transpose" and node.input[0] in attached:
                    perm = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
                    attached[node.output[0]] = np.transpose(attached[node.input[0]], perm)
                    constants.add(node.output[0])
                elif node.input and all(name in constants for name in node.input):
                    raise UserError(
                        f"{node.op_type} computes something from weights alone: export the net with `python -m helpers "
                        "export`"
                    )
                else:
                    nodes.append(node)
            used = {name for node in nodes for name in node.input}
            del graph.input[:]
            graph.input.extend(inputs)
            del graph.node[:]
            graph.node.extend(nodes)
            for name, array in attached.items():
                if name in used:
                    named[name] = np.ascontiguousarray(array).view(Weight)
                    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=array.shape)
                    graph.initializer.append(tensor)

    return Converter
