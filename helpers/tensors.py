"""bfloat16 on the host: numpy has no such type, so it travels as uint16."""

import numpy as np


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
