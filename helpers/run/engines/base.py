"""One interface for the simulator and the chip: device memory, views of it, and running a net on it.

Nothing above this package knows which engine it has. Nothing in it needs torch, transformers or tpu-mlir.
"""

import math
import operator
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from helpers.errors import UserError
from helpers.tensors import HOST_DTYPE, NetInfo, TensorInfo


@dataclass(frozen=True, eq=False)
class DeviceTensor:
    """A piece of device memory with a shape and a dtype. It is valid until its engine is closed.

    `memory` is the engine's own handle; `base` is the tensor that this is a view of, which it keeps alive.
    """

    shape: tuple[int, ...]
    dtype: str
    device: int
    memory: object
    base: "DeviceTensor | None" = None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * HOST_DTYPE[self.dtype].itemsize


# Where tensors of nets are: {(net, "inputs" or "outputs", index): memory}.
NetMemory = dict[tuple[str, str, int], DeviceTensor]


class Engine:
    """A loaded bmodel and the memory of the device it runs on.

    name: "simulator" or "chip". kind_of_time: what a clock around `run` measures, "simulator wall" or "measured".
    reason: why this engine was taken. devices: the device ids. nets: name to NetInfo.
    device_bytes: device memory that the bmodel takes, reckoned from its file. own_memory: what the runtime gave to nets
    with addr_mode "io_alone".
    bytes_to_device, bytes_to_host: what `write` and `read` moved since the engine was opened.

    Calls from several threads are carried out one at a time; other Python threads go on during a run.
    Every method raises UserError, and none of them is of use after `close`.
    Here is checked what is asked for. An engine carries it out: _write(tensor, values), _read(tensor), _copy(source,
    target) and _run(net, inputs, outputs); _allocate(shape, dtype, device) and _view(tensor, offset_elements, shape)
    return the memory of what they make.
    """

    name: ClassVar[str]
    kind_of_time: ClassVar[str]

    def __init__(self, devices: Sequence[int], nets: dict[str, NetInfo], own_memory: NetMemory, device_bytes: int):
        self.devices = tuple(devices)
        self.nets = nets
        self.device_bytes = device_bytes
        self.reason = ""
        self.bytes_to_device = 0
        self.bytes_to_host = 0
        self._counting = threading.Lock()
        self._net_memory = dict(own_memory)

    def input_tensor(self, net: str, index: int) -> DeviceTensor:
        """The memory of a net's input: the same piece at every call."""
        return self._net_tensor(net, "inputs", self._net(net).inputs, index)

    def output_tensor(self, net: str, index: int) -> DeviceTensor:
        """The memory of a net's output: the same piece at every call."""
        return self._net_tensor(net, "outputs", self._net(net).outputs, index)

    def allocate(self, shape: Sequence[int], dtype: str, device: int = 0) -> DeviceTensor:
        """New device memory, zeroed. It lasts while the tensor or a view of it is held, at most until `close`."""
        shape = tuple(int(size) for size in shape)
        if dtype not in HOST_DTYPE:
            raise UserError(f"There is no device dtype {dtype!r}: take one of {', '.join(HOST_DTYPE)}.")
        if not shape or len(shape) > 8 or min(shape) < 1:
            raise UserError(f"A device tensor has 1 to 8 dimensions of size 1 or more, not {list(shape)}.")
        if not 0 <= device < len(self.devices):
            raise UserError(f"The engine has {len(self.devices)} device(s), from 0; {device} was asked for.")
        return DeviceTensor(shape, dtype, device, self._allocate(shape, dtype, device))

    def view(self, tensor: DeviceTensor, offset_elements: int, shape: Sequence[int]) -> DeviceTensor:
        """A part of a tensor, or all of it in another shape; it is the same memory."""
        offset_elements, shape = operator.index(offset_elements), tuple(int(size) for size in shape)
        if offset_elements < 0 or min(shape, default=1) < 1 or offset_elements + math.prod(shape) > tensor.count:
            raise UserError(
                f"A view of shape {list(shape)} at element {offset_elements} does not lie within a tensor of shape "
                f"{list(tensor.shape)} ({tensor.count} elements)."
            )
        return DeviceTensor(shape, tensor.dtype, tensor.device, self._view(tensor, offset_elements, shape), tensor)

    def write(self, tensor: DeviceTensor, values: np.ndarray) -> None:
        """Host to device. Shape and dtype must be the tensor's; bfloat16 and float16 cross as uint16 bits."""
        values, wanted = np.asarray(values), HOST_DTYPE[tensor.dtype]
        if values.shape != tensor.shape or values.dtype != wanted:
            raise UserError(
                f"An array of shape {list(values.shape)} and dtype {values.dtype} was written to a tensor of shape "
                f"{list(tensor.shape)} that takes {wanted} ({tensor.dtype}): give it exactly these."
            )
        self._write(tensor, np.ascontiguousarray(values))
        with self._counting:
            self.bytes_to_device += values.nbytes

    def read(self, tensor: DeviceTensor) -> np.ndarray:
        """Device to host: an array of the tensor's shape; bfloat16 and float16 cross as uint16 bits."""
        values = self._read(tensor)
        with self._counting:
            self.bytes_to_host += values.nbytes
        return values

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Copy on one device, without the host; shapes may differ, dtype and number of elements may not."""
        if (source.dtype, source.count, source.device) != (target.dtype, target.count, target.device):
            raise UserError(
                "A copy stays on one device and needs the same dtype and number of elements: the source is "
                f"{source.dtype} {list(source.shape)} on {source.device}, the target {target.dtype} "
                f"{list(target.shape)} on {target.device}."
            )
        self._copy(source, target)

    def run(self, net: str, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> None:
        """Run a net and wait for it. It reads and writes the tensors given; they may be views.

        Number, dtype, shape and device of the tensors must be what the net was compiled for: the runtime itself checks
        little, and would write past the end of a tensor that is too small. A dynamic net takes smaller inputs, with as
        many dimensions.
        """
        info = self._net(net)
        _check_tensors(info, "inputs", info.inputs, inputs)
        _check_tensors(info, "outputs", info.outputs, outputs)
        self._run(net, inputs, outputs)

    def close(self) -> None:
        """Give the device and its memory back; the simulator also in the middle of a run, the chip after it.

        May be called twice.
        """
        raise NotImplementedError

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _net(self, name: str) -> NetInfo:
        try:
            return self.nets[name]
        except KeyError:
            raise UserError(
                f"The bmodel has no net {name!r}; it has {', '.join(sorted(self.nets))}: compile one with all nets."
            ) from None

    def _net_tensor(self, net: str, kind: str, infos: Sequence[TensorInfo], index: int) -> DeviceTensor:
        if not 0 <= index < len(infos):
            raise UserError(f"{net} {kind} has {len(infos)} tensors, number {index} was asked for: count from 0.")
        # Never the runtime's memory of a net with basic addresses: that is shared with intermediate results, so what
        # is written there once is lost in the next run.
        if (place := (net, kind, index)) not in self._net_memory:
            shape, dtype, device = infos[index].shape, infos[index].dtype, infos[index].device
            self._net_memory[place] = DeviceTensor(shape, dtype, device, self._allocate(shape, dtype, device))
        return self._net_memory[place]


def _check_tensors(net: NetInfo, kind: str, infos: Sequence[TensorInfo], tensors: Sequence[DeviceTensor]) -> None:
    if len(tensors) != len(infos):
        raise UserError(f"{net.name} has {len(infos)} {kind}, {len(tensors)} were given.")
    for index, (info, tensor) in enumerate(zip(infos, tensors, strict=True)):
        fits = tensor.shape == info.shape
        if net.dynamic and len(tensor.shape) == len(info.shape):
            fits = all(given <= most for given, most in zip(tensor.shape, info.shape, strict=True))
        if not fits or tensor.dtype != info.dtype or tensor.device != info.device:
            most = "at most " if net.dynamic else ""
            raise UserError(
                f"{net.name} {kind}[{index}] ({info.name}) is {info.dtype} {most}{list(info.shape)} on device "
                f"{info.device}; a tensor {tensor.dtype} {list(tensor.shape)} on device {tensor.device} was given."
            )
