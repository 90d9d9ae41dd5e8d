"""The inputs, outputs and outside files of an ONNX file, read without onnx and without reading the weights.

An ONNX file is a protobuf message: a run of (field number, type, value); large values are skipped by their length.
Field numbers are those of onnx.proto3.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from helpers.errors import UserError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_DTYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}


@dataclass
class Signature:
    """inputs, outputs: name -> (dtype, shape); shape has 0 for a dimension that is not fixed. external: file names
    beside the ONNX file that hold its weights. weights_bytes: of the file and of those."""

    inputs: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    outputs: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    external: set[str] = field(default_factory=set)
    nodes: int = 0
    weights_bytes: int = 0


class _Malformed(Exception):
    pass


def _varint(file: BinaryIO, end: int) -> int:
    value, shift = 0, 0
    while True:
        byte = file.read(1)
        if not byte or file.tell() > end or shift > 63:
            raise _Malformed
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
        shift += 7


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, start, end) of each length-delimited field, or (number, value, -1) of each varint."""
    while file.tell() < end:
        key = _varint(file, end)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            yield number, _varint(file, end), -1
        elif kind in (_FIXED64, _FIXED32):
            file.seek(8 if kind == _FIXED64 else 4, os.SEEK_CUR)
        elif kind == _BYTES:
            length = _varint(file, end)
            start = file.tell()
            if start + length > end:
                raise _Malformed
            yield number, start, start + length
            file.seek(start + length)
        else:
            raise _Malformed


def _text(file: BinaryIO, start: int, end: int) -> str:
    file.seek(start)
    return file.read(end - start).decode("utf-8", errors="replace")


def _messages(file: BinaryIO, start: int, end: int, number: int) -> Iterator[tuple[int, int]]:
    file.seek(start)
    yield from ((a, b) for found, a, b in _fields(file, end) if found == number and b >= 0)


def _value_info(file: BinaryIO, start: int, end: int) -> tuple[str, tuple[str, tuple[int, ...]]]:
    file.seek(start)
    name, dtype, shape = "", "", []
    for number, a, b in _fields(file, end):
        if number == 1:
            name = _text(file, a, b)
        elif number == 2:
            for tensor in list(_messages(file, a, b, 1)):
                file.seek(tensor[0])
                for part, c, d in _fields(file, tensor[1]):
                    if part == 1:
                        dtype = _DTYPES.get(c, str(c))
                    elif part == 2:
                        for dimension in list(_messages(file, c, d, 1)):
                            file.seek(dimension[0])
                            fixed = [v for n, v, e in _fields(file, dimension[1]) if n == 1 and e < 0]
                            shape.append(fixed[0] if fixed else 0)
            file.seek(b)
    return name, (dtype, tuple(shape))


def _external_file(file: BinaryIO, start: int, end: int) -> tuple[str, str | None]:
    """(tensor's name, file that holds its data or None)"""
    file.seek(start)
    name, location = "", None
    for number, a, b in _fields(file, end):
        if number == _TENSOR_NAME:
            name = _text(file, a, b)
        elif number == _TENSOR_EXTERNAL:
            entry = {}
            file.seek(a)
            for part, c, d in _fields(file, b):
                entry[part] = _text(file, c, d)
            if entry.get(1) == "location":
                location = entry.get(2)
            file.seek(b)
    return name, location


def read_signature(path: str | Path) -> Signature:
    """Signature of an ONNX file. Raises UserError where it is missing, empty, cut off or not ONNX, or its weights
    file is missing."""
    path = Path(path)
    signature, initializers = Signature(), set()
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            for start, end in list(_messages(file, 0, size, _MODEL_GRAPH)):
                file.seek(start)
                for number, a, b in _fields(file, end):
                    if number == _GRAPH_NODE:
                        signature.nodes += 1
                    elif number == _GRAPH_INITIALIZER:
                        name, location = _external_file(file, a, b)
                        initializers.add(name)
                        signature.external |= {location} - {None}
                    elif number in (_GRAPH_INPUT, _GRAPH_OUTPUT):
                        name, described = _value_info(file, a, b)
                        (signature.inputs if number == _GRAPH_INPUT else signature.outputs)[name] = described
                    if b >= 0:
                        file.seek(b)
    except PermissionError:
        raise UserError(f"{path} may not be read: give yourself the right to read it.") from None
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path} is not there: export the nets with `python -m helpers export`.") from None
    except (_Malformed, TypeError, ValueError, OverflowError):
        raise UserError(f"{path} is cut off or not an ONNX file: export the net again.") from None
    if not signature.nodes or not signature.outputs:
        raise UserError(f"{path} is empty or not an ONNX file: export the net again.")
    signature.inputs = {name: info for name, info in signature.inputs.items() if name not in initializers}
    signature.weights_bytes = size
    for name in sorted(signature.external):
        if not (path.parent / name).is_file():
            raise UserError(f"{path} keeps its weights in {name}, which is not beside it: export the net again.")
        signature.weights_bytes += (path.parent / name).stat().st_size
    return signature
