"""What rounding costs: a model with its weights as the chip has them, against the same model in float32, on a text.

Layer by layer, all rows of the table at once, so that one layer of one row is in memory. The states between the
products stay in float32: it is the weights' rounding that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm

from helpers.calibrate.layers import HEAD, Layers, matrices
from helpers.calibrate.rounding import rounded
from helpers.checkpoint.weights import Checkpoint

_RESAMPLES = 500


class Figure(NamedTuple):
    """A figure and its standard error, from drawing the pieces of text anew (bootstrap)."""

    value: float
    error: float


@dataclass(frozen=True)
class Weights:
    """A row of the table: whose weights, in which mode. head_mode: of lm_head, where it is another."""

    label: str
    folder: str | Path
    mode: str
    head_mode: str | None = None


@dataclass
class Cost:
    """What one row lost. kl: Kullback-Leibler divergence of the next token's distribution, in nats, its mean and the
    value that 99.9 % of tokens stay under. same: share of tokens whose most likely next token is the same.

    own, accumulated: relative error of each block's output, where its inputs are right and where they are this row's.
    """

    label: str
    tokens: int = 0
    perplexity: Figure | None = None
    kl: Figure | None = None
    kl_999: Figure | None = None
    same: Figure | None = None
    own: list[float] = field(default_factory=list)
    accumulated: list[float] = field(default_factory=list)

    @property
    def worst_layer(self) -> tuple[int, float]:
        """The layer that adds most error itself, and the signal to that noise in dB."""
        layer = int(np.argmax(self.own))
        return layer, -20 * float(np.log10(max(self.own[layer], 1e-12)))


def evaluate(model_path: str | Path, rows: Sequence[Weights], pieces: torch.Tensor) -> list[Cost]:
    """The cost of each row against the checkpoint at model_path in float32; ids [pieces, T] are the text.

    The first cost is that checkpoint's own, whose divergence is 0. Raises UserError for what is no checkpoint.
    """
    golden = Layers(Checkpoint.open(model_path), pieces.shape[1])
    rounding = [Layers(Checkpoint.open(row.folder), pieces.shape[1]) for row in rows]
    costs = [Cost("float32"), *(Cost(row.label) for row in rows)]
    with torch.no_grad():
        states = golden.embed(pieces)
        found = [layers.embed(pieces).bfloat16().float() for layers in rounding]
        for i in tqdm(range(golden.checkpoint.layers), desc="evaluate", unit="layer"):
            prefix = f"transformer.h.{i}."
            after = golden.block(golden.weights(prefix), states)
            for j, (row, layers) in enumerate(zip(rows, rounding, strict=True)):
                weights = as_on_chip(layers.weights(prefix), row.mode)
                found[j] = layers.block(weights, found[j])
                costs[j + 1].own.append(relative_error(layers.block(weights, states), after))
                costs[j + 1].accumulated.append(relative_error(found[j], after))
            states = after
        logits = _head(golden)
        _compare(costs[0], pieces, states, logits, states, logits)
        for row, layers, cost, ours in zip(rows, rounding, costs[1:], found, strict=True):
            _compare(cost, pieces, ours, _head(layers, row.head_mode or row.mode), states, logits)
    return costs


def as_on_chip(weights: dict[str, torch.Tensor], mode: str) -> dict[str, torch.Tensor]:
    """Weights as the chip has them in a mode: what is no product's is in bfloat16 in each mode."""
    rounds = matrices(weights)
    return {name: rounded(weight, mode if name in rounds else "bf16") for name, weight in weights.items()}


def relative_error(found: torch.Tensor, golden: torch.Tensor) -> float:
    """Size of the error over that of what is right: states [pieces, T, H]. Each token counts alike."""
    ratio = (found - golden).square().sum(-1) / golden.square().sum(-1).clamp(min=1e-12)
    return float(ratio.mean().sqrt())


def _head(layers: Layers, mode: str | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
    """states [T, H] -> the logarithms of the next token's probabilities [T, V]. mode: None leaves it in float32."""
    weights = layers.weights("transformer.ln_f") | {f"{HEAD}.weight": layers.weights(HEAD)["weight"]}
    norm, matrix = (as_on_chip(weights, mode) if mode else weights).values()
    return lambda states: (layers.norm(states, norm) @ matrix.T).log_softmax(-1)


def _compare(cost: Cost, pieces: torch.Tensor, ours, our_head, golden, golden_head) -> None:
    kl, same, surprise = [], [], []
    for ids, state, right in zip(pieces, ours, golden, strict=True):
        found, expected = our_head(state), golden_head(right)
        kl.append((expected.exp() * (expected - found)).sum(-1).clamp(min=0))
        same.append((found.argmax(-1) == expected.argmax(-1)).float())
        surprise.append(-found[:-1].gather(1, ids[1:, None])[:, 0])
    kl, same, surprise = (torch.stack(values).double().numpy() for values in (kl, same, surprise))
    cost.tokens = pieces.numel()
    cost.kl, cost.same = _figure(kl, np.mean), _figure(same, np.mean)
    cost.kl_999 = _figure(kl, lambda values: np.quantile(values, 0.999))
    cost.perplexity = _figure(surprise, lambda values: np.exp(values.mean()))


def _figure(values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Figure:
    """values: [pieces, tokens]. Tokens of one piece are alike, so whole pieces are drawn."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(values), (_RESAMPLES, len(values)))
    return Figure(float(statistic(values)), float(np.std([statistic(values[draw]) for draw in draws])))


def table(costs: Iterable[Cost]) -> list[dict[str, str]]:
    """Rows for a table: a dict each, with uncertainties."""
    rows = []
    for cost in costs:
        layer, decibels = cost.worst_layer if cost.own else (None, None)
        rows.append(
            {
                "weights": cost.label,
                "perplexity": f"{cost.perplexity.value:.2f} ± {cost.perplexity.error:.2f}",
                "mean KL": f"{cost.kl.value:.4f} ± {cost.kl.error:.4f}",
                "99.9 % KL": f"{cost.kl_999.value:.2f} ± {cost.kl_999.error:.2f}",
                "same token": f"{100 * cost.same.value:.1f} ± {100 * cost.same.error:.1f} %",
                "tokens": str(cost.tokens),
                "worst layer": "" if layer is None else f"{layer} ({decibels:.1f} dB)",
            }
        )
    return rows
