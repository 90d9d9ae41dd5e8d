"""Running one block of any revision, before and after patching, on the same weights and inputs."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from helpers.checkpoint.modeling import load_modeling, make_block, make_config

HIDDEN, HEADS, INNER = 32, 4, 40
HEAD_DIM = HIDDEN // HEADS
MASKED = -9984.0  # what the runtime writes in masked places

# Every key that some revision's code reads, for a model of one small layer.
SETTINGS = {
    **dict.fromkeys(("hidden_size", "n_embd"), HIDDEN),
    **dict.fromkeys(("num_attention_heads", "n_head"), HEADS),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 1),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size"), INNER),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("attn_dropout_prob", "attn_pdrop", "emb_dropout_prob", "embd_pdrop"), 0.0),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), 64),
    "kv_channels": HEAD_DIM,
    "seq_length": 32,
    "layer_norm_epsilon": 1e-6,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "params_dtype": "float32",
    "pos_emb": "rotary",
    "apply_residual_connection_post_layernorm": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "bias_dropout_fusion": True,
}


def make_small(folder: Path) -> None:
    """Give the code in `folder` a config.json for one small layer, in place of what it may have."""
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen", **SETTINGS}, indent=2))


def load_block(folder: Path) -> torch.nn.Module:
    """A QWenBlock of the code and configuration in `folder`, in float32, its weights drawn from a fixed seed."""
    module = load_modeling(folder)
    settings = json.loads((folder / "config.json").read_text())
    config = make_config(module, SimpleNamespace(config=settings))
    block = make_block(module, config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for _, parameter in sorted(block.named_parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return block


def rotation(positions: list[int]) -> list[torch.Tensor]:
    """Cosine and sine [1, T, 1, d] of the positions, as Qwen's own RotaryEmbedding makes them."""
    frequencies = 1.0 / (10000 ** (torch.arange(0, HEAD_DIM, 2).float() / HEAD_DIM))
    angles = torch.outer(torch.tensor(positions).float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)[None, :, None, :]
    return [angles.cos(), angles.sin()]


def original(block, states, past=None):
    """The unpatched block as its own model calls it: no padding, no mask but its own.

    states [1, T, H]; past: keys and values [1, P, h, d]. Returns states [1, T, H], keys and values [1, P + T, h, d].
    """
    parameters = inspect.signature(block.forward).parameters
    start = 0 if past is None else past[0].shape[1]
    turn = rotation(list(range(start, start + states.shape[1])))
    given = {"rotary_pos_emb_list": [turn], "rotary_pos_emb": turn}
    given["registered_causal_mask"] = torch.ones(64, 64).tril().bool()[None, None]
    given = {name: value for name, value in given.items() if name in parameters}
    if "rotary_pos_emb_list" in given:
        given.pop("rotary_pos_emb", None)
    states, present = block(states, layer_past=past, use_cache=True, **given)
    return states, *present


def exported(block, states, positions, mask, past=None):
    """The patched block as an exported net calls it."""
    states, present = block(
        states,
        rotary_pos_emb_list=[rotation(positions)],
        layer_past=past,
        attention_mask=mask,
        use_cache=True,
    )
    return states, *present


def prefill_mask(tokens: int, rows: int) -> torch.Tensor:
    """[1, 1, S, S]: row i sees up to and including i; rows of padding see nothing."""
    mask = torch.full((rows, rows), MASKED)
    mask[:tokens, :tokens] = torch.triu(torch.full((tokens, tokens), MASKED), diagonal=1)
    return mask[None, None]


def decode_mask(filled: int, rows: int) -> torch.Tensor:
    """[1, 1, 1, S + 1]: the filled rows and the new one, which is the last."""
    mask = torch.full((rows + 1,), MASKED)
    mask[:filled] = 0
    mask[-1] = 0
    return mask[None, None, None]


@dataclass(frozen=True)
class Agreement:
    """Largest absolute difference between original and patched block, in prefill and in decode."""

    prefill: float
    decode: float


def agreement(before, after, tokens: int, rows: int, steps: int = 3) -> Agreement:
    """Compare the original block on `tokens` tokens, unpadded, with the patched block padded to `rows`.

    Then `steps` decode steps: the original with a past of just the tokens so far, the patched one with a past of
    `rows` rows, those not yet written holding garbage. rows == tokens is the prefill without padding.
    """
    generator = torch.Generator().manual_seed(tokens)
    text = torch.randn(1, tokens + steps, HIDDEN, generator=generator)
    padded = torch.randn(1, rows, HIDDEN, generator=generator)
    padded[:, :tokens] = text[:, :tokens]
    expected = original(before, text[:, :tokens])
    found = exported(after, padded, [*range(tokens), *[0] * (rows - tokens)], prefill_mask(tokens, rows))
    prefill = _difference([x[:, :tokens] for x in found], expected)

    cache = [torch.randn(1, rows + steps, HEADS, HEAD_DIM, generator=generator) for _ in range(2)]
    for kept, new in zip(cache, found[1:], strict=True):
        kept[:, :tokens] = new[:, :tokens]
    decode = 0.0
    for position in range(tokens, min(tokens + steps, rows)):
        new = text[:, position : position + 1]
        expected = original(before, new, expected[1:])
        past = [kept[:, :rows] for kept in cache]
        found = exported(after, new, [position], decode_mask(position, rows), past)
        assert found[1].shape == (1, 1, HEADS, HEAD_DIM), f"a decode step returned {found[1].shape[1]} rows of key"
        for kept, row in zip(cache, found[1:], strict=True):
            kept[:, position : position + 1] = row
        decode = max(decode, _difference(found, [expected[0], *(rows[:, -1:] for rows in expected[1:])]))
    return Agreement(prefill, decode)


def _difference(found, expected) -> float:
    return max(float((f - e).abs().max()) for f, e in zip(found, expected, strict=True))
