"""The compiler's own rounding of weights to int8 and int4, in PyTorch, bit for bit.

A matrix [outputs, inputs] is cut into groups of 64 weights along its inputs. Each group has a scale (bfloat16) and a
zero point (8 bits, of which int4 uses 4). A weight is stored as code = round(weight / scale) + zero point, and what the
chip multiplies by is (code - zero point) * scale, in bfloat16. As TPU-MLIR 1.30.2 does it; a test compares the bytes of
its bmodels and its outputs on the simulator (tests/unit/test_rounding.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from helpers.compile.options import Q_GROUP_SIZE

BITS = {"int8": 8, "int4": 4}
# A group whose weights are all equal would have no scale.
_LEAST_RANGE = 1e-5


class Grid(NamedTuple):
    """What a group's codes mean: float32 tensors of one shape, an entry a group.

    divisor: the scale in float32, by which the compiler divides. scale: the same in bfloat16, as it is stored and as
    the chip multiplies. zero: the code of zero.
    """

    divisor: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def codes(self, weight: torch.Tensor, bits: int) -> torch.Tensor:
        """weight: float32, its groups in the last dimension -> codes, whole numbers in float32."""
        codes = round_half_away(weight / self.divisor[..., None]) + self.zero[..., None]
        return codes.clamp(0, 2**bits - 1)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """codes, groups in the last dimension -> what the chip multiplies by: float32 that bfloat16 can hold."""
        return ((codes - self.zero[..., None]) * self.scale[..., None]).bfloat16().float()


def round_half_away(values: torch.Tensor) -> torch.Tensor:
    """Round to the nearest whole number, halves away from zero, as C does. (torch rounds them to even.)"""
    whole = values.trunc()
    return whole + (values - whole).abs().ge(0.5) * values.sign()


def grid_between(least: torch.Tensor, greatest: torch.Tensor, bits: int) -> Grid:
    """The grid that the compiler takes for groups whose weights lie between these: float32, any one shape."""
    divisor = (greatest - least).clamp(min=_LEAST_RANGE) / (2**bits - 1)
    zero = (-round_half_away(least / divisor)).clamp(0, 2**bits - 1)
    return Grid(divisor, divisor.bfloat16().float(), zero)


def grouped(weight: torch.Tensor, size: int = Q_GROUP_SIZE) -> torch.Tensor:
    """[outputs, inputs] -> float32 [outputs, groups, size]. Raises ValueError where groups do not divide the inputs."""
    rows, columns = weight.shape
    if columns % size:
        raise ValueError(f"groups of {size} do not divide {columns} inputs")
    return weight.float().reshape(rows, columns // size, size)


def quantise(weight: torch.Tensor, bits: int, size: int = Q_GROUP_SIZE) -> tuple[torch.Tensor, Grid]:
    """What the compiler stores of a matrix [outputs, inputs]: codes [outputs, groups, size], and their grid."""
    groups = grouped(weight, size)
    grid = grid_between(groups.amin(-1), groups.amax(-1), bits)
    return grid.codes(groups, bits), grid


def rounded(weight: torch.Tensor, mode: str, size: int = Q_GROUP_SIZE) -> torch.Tensor:
    """A matrix as the chip multiplies by it in a mode (bf16, int8 or int4): float32 that bfloat16 can hold."""
    if mode not in BITS:
        return weight.bfloat16().float()
    codes, grid = quantise(weight, BITS[mode], size)
    return grid.values(codes).reshape(weight.shape)
