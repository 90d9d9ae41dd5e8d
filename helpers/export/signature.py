"""The inputs, outputs and outside files of an ONNX file, without the weights that lie beside it."""

import os
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from helpers.errors import UserError

_DTYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


@dataclass
class Signature:
    """inputs, outputs: name -> (dtype, shape); shape has 0 for a dimension that is not fixed. external: file names
    beside the ONNX file that hold its weights. weights_bytes: of the file and of those."""

    inputs: dict[str, tuple[str, tuple[int, ...]]]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    external: set[str]
    weights_bytes: int


def read_signature(path: str | Path) -> Signature:
    """Raises UserError where the file is empty, cut off or not ONNX, or its weights file is missing."""
    path = Path(path)
    try:
        graph = onnx.load_from_string(path.read_bytes()).graph
        # Protobuf gives bytes where a text is damaged.
        inputs, outputs = (
            {os.fsdecode(value.name): _described(value.type.tensor_type) for value in values}
            for values in (graph.input, graph.output)
        )
        weights = {os.fsdecode(tensor.name) for tensor in graph.initializer}
        external = {os.fsdecode(e.value) for t in graph.initializer for e in t.external_data if e.key == "location"}
    except DecodeError:
        raise UserError(f"{path} is cut off or not an ONNX file: export the net again.") from None
    if not graph.node or not outputs:
        raise UserError(f"{path} is empty or not an ONNX file: export the net again.")
    files = [path.parent / name for name in sorted(external)]
    if lost := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} keeps its weights in {lost[0]}, which is not beside it: export the net again.")
    inputs = {name: described for name, described in inputs.items() if name not in weights}
    return Signature(inputs, outputs, external, sum(file.stat().st_size for file in [path, *files]))


def _described(kind) -> tuple[str, tuple[int, ...]]:
    return _DTYPES.get(kind.elem_type, str(kind.elem_type)), tuple(dimension.dim_value for dimension in kind.shape.dim)
