"""What is exported: a module a net, around the checkpoint's own block, norm and matrices.

Shapes: S compiled sequence length, T or R rows, H hidden size, h heads of size d, V vocabulary (see helpers.nets).
"""

from collections.abc import Iterator

import torch
from torch import nn

from helpers.checkpoint import modeling
from helpers.checkpoint.weights import Checkpoint
from helpers.nets import CANDIDATES, HEADS, INPUT_NAMES, net_kind, weight_group

# Candidates that survive top_p whatever their probability (documented penalty_sample_head).
MIN_TOKENS_TO_KEEP = 5


class Embedding(nn.Module):
    """ids [1,T] -> states [1,T,H]"""

    def __init__(self, wte: nn.Embedding):
        super().__init__()
        self.wte = wte

    def forward(self, input_ids):
        return self.wte(input_ids).float()


class Block(nn.Module):
    """states [1,S,H], positions [1,S], mask [1,1,S,S] -> states, key, value [1,S,h,d]

    With a past (key, value [1,S,h,d], mask [1,1,R,S+R]) the R new rows see it, and only
    their own key and value [1,R,h,d] come back.
    """

    def __init__(self, layer: nn.Module, cos: torch.Tensor, sin: torch.Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, states, position_ids, attention_mask, past_k=None, past_v=None):
        rotary = [self.cos[position_ids].unsqueeze(2), self.sin[position_ids].unsqueeze(2)]
        states, (key, value) = self.layer(
            states,
            rotary_pos_emb_list=[rotary],
            layer_past=None if past_k is None else (past_k, past_v),
            attention_mask=attention_mask,
            use_cache=True,
        )
        return states.float(), key.float(), value.float()


class LmHead(nn.Module):
    """states [R,H] -> logits [R,V]"""

    def __init__(self, ln_f: nn.Module, lm_head: nn.Linear):
        super().__init__()
        self.ln_f, self.lm_head = ln_f, lm_head

    def forward(self, states):
        return self.lm_head(self.ln_f(states)).float()


class LmHeadWithTopK(LmHead):
    """states [1,H] -> token [1,1]"""

    def forward(self, states):
        return torch.topk(super().forward(states), 1)[1]


class GreedyHead(nn.Module):
    """logits [R,V] -> token [R,1]"""

    def forward(self, logits):
        return torch.topk(logits, 1)[1]


class PenaltySampleHead(nn.Module):
    """logits [1,V], ids [1,S], top_p [1], temperature [1], penalty [1] -> probabilities [1,50], tokens [1,50]"""

    def __init__(self):
        super().__init__()
        weighed = torch.ones(1, CANDIDATES)
        weighed[0, :MIN_TOKENS_TO_KEEP] = 0
        self.register_buffer("weighed", weighed, persistent=False)

    def forward(self, logits, input_ids, top_p, temperature, penalty):
        seen = torch.gather(logits, 1, input_ids)
        seen = torch.where(seen < 0, seen * penalty, seen / penalty)
        logits = torch.scatter(logits, 1, input_ids, seen)
        logits, tokens = torch.topk(logits, CANDIDATES)
        logits = logits / temperature
        # 0 is under any top_p. A sum of truth values would say the same, but is no valid ONNX.
        inside = logits.softmax(dim=1).cumsum(dim=1) * self.weighed < top_p
        logits = torch.where(inside, logits, torch.tensor([-1000.0]))
        return logits.softmax(dim=1), tokens


def rotary_tables(head_dim: int, base: float, seq_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary embedding: float32 [S,d] each, as Qwen's RotaryEmbedding makes them."""
    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    freqs = torch.outer(torch.arange(seq_length).float(), inv_freq)
    table = torch.cat((freqs, freqs), dim=-1)
    return table.cos(), table.sin()


class NetBuilder:
    """Builds the modules of one checkpoint's nets, and inputs to trace them with."""

    def __init__(self, checkpoint: Checkpoint, seq_length: int):
        self.checkpoint, self.seq_length = checkpoint, seq_length
        self._code = modeling.load_modeling(checkpoint.path)
        self._config = modeling.make_config(self._code, checkpoint)

    def module(self, net: str) -> nn.Module:
        """The module that is exported as a net, in float32; its weights hold whatever the memory held."""
        # Importing transformers reads variables that load_modeling checks before.
        from transformers.initialization import no_init_weights

        with no_init_weights():  # so that their memory is never touched
            module = {
                "embedding": self._embedding,
                "embedding_cache": self._embedding,
                "block": self._block,
                "block_cache": self._block,
                "lm_head": lambda: LmHead(*self._norm_and_matrix()),
                "lm_head_with_topk": lambda: LmHeadWithTopK(*self._norm_and_matrix()),
                "greedy_head": GreedyHead,
                "penalty_sample_head": PenaltySampleHead,
            }[net_kind(net)]()
        return module.eval()

    def _embedding(self) -> Embedding:
        return Embedding(nn.Embedding(self.checkpoint.vocab_size, self.checkpoint.hidden_size))

    def _block(self) -> Block:
        layer = modeling.make_block(self._code, self._config)
        # Within the trained length Qwen's log-n scaling is exactly 1; but a decode step's key is padded to S + 1
        # rows, which the code would take for a longer text. Patch 06 takes it out of config.json, where it is in it.
        layer.attn.use_logn_attn = False
        return Block(layer, *rotary_tables(self.checkpoint.head_dim, self.checkpoint.rotary_base, self.seq_length))

    def _norm_and_matrix(self) -> tuple[nn.Module, nn.Linear]:
        c = self.checkpoint
        return self._code.RMSNorm(c.hidden_size, eps=c.eps), nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def example(self, net: str, rows: int = 1) -> tuple[torch.Tensor, ...]:
        """Inputs to trace a net with: zeros of the shapes of the net's contract (`rows`: R, new tokens at once)."""
        c, s, kind = self.checkpoint, self.seq_length, net_kind(net)
        past = (1, s, c.heads, c.head_dim)
        shapes = {
            "embedding": [(1, s)],
            "embedding_cache": [(1, rows)],
            "block": [(1, s, c.hidden_size), (1, s), (1, 1, s, s)],
            "block_cache": [(1, rows, c.hidden_size), (1, rows), (1, 1, rows, s + rows), past, past],
            "lm_head": [(rows, c.hidden_size)],
            "lm_head_with_topk": [(rows, c.hidden_size)],
            "greedy_head": [(rows, c.vocab_size)],
            "penalty_sample_head": [(1, c.vocab_size), (1, s), (1,), (1,), (1,)],
        }[kind]
        # torch gathers and scatters by int64 only.
        integers = {"input_ids": torch.int64 if kind in HEADS else torch.int32, "position_ids": torch.int32}
        inputs = zip(INPUT_NAMES[kind], shapes, strict=True)
        return tuple(torch.zeros(shape, dtype=integers.get(name, torch.float32)) for name, shape in inputs)


def checkpoint_prefixes(net: str) -> dict[str, str]:
    """Where a net's weights are in the checkpoint: prefix there to prefix in the exported module."""
    group = weight_group(net)
    if group.startswith("block_"):
        return {f"transformer.h.{group.removeprefix('block_')}.": "layer."}
    return {
        "embedding": {"transformer.wte.": "wte."},
        "lm_head": {"transformer.ln_f.": "ln_f.", "lm_head.": "lm_head."},
    }.get(group, {})


def read_weights(checkpoint: Checkpoint, net: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A net's weights, one at a time: name in the exported module, tensor in the checkpoint's dtype."""
    for theirs, ours in checkpoint_prefixes(net).items():
        for name, tensor in checkpoint.tensors(theirs):
            yield ours + name.removeprefix(theirs), tensor


def load_weights(module: nn.Module, checkpoint: Checkpoint, net: str) -> None:
    """Fill a net's module from the checkpoint, in float32. Raises UserError where a parameter is not in it."""
    for theirs, ours in checkpoint_prefixes(net).items():
        modeling.fill(module.get_submodule(ours.removesuffix(".")), checkpoint, theirs, torch.float32, "cpu")
