"""Rounding that compensates: the weights of a row that are still to be rounded make up for each one's error.

The method is GPTQ's (Frantar et al., 2022), with one addition: the grid is the compiler's. A group's least and greatest
weight are put on its two ends, so that the compiler's own round to nearest derives just this grid and just these codes.
"""

from __future__ import annotations

import torch

from helpers.calibrate.rounding import BITS, Grid, grid_between, quantise
from helpers.compile.options import Q_GROUP_SIZE

# Share of the mean of the Hessian's diagonal that is added to it. A few thousand tokens know little of many inputs:
# with 0.01, which is usual for a hundred thousand, the error on other text was larger.
DAMPING = 0.1
# Of a group's range, from which the grid is chosen. A narrower one has finer steps and cuts off what is outside.
_SHRINK = tuple(1 - 0.07 * step for step in range(6))
_ROWS = 8192
# Of int4, and its highest code. (In int8 rounding to nearest costs next to nothing.)
_BITS = BITS["int4"]
_TOP = 2**_BITS - 1


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor [K, K] of the inverse of a Hessian [K, K], which is damped in place.

    Its row j says how the error of column j is spread over the columns after it.
    """
    diagonal = hessian.diagonal()
    diagonal += DAMPING * float(diagonal.mean()) + 1e-10
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def compensate(weight: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a matrix [outputs, inputs] so that the errors of a row's weights cancel out for inputs of that Hessian.

    factor: of `inverse_factor`. Returns weights in dtype, of the same shape, that lie on the grid that the compiler
    derives from them: `quantise` finds them again, code for code. Raises RuntimeError where that is not so.
    """
    return torch.cat([_compensate(rows, factor, dtype) for rows in weight.float().split(_ROWS)])


def _compensate(weight: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    rest, found = weight.T.contiguous(), []  # [inputs, outputs]: a column is contiguous
    for start in range(0, len(rest), Q_GROUP_SIZE):
        end = start + Q_GROUP_SIZE
        group, spread = rest[start:end], factor[start:end, start:end]
        grid, ends = choose_grid(group.T, spread.diagonal().reciprocal().square(), dtype)
        codes, errors = torch.empty_like(group), torch.empty_like(group)
        for j in range(Q_GROUP_SIZE):
            code = grid.codes(group[j, :, None], _BITS)[:, 0]
            code = torch.where(ends[0] == j, 0, torch.where(ends[1] == j, _TOP, code))
            errors[j] = (group[j] - grid.values(code[:, None])[:, 0]) / spread[j, j]
            group[j + 1 :] -= spread[j, j + 1 :, None] * errors[j]
            codes[j] = code
        rest[end:] -= factor[start:end, end:].T @ errors
        found.append(_on_grid(codes.T, grid, dtype))
    emitted = torch.stack(found, dim=1)
    return emitted.reshape(weight.shape)


def _on_grid(codes: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """Weights [outputs, 64] in dtype that the compiler rounds to these codes on this grid."""
    least, greatest = _ends(grid.scale, grid.zero, dtype)
    values = torch.where(codes == 0, least[:, None], grid.values(codes))
    weights = torch.where(codes == _TOP, greatest[:, None], values).to(dtype)
    again, derived = quantise(weights, _BITS)
    pairs = (again[:, 0], codes), (derived.scale[:, 0], grid.scale), (derived.zero[:, 0], grid.zero)
    if not all(torch.equal(*pair) for pair in pairs):
        raise RuntimeError("the compiler would not find these codes again")
    return weights


def _ends(scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest weight of a grid, as dtype can hold them, in float32."""
    return (-zero * scale).to(dtype).float(), ((_TOP - zero) * scale).to(dtype).float()


def choose_grid(
    group: torch.Tensor, importance: torch.Tensor, dtype: torch.dtype
) -> tuple[Grid, tuple[torch.Tensor, torch.Tensor]]:
    """The grid of each row of a group [outputs, 64] that spoils least, and the columns [outputs] that hold its ends.

    importance: [64], what the square of an error of each column counts.
    """
    order = group.argsort(dim=1, stable=True)
    ends = order[:, 0], order[:, -1]
    least, greatest = group.amin(1), group.amax(1)
    smallest = max(torch.finfo(dtype).tiny, 1e-6)
    best = torch.full_like(least, torch.inf)
    chosen = [torch.zeros_like(least) for _ in Grid._fields]
    for shrink in _SHRINK:
        scale = (shrink * (greatest - least) / _TOP).clamp(min=smallest).bfloat16().float()
        for shift in (-1, 0, 1):
            zero = ((-shrink * least / scale).round() + shift).clamp(0, _TOP)
            grid = grid_between(*_ends(scale, zero, dtype), _BITS)
            codes = grid.codes(group, _BITS)
            codes.scatter_(1, ends[0][:, None], 0).scatter_(1, ends[1][:, None], _TOP)
            cost = ((grid.values(codes) - group).square() * importance).sum(1)
            # What rounding to dtype has moved off the grid cannot be asked for.
            settled = grid_between(*_ends(grid.scale, grid.zero, dtype), _BITS)
            cost[(settled.scale != grid.scale) | (settled.zero != grid.zero)] = torch.inf
            better = cost < best
            best = torch.where(better, cost, best)
            chosen = [torch.where(better, new, old) for new, old in zip(grid, chosen, strict=True)]
    return Grid(*chosen), ends
