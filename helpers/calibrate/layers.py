"""A first-generation Qwen layer by layer, on plain tensors: what goes into each product, and what comes out.

Only one layer's weights are in memory. T tokens a piece, H hidden size, h heads of size d, F inner size of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.nn import functional

from helpers.checkpoint.weights import Checkpoint
from helpers.errors import UserError
from helpers.export.modules import rotary_tables

# A block's products, in the order in which they run. w1 and w2 have one input.
PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
HEAD = "lm_head"
See = Callable[[str, torch.Tensor, torch.Tensor], None]


def _see_nothing(name: str, inputs: torch.Tensor, states: torch.Tensor) -> None:
    pass


class Layers:
    """The parts of a checkpoint as functions of their weights. eps, heads, rotation: as its config.json has them."""

    def __init__(self, checkpoint: Checkpoint, tokens: int):
        """tokens: T, of a piece."""
        self.checkpoint, self.eps = checkpoint, checkpoint.eps
        self.heads, self.head_dim = checkpoint.heads, checkpoint.head_dim
        self._cos, self._sin = rotary_tables(checkpoint.head_dim, checkpoint.rotary_base, tokens)

    def weights(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under a prefix such as `transformer.h.3`, in float32, by their names below it."""
        return {
            name.removeprefix(prefix).removeprefix("."): tensor.float()
            for name, tensor in self.checkpoint.tensors(prefix)
        }

    def embed(self, pieces: torch.Tensor) -> torch.Tensor:
        """ids [pieces, T] -> states [pieces, T, H]. Raises UserError where the vocabulary has ids the model lacks."""
        (_, table), *_ = self.checkpoint.tensors("transformer.wte.weight")
        if pieces.max() >= len(table):
            raise UserError(
                f"The vocabulary of {self.checkpoint.path} has id {int(pieces.max())}, its weights have {len(table)} "
                "ids: they are not of one model; take both from one repository."
            )
        return table[pieces].float()

    def norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm over the last dimension."""
        return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.eps) * weight

    def attend(self, mixed: torch.Tensor) -> torch.Tensor:
        """query, key and value [pieces, T, 3 h d], as c_attn gives them -> what goes into c_proj [pieces, T, h d]"""
        pieces, rows, _ = mixed.shape
        query, key, value = mixed.view(pieces, rows, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key = (x * self._cos[:rows] + _turned(x) * self._sin[:rows] for x in (query, key))
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return attended.transpose(1, 2).reshape(pieces, rows, -1)

    def block(self, weights: dict[str, torch.Tensor], states: torch.Tensor, see: See = _see_nothing) -> torch.Tensor:
        """states [pieces, T, H] -> states [pieces, T, H].

        see: called before each product with its name, what goes into it [pieces, T, inputs] and the states so far; it
        may still change the product's weights.
        """

        def product(name: str, inputs: torch.Tensor) -> torch.Tensor:
            see(name, inputs, states)
            return functional.linear(inputs, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        mixed = product("attn.c_attn", self.norm(states, weights["ln_1.weight"]))
        states = states + product("attn.c_proj", self.attend(mixed))
        inputs = self.norm(states, weights["ln_2.weight"])
        inner = product("mlp.w1", inputs) * functional.silu(product("mlp.w2", inputs))
        return states + product("mlp.c_proj", inner)


def _turned(heads: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def matrices(weights: Iterable[str]) -> list[str]:
    """Of these names those of the weights that int8 and int4 round: what a product multiplies by."""
    return [name for name in weights if name.removesuffix(".weight") in (*PRODUCTS, HEAD)]
