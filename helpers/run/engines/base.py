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
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * HOST_DTYPE[self.dtype].itemsize


class Engine:
    """A loaded bmodel and the memory of the device it runs on.

    name: "simulator" or "chip". kind_of_time: what a clock around `run` measures, "simulator wall" or "measured".
    reason: why this engine was taken. devices: the device ids. nets: name to NetInfo.
    device_bytes: device memory that the bmodel takes, reckoned from its file.
    bytes_to_device, bytes_to_host: what `write` and `read` moved since the engine was opened.

    Calls from several threads are carried out one at a time; other Python threads go on during a run.
    Every method raises UserError, and none of them is of use after `close`.
    """

    name: ClassVar[str]
    kind_of_time: ClassVar[str]

    def __init__(self, devices: Sequence[int], nets: dict[str, NetInfo], device_bytes: int = 0):
        self.devices = tuple(devices)
        self.nets = nets
        self.device_bytes = device_bytes
        self.reason = ""
        self.bytes_to_device = 0
        self.bytes_to_host = 0
        self._counting = threading.Lock()

    def input_tensor(self, net: str, index: int) -> DeviceTensor:
        """The memory of a net's input: the same piece at every call."""
        raise NotImplementedError

    def output_tensor(self, net: str, index: int) -> DeviceTensor:
        """The memory of a net's output: the same piece at every call."""
        raise NotImplementedError

    def allocate(self, shape: Sequence[int], dtype: str, device: int = 0) -> DeviceTensor:
        """New device memory, zeroed. It lasts while the tensor or a view of it is held, at most until `close`."""
        raise NotImplementedError

    def view(self, tensor: DeviceTensor, offset_elements: int, shape: Sequence[int]) -> DeviceTensor:
        """A part of a tensor, or all of it in another shape; it is the same memory."""
        raise NotImplementedError

    def write(self, tensor: DeviceTensor, values: np.ndarray) -> None:
        """Host to device. Shape and dtype must be the tensor's; bfloat16 and float16 cross as uint16 bits."""
        raise NotImplementedError

    def read(self, tensor: DeviceTensor) -> np.ndarray:
        """Device to host: an array of the tensor's shape; bfloat16 and float16 cross as uint16 bits."""
        raise NotImplementedError

    def copy(self, source: DeviceTensor, target: DeviceTensor) -> None:
        """Copy on one device, without the host; shapes may differ, dtype and number of elements may not."""
        raise NotImplementedError

    def run(self, net: str, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> None:
        """Run a net and wait for it. It reads and writes the tensors given; they may be views."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the device and its memory back; the simulator also in the middle of a run, the chip after it.

        May be called twice.
        """
        raise NotImplementedError

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _count(self, to_device: int = 0, to_host: int = 0) -> None:
        with self._counting:
            self.bytes_to_device += to_device
            self.bytes_to_host += to_host

    def _net(self, name: str) -> NetInfo:
        try:
            return self.nets[name]
        except KeyError:
            raise UserError(
                f"The bmodel has no net {name!r}; it has {', '.join(sorted(self.nets))}: compile one with all nets."
            ) from None


def net_tensor(infos: Sequence[TensorInfo], index: int, what: str) -> TensorInfo:
    """infos[index]; raises UserError, naming `what`, where there is none."""
    if not 0 <= index < len(infos):
        raise UserError(f"{what} has {len(infos)} tensors, number {index} was asked for: count from 0.")
    return infos[index]


def check_view(tensor: DeviceTensor, offset_elements: int, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The view's offset and shape, as Python's ints; raises UserError where it does not lie within the tensor."""
    offset_elements, shape = operator.index(offset_elements), tuple(int(size) for size in shape)
    count = math.prod(shape)
    if offset_elements < 0 or min(shape, default=1) < 1 or offset_elements + count > tensor.count:
        raise UserError(
            f"A view of shape {list(shape)} at element {offset_elements} does not lie within a tensor of shape "
            f"{list(tensor.shape)} ({tensor.count} elements)."
        )
    return offset_elements, shape


def check_allocation(shape: Sequence[int], dtype: str) -> tuple[int, ...]:
    """The shape as a tuple; raises UserError where it or the dtype cannot be had on the device."""
    shape = tuple(int(size) for size in shape)
    if dtype not in HOST_DTYPE:
        raise UserError(f"There is no device dtype {dtype!r}: take one of {', '.join(HOST_DTYPE)}.")
    if not shape or len(shape) > 8 or min(shape) < 1:
        raise UserError(f"A device tensor has 1 to 8 dimensions of size 1 or more, not {list(shape)}.")
    return shape


def check_values(tensor: DeviceTensor, values: np.ndarray) -> np.ndarray:
    """The values, contiguous; raises UserError unless shape and dtype are exactly what the tensor takes."""
    values = np.asarray(values)
    wanted = HOST_DTYPE[tensor.dtype]
    if values.shape != tensor.shape or values.dtype != wanted:
        raise UserError(
            f"An array of shape {list(values.shape)} and dtype {values.dtype} was written to a tensor of shape "
            f"{list(tensor.shape)} that takes {wanted} ({tensor.dtype}): give it exactly these."
        )
    return np.ascontiguousarray(values)


def check_copy(source: DeviceTensor, target: DeviceTensor) -> None:
    """Raise UserError unless dtype, number of elements and device agree."""
    if (source.dtype, source.count) != (target.dtype, target.count):
        raise UserError(
            f"A copy needs the same dtype and number of elements: the source is {source.dtype} {list(source.shape)}, "
            f"the target {target.dtype} {list(target.shape)}."
        )
    if source.device != target.device:
        raise UserError(f"A copy stays on one device: the source is on {source.device}, the target on {target.device}.")


def check_run(net: NetInfo, inputs: Sequence[DeviceTensor], outputs: Sequence[DeviceTensor]) -> None:
    """Raise UserError unless number, dtype, shape and device of the tensors are what the net was compiled for.

    The runtime itself checks little: a tensor that is too small would be written past its end.
    A dynamic net takes smaller inputs, with as many dimensions.
    """
    for kind, infos, tensors in (("inputs", net.inputs, inputs), ("outputs", net.outputs, outputs)):
        if len(tensors) != len(infos):
            raise UserError(f"{net.name} has {len(infos)} {kind}, {len(tensors)} were given.")
        for index, (info, tensor) in enumerate(zip(infos, tensors, strict=True)):
            if net.dynamic:
                fits = len(tensor.shape) == len(info.shape) and all(
                    given <= most for given, most in zip(tensor.shape, info.shape, strict=True)
                )
            else:
                fits = tensor.shape == info.shape
            if not fits or tensor.dtype != info.dtype or tensor.device != info.device:
                most = "at most " if net.dynamic else ""
                raise UserError(
                    f"{net.name} {kind}[{index}] ({info.name}) is {info.dtype} {most}{list(info.shape)} on device "
                    f"{info.device}; a tensor {tensor.dtype} {list(tensor.shape)} on device {tensor.device} was given."
                )
