"""Scales folded into what comes before a product: the same function, and weights that round better.

A product's input j is divided by s_j where it is made, and the weights that multiply it are taken times s_j. Rounding
then spares the columns whose inputs are large (activation-aware, Lin et al., 2023). In this layout no two heads share
their rows of c_attn, repeated keys and values neither, so each fold is exact.
"""

from __future__ import annotations

import torch

from helpers.calibrate.rounding import rounded

# What makes a product's inputs, and the products that they go into. ln_f is the one before lm_head.
FOLDS = {
    "ln_1": ("attn.c_attn",),
    "value": ("attn.c_proj",),
    "ln_2": ("mlp.w1", "mlp.w2"),
    "mlp.w1": ("mlp.c_proj",),
    "ln_f": ("lm_head",),
}
# Exponents of the inputs' mean size that are tried. 0 leaves everything as it is.
_EXPONENTS = tuple(step / 10 for step in range(10))
# Rows of a matrix on which they are tried: errors of rows are alike.
_SAMPLE = 512


def search_scales(products: list[torch.Tensor], inputs: torch.Tensor, hessian: torch.Tensor, mode: str) -> torch.Tensor:
    """The scales [K] with which these matrices [outputs, K] lose least by rounding to nearest.

    inputs: [tokens, K], of which only the mean size counts. hessian: [K, K], what the squares of errors count.
    """
    rows = torch.cat(products)
    rows = rows[:: max(1, len(rows) // _SAMPLE)]
    size = inputs.abs().mean(0).clamp(min=1e-8)
    best, least = torch.ones_like(size), torch.inf
    for exponent in _EXPONENTS:
        scales = (size.log() * exponent).sub((size.log() * exponent).mean()).exp().clamp(1e-3, 1e3)
        error = rounded(rows * scales, mode) / scales - rows
        if (loss := float(((error @ hessian) * error).sum())) < least:
            best, least = scales, loss
    return best


def fold(weights: dict[str, torch.Tensor], before: str, scales: torch.Tensor) -> None:
    """Divide what makes the inputs of FOLDS[before] by scales [K] and multiply the weights there: float32, in place."""
    for name in FOLDS[before]:
        weights[f"{name}.weight"] = weights[f"{name}.weight"] * scales
    if before == "value":
        # Of query, key and value only the last third; the first two stay.
        before, scales = "attn.c_attn", torch.cat((torch.ones(2 * len(scales)), scales))
    for name in (f"{before}.weight", f"{before}.bias"):
        if name in weights:
            weights[name] = weights[name] / (scales if weights[name].dim() == 1 else scales[:, None])


def order_inner(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> None:
    """Order the MLP's inner values by size, in place: what goes into mlp.c_proj, [tokens, F], and what makes it.

    The function is the same. But groups of c_proj's weights then hold columns that matter alike, and those that matter
    most are rounded first, when the most others are left to make up for them.
    """
    order = inputs.square().mean(0).argsort(descending=True)
    for name in ("mlp.w1.weight", "mlp.w1.bias", "mlp.w2.weight", "mlp.w2.bias"):
        if name in weights:
            weights[name] = weights[name][order]
    weights["mlp.c_proj.weight"] = weights["mlp.c_proj.weight"][:, order]
