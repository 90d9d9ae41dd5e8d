"""What a bmodel file contains, read without any of Sophgo's libraries.

A bmodel is a header of 64 bytes, a flatbuffer that describes the nets, and the binaries it points to (weights,
instructions, the chip's firmware). Field numbers are those of bmodel.fbs, which the TPU-MLIR wheel ships in
include/tpu_mlir/Builder/BM168x. Nothing in a file is trusted: whatever its bytes, the answer is a Bmodel or a
UserError.
"""

import math
import stat
import struct
from dataclasses import dataclass, field
from pathlib import Path

from helpers.bmodel.flatbuffer import Buffer, Malformed, Table
from helpers.errors import UserError
from helpers.nets import QwenShape, qwen_shape
from helpers.tensors import NetInfo, TensorInfo

CHIP = "BM1684X"
_MAGIC = 0xFF55AAEE
_HEADER = struct.Struct("<IIIQ")
_HEADER_BYTES = 64
# bm_data_type_t of libsophon's bmdef.h; the last two have two elements a byte.
_DTYPES = {
    0: "float32",
    1: "float16",
    2: "int8",
    3: "uint8",
    4: "int16",
    5: "uint16",
    6: "int32",
    7: "uint32",
    8: "bfloat16",
    9: "int4",
    10: "uint4",
}
_ADDR_MODES = {0: "basic", 1: "io_alone", 2: "io_tag", 3: "io_tag_fuse", 4: "io_reloc"}
# As the compiler writes it: asctime.
_EPOCH = b"Thu Jan  1 00:00:00 1970\n"
_AGAIN = "compile it again, or fetch it again"


@dataclass(frozen=True)
class Net:
    """One net. info: its inputs and outputs, device by device. Sizes in bytes, over all of its devices.

    weights: where its weights are in the file, {(start, size)}: nets of a combined bmodel share them.
    scratch: device memory for what it computes in between; io: memory of its inputs and outputs where that is its own.
    """

    info: NetInfo
    stages: int
    devices: int
    weights: frozenset[tuple[int, int]]
    instruction_bytes: int
    scratch_bytes: int
    io_bytes: int

    @property
    def weight_bytes(self) -> int:
        return sum(size for _, size in self.weights)


@dataclass(frozen=True)
class Bmodel:
    """A bmodel file. kernel_bytes: the chip's firmware in it. made: the compiler's time stamp, in its words."""

    path: Path
    chip: str
    version: str
    made: str
    device_num: int
    nets: dict[str, Net]
    kernel_bytes: int
    file_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, what nets share counted once."""
        return sum(size for _, size in frozenset().union(*(net.weights for net in self.nets.values())))


def read_bmodel(path: str | Path) -> Bmodel:
    """Read a bmodel's description; weights and instructions are not read.

    Raises UserError where the file is missing, empty, cut off, damaged or not a bmodel. Whatever chip it is for.
    """
    path = Path(path)
    data, binary_bytes, _ = _description(path)
    try:
        return _parse(path, data, binary_bytes, path.stat().st_size)
    except (Malformed, OverflowError):
        raise UserError(f"{path} is damaged (its description of the nets makes no sense): {_AGAIN}.") from None


def _description(path: Path) -> tuple[bytes, int, int]:
    """(flatbuffer, bytes of the binaries after it, where it begins in the file)"""
    try:
        kind = stat.filemode(path.stat().st_mode)[0]
        if kind != "-":  # from a pipe nothing may ever come
            found = {"d": "a folder", "p": "a pipe", "s": "a socket"}.get(kind, "a device")
            raise UserError(f"{path} cannot be read (it is {found}, not a file): give the path of a .bmodel file.")
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
            if not head:
                raise UserError(f"{path} is empty: {_AGAIN}.")
            size = file.seek(0, 2)
            if len(head) < _HEADER_BYTES or _HEADER.unpack_from(head)[0] != _MAGIC:
                raise UserError(
                    f"{path} is not a bmodel (it does not begin like one): give the file that ends in .bmodel, made by "
                    "`python -m helpers compile`."
                )
            _, start, described, binary_bytes = _HEADER.unpack_from(head)
            whole = start + described + binary_bytes
            if start < _HEADER.size or size < whole:
                raise UserError(f"{path} is cut off: it has {size} bytes of {whole}; {_AGAIN}.")
            file.seek(start)
            return file.read(described), binary_bytes, start
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a .bmodel file.") from None


def strip_time(path: str | Path) -> None:
    """Set the time stamp in a bmodel to 1970: the same inputs then give the same bytes. Raises UserError."""
    path = Path(path)
    data, _, start = _description(path)
    try:
        buffer = Buffer(data)
        place = buffer.root().place(2)
        if place is None or buffer.number("I", place) != len(_EPOCH):
            return
    except Malformed:
        raise UserError(f"{path} is damaged (it has no time stamp): {_AGAIN}.") from None
    with open(path, "r+b") as file:
        file.seek(start + place + 4)
        file.write(_EPOCH)


def _parse(path: Path, data: bytes, binary_bytes: int, size: int) -> Bmodel:
    buffer = Buffer(data)
    model = buffer.root()
    chip = model.string(3)
    kernel = model.table(6)
    parts: dict[str, list[_Part]] = {}
    for net in model.tables(4):
        part = _part(net, binary_bytes)
        parts.setdefault(part.main_name, []).append(part)
    if not chip or not parts or "" in parts:
        raise Malformed
    return Bmodel(
        path=path,
        chip=chip,
        version=model.string(1),
        made=model.string(2).strip(),
        device_num=max(1, model.number(7, "I")),
        nets={name: _join(name, found) for name, found in parts.items()},
        kernel_bytes=kernel.binary(1)[1] if kernel else 0,
        file_bytes=size,
    )


@dataclass
class _Part:
    """A net on one device; a net of several devices is several parts with one main name."""

    main_name: str
    addr_mode: str
    dynamic: bool
    stages: int
    device: int
    inputs: list[tuple[int, TensorInfo]] = field(default_factory=list)
    outputs: list[tuple[int, TensorInfo]] = field(default_factory=list)
    weights: set[tuple[int, int]] = field(default_factory=set)
    instruction_bytes: int = 0
    scratch_bytes: int = 0
    io_bytes: int = 0


def _tensor(table: Table, device: int) -> TensorInfo:
    dtype = _DTYPES.get(table.number(1, "I"))
    shapes = [tuple(shape.numbers(0, "Q")) for shape in table.tables(5)]
    if dtype is None or not shapes or any(extent > 1 << 40 for shape in shapes for extent in shape):
        raise Malformed
    return TensorInfo(table.string(0), max(shapes, key=math.prod), dtype, device)


def _part(net: Table, binary_bytes: int) -> _Part:
    def inside(place: tuple[int, int]) -> int:
        if sum(place) > binary_bytes:
            raise Malformed
        return place[1]

    def instructions(group: Table) -> list[tuple[int, int]]:
        return [group.binary(2), group.binary(3)]

    cascade = net.table(4)
    name = net.string(0)
    stages = list(net.tables(3))
    addr_mode = _ADDR_MODES.get(net.number(5, "i"))
    if not stages or addr_mode is None:
        raise Malformed
    part = _Part(
        main_name=(cascade.string(2) if cascade else "") or name,
        addr_mode=addr_mode,
        dynamic=bool(stages[0].number(5, "i")),
        stages=len(stages),
        device=cascade.number(0, "I") if cascade else 0,
    )
    for field_id, found in ((0, part.inputs), (1, part.outputs)):
        # In a net of several devices tensors pass between its parts; these kinds are the net's own, whole or split.
        own = (1, 3) if field_id == 0 else (2, 4)
        for table in stages[0].tables(field_id):
            if cascade is None or table.number(11, "i") in own:
                index = table.number(12, "i") if cascade else len(found)
                found.append((index, _tensor(table, part.device)))
    for stage in stages:
        if coeff := stage.table(4):
            place = coeff.binary(2)
            if inside(place):
                part.weights.add(place)
        groups = [*stage.tables(8), *(group for subnet in stage.tables(12) for group in subnet.tables(1))]
        # A static net's commands are listed with the net and again with its subnets.
        places = {place for group in groups for place in instructions(group)} | {stage.binary(11)}
        part.instruction_bytes += sum(map(inside, places))
        part.scratch_bytes = max(part.scratch_bytes, sum(stage.numbers(14, "Q")) or stage.number(3, "Q"))
        part.io_bytes = max(part.io_bytes, stage.number(18, "Q"))
    return part


def _join(name: str, parts: list[_Part]) -> Net:
    def tensors(which: str) -> tuple[TensorInfo, ...]:
        found = {}
        for part in parts:
            for index, tensor in getattr(part, which):
                found[part.device, index] = tensor
        return tuple(found[place] for place in sorted(found))

    info = NetInfo(name, tensors("inputs"), tensors("outputs"), parts[0].addr_mode, any(p.dynamic for p in parts))
    return Net(
        info=info,
        stages=max(part.stages for part in parts),
        devices=len({part.device for part in parts}),
        weights=frozenset(place for part in parts for place in part.weights),
        instruction_bytes=sum(part.instruction_bytes for part in parts),
        scratch_bytes=sum(
            max(part.scratch_bytes for part in parts if part.device == device)
            for device in {part.device for part in parts}
        ),
        io_bytes=sum(part.io_bytes for part in parts),
    )


def require_qwen(bmodel: Bmodel) -> QwenShape:
    """The model that the nets describe. Raises UserError where they are not Qwen's, or not for BM1684X."""
    if bmodel.chip.upper() != CHIP:
        raise UserError(
            f"{bmodel.path} is for the chip {bmodel.chip}, {CHIP} is needed: compile it with `python -m helpers "
            "compile`."
        )
    return qwen_shape({name: net.info for name, net in bmodel.nets.items()}, bmodel.path)
