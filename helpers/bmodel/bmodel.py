"""What a bmodel file contains, read without any of Sophgo's libraries.

A bmodel is a header of 64 bytes, a flatbuffer that describes the nets, and the binaries it points to (weights,
instructions, the chip's firmware). Field numbers are those of bmodel.fbs, which the TPU-MLIR wheel ships in
include/tpu_mlir/Builder/BM168x. Nothing in a file is trusted.
"""

import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from helpers.bmodel.flatbuffer import MALFORMED, Buffer, Table
from helpers.errors import UserError
from helpers.nets import QwenShape, qwen_shape
from helpers.tensors import ADDR_MODES, HOST_DTYPE, NetInfo, TensorInfo

CHIP = "BM1684X"
_MAGIC = 0xFF55AAEE
_HEADER = struct.Struct("<IIIQ")
# bm_data_type_t of libsophon's bmdef.h; the last two have two elements a byte.
_DTYPES = "float32 float16 int8 uint8 int16 uint16 int32 uint32 bfloat16 int4 uint4".split()
_ADDR_MODES = (*ADDR_MODES, "io_tag", "io_tag_fuse", "io_reloc")
_EPOCH = b"Thu Jan  1 00:00:00 1970\n"  # as the compiler writes time: asctime
_AGAIN = "compile it again, or fetch it again"


@dataclass(frozen=True)
class Net:
    """One net. info: its inputs and outputs, device by device. Sizes in bytes, over all of its devices.

    weights: {(start, size)} in the file, which nets of a combined bmodel share. scratch: device memory for what it
    computes in between; io: memory of its inputs and outputs where that is its own.
    """

    info: NetInfo
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
    """A bmodel file. version: of the compiler. kernel_bytes: the chip's firmware in it."""

    path: Path
    chip: str
    version: str
    device_num: int
    nets: dict[str, Net]
    kernel_bytes: int
    file_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, what nets share counted once."""
        return sum(size for _, size in frozenset().union(*(net.weights for net in self.nets.values())))

    @property
    def device_bytes(self) -> int:
        """Device memory that a `runnable_bmodel` takes: the runtime's, and the tensors of nets without their own."""
        nets = self.nets.values()
        runtime = sum(net.instruction_bytes + net.scratch_bytes + net.io_bytes for net in nets)
        infos = [net.info for net in nets if net.info.addr_mode == "basic"]
        tensors = sum(tensor.bytes for info in infos for tensor in (*info.inputs, *info.outputs))
        return self.kernel_bytes + self.weight_bytes + runtime + tensors


def read_bmodel(path: str | Path) -> Bmodel:
    """Read a bmodel's description, for whatever chip. Raises UserError where it is cut off, damaged or none."""
    path = Path(path)
    data, binary_bytes, _ = _description(path)
    try:
        return _parse(path, data, binary_bytes, path.stat().st_size)
    except (*MALFORMED, LookupError, OverflowError):
        raise UserError(f"{path} is damaged (its description of the nets makes no sense): {_AGAIN}.") from None


def _description(path: Path) -> tuple[bytes, int, int]:
    """(flatbuffer, bytes of the binaries after it, where it begins in the file)"""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # from a pipe nothing may ever come
            raise UserError(f"{path} cannot be read (it is no regular file): give the path of a .bmodel file.")
        with open(path, "rb") as file:
            head = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
            size = file.seek(0, 2)
            magic, start, described, binary_bytes = _HEADER.unpack(head)
            if magic != _MAGIC:
                raise UserError(
                    f"{path} is not a bmodel (it is empty, or begins like another file): give the file that ends in "
                    f".bmodel, or {_AGAIN}."
                )
            whole = start + described + binary_bytes
            if start < _HEADER.size or size < whole:
                raise UserError(f"{path} is cut off: it has {size} bytes of {whole}; {_AGAIN}.")
            file.seek(start)
            return file.read(described), binary_bytes, start
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the path of a .bmodel file.") from None


def strip_time(path: str | Path) -> None:
    """Set the time stamp in a bmodel, just compiled, to 1970: the same inputs then give the same bytes."""
    data, _, start = _description(Path(path))
    buffer = Buffer(data)
    place = buffer.root().place(2)
    if place is not None and buffer.number("I", place) == len(_EPOCH):
        with open(path, "r+b") as file:
            file.seek(start + place + 4)
            file.write(_EPOCH)


def _parse(path: Path, data: bytes, binary_bytes: int, size: int) -> Bmodel:
    model = Buffer(data).root()
    chip = model.string(3)
    kernel = model.table(6)
    # A net of several devices is several in the file, its parts, which have one main name.
    parts: dict[str, list[Table]] = {}
    for part in model.tables(4):
        cascade = part.table(4)
        parts.setdefault((cascade.string(2) if cascade else "") or part.string(0), []).append(part)
    if not chip or not parts or "" in parts:
        raise ValueError
    return Bmodel(
        path=path,
        chip=chip,
        version=model.string(1),
        device_num=max(1, model.number(7, "I")),
        nets={name: _net(name, found, binary_bytes) for name, found in parts.items()},
        kernel_bytes=kernel.binary(1)[1] if kernel else 0,
        file_bytes=size,
    )


def _net(name: str, parts: list[Table], binary_bytes: int) -> Net:
    tensors: tuple[dict, dict] = {}, {}  # inputs and outputs: {(device, index): TensorInfo}
    scratch: dict[int, int] = {}  # by device: one part runs at a time
    weights: set[tuple[int, int]] = set()
    instruction_bytes = io_bytes = 0
    dynamic = False
    for part in parts:
        stages = list(part.tables(3))
        if not stages:
            raise ValueError
        dynamic |= bool(stages[0].number(5, "i"))
        cascade = part.table(4)
        device = cascade.number(0, "I") if cascade else 0
        for side, own in enumerate(((1, 3), (2, 4))):
            for index, table in enumerate(stages[0].tables(side)):
                # Between a net's parts tensors pass too; these kinds are the net's own, whole or split.
                if cascade is None:
                    tensors[side][device, index] = _tensor(table, device)
                elif table.number(11, "i") in own:
                    tensors[side][device, table.number(12, "i")] = _tensor(table, device)
        for stage in stages:
            weight = coeff.binary(2) if (coeff := stage.table(4)) else (0, 0)
            groups = [*stage.tables(8), *(group for subnet in stage.tables(12) for group in subnet.tables(1))]
            # A static net's commands are listed with the net and again with its subnets.
            instructions = {group.binary(n) for group in groups for n in (2, 3)} | {stage.binary(11)}
            if any(start + count > binary_bytes for start, count in instructions | {weight}):
                raise ValueError
            if weight[1]:
                weights.add(weight)
            instruction_bytes += sum(count for _, count in instructions)
            needed = sum(stage.numbers(14, "Q")) or stage.number(3, "Q")
            scratch[device] = max(scratch.get(device, 0), needed)
        io_bytes += max(stage.number(18, "Q") for stage in stages)
    inputs, outputs = (tuple(found[place] for place in sorted(found)) for found in tensors)
    return Net(
        info=NetInfo(name, inputs, outputs, _ADDR_MODES[parts[0].number(5, "I")], dynamic),
        devices=len(scratch),
        weights=frozenset(weights),
        instruction_bytes=instruction_bytes,
        scratch_bytes=sum(scratch.values()),
        io_bytes=io_bytes,
    )


def _tensor(table: Table, device: int) -> TensorInfo:
    shapes = [shape.numbers(0, "Q") for shape in table.tables(5)]
    if not shapes or any(extent > 1 << 40 for shape in shapes for extent in shape):
        raise ValueError
    return TensorInfo(table.string(0), max(shapes, key=math.prod), _DTYPES[table.number(1, "I")], device)


def require_qwen(bmodel: Bmodel) -> QwenShape:
    """The model that the nets describe. Raises UserError where they are not Qwen's, or not for BM1684X."""
    _require_chip(bmodel)
    return qwen_shape({name: net.info for name, net in bmodel.nets.items()}, bmodel.path)


def runnable_bmodel(path: str | Path, devices: int) -> Bmodel:
    """The file's description, if an engine of so many devices can run it.

    Sophgo's runtime aborts, or says only that it failed, where this raises UserError.
    """
    bmodel = read_bmodel(path)
    _require_chip(bmodel)
    if bmodel.device_num != devices:
        ids = ",".join(map(str, range(bmodel.device_num)))
        raise UserError(
            f"{path} was compiled for {bmodel.device_num} device(s) and was given {devices}: name as many chips "
            f"(--devid {ids}), or compile it with --num_device {devices}."
        )
    for name, net in bmodel.nets.items():
        dtypes = {tensor.dtype for tensor in (*net.info.inputs, *net.info.outputs)}
        taken = (*ADDR_MODES, *HOST_DTYPE)
        if others := sorted({net.info.addr_mode, *dtypes}.difference(taken)):
            raise UserError(
                f"{path}: the net {name} has {', '.join(others)}, an engine takes {', '.join(taken)}: compile it with "
                "--addr_mode io_alone and --quantize BF16, W8BF16 or W4BF16."
            )
    return bmodel


def _require_chip(bmodel: Bmodel) -> None:
    if bmodel.chip.upper() != CHIP:
        raise UserError(f"{bmodel.path} is for the chip {bmodel.chip}, {CHIP} is needed: compile it for {CHIP}.")
