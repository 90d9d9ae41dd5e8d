"""Tensors as the device has them: dtypes, and bfloat16 on the host. numpy has no such type, it travels as uint16."""

import math
from dataclasses import dataclass

import numpy as np

# How each of the device's dtypes crosses to and from the host. numpy has no bfloat16: its bits cross as uint16.
HOST_DTYPE = {
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.uint16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
}
ADDR_MODES = ("basic", "io_alone")


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a net. `shape` is the largest that the net takes; `device` counts from 0."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: int = 0

    @property
    def bytes(self) -> int:
        """Device memory that it takes. dtype must be one of HOST_DTYPE."""
        return math.prod(self.shape) * HOST_DTYPE[self.dtype].itemsize


@dataclass(frozen=True)
class NetInfo:
    """A net of the bmodel. Position in `inputs` and `outputs` is the contract, the compiler may change names.

    addr_mode "io_alone": its inputs and outputs have memory of their own, at fixed addresses, that outlives a run,
    so a cache can simply be its input. "basic": they share the memory of intermediate results.
    """

    name: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    addr_mode: str
    dynamic: bool


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 values to bfloat16, to nearest even as the chip does.

    values: float32, any shape. Returns uint16 of the same shape: the upper halves of the float32 words.
    NaN stays NaN.
    """
    words = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def from_bf16(words: np.ndarray) -> np.ndarray:
    """Widen bfloat16 words (uint16, any shape) to float32 of the same shape, exactly."""
    return (np.ascontiguousarray(words).astype(np.uint32) << 16).view(np.float32)
