"""The contract of the nets, between the export, the compiler and the runtime: what they are called and what they take.

L layers, S compiled sequence length, H hidden size, h heads, d head size, V vocabulary, R new rows of a decode step
(1; more for lookahead). Position is the contract: the compiler may change the tensors' names.

    embedding        ids [1,S]                                                     -> states [1,S,H]
    block_i          states [1,S,H], positions [1,S], mask [1,1,S,S]               -> states, key, value [1,S,h,d]
    embedding_cache  ids [1,R]                                                     -> states [1,R,H]
    block_cache_i    states [1,R,H], positions [1,R], mask [1,1,R,S+R], key, value -> states, key, value [1,R,h,d]
    lm_head          states [R,H]                                                  -> logits [R,V], or a token id
    greedy_head      logits [R,V]                                                  -> token [R,1]
    penalty_sample_head  logits, ids [1,S], top_p, temperature, penalty            -> probabilities, tokens [1,50]

`block_i` and `block_cache_i` have the same weights: one for the prompt (prefill), one for each further token (decode).
A bmodel for several devices has these tensors once a device, device by device, with h split over the devices.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from helpers.errors import UserError
from helpers.tensors import NetInfo

# What a masked place has in the mask. A row that is masked whole, as those of the padding are, would be 0 / 0 in a
# softmax over minus infinity; over a finite number it is only of no use. In bfloat16 it is the bits 0xC61C.
MASKED = -9984.0
# penalty_sample_head returns this many candidates, sorted by probability (its export: top_k = 50).
CANDIDATES = 50

_TENSORS = {
    "embedding": (["input_ids"], ["input_states"]),
    "embedding_cache": (["input_ids"], ["input_states"]),
    "block": (["input_states", "position_ids", "attention_mask"], ["hidden_states", "past_k", "past_v"]),
    "block_cache": (
        ["input_states", "position_ids", "attention_mask", "history_k", "history_v"],
        ["hidden_states", "past_k", "past_v"],
    ),
    "lm_head": (["hidden_states"], ["m_logits"]),
    "lm_head_with_topk": (["hidden_states"], ["token"]),
    "greedy_head": (["m_logits"], ["token"]),
    "penalty_sample_head": (["m_logits", "input_ids", "top_p", "temperature", "penalty"], ["probs", "token"]),
}
INPUT_NAMES, OUTPUT_NAMES = ({kind: names[side] for kind, names in _TENSORS.items()} for side in (0, 1))
HEADS = ("greedy_head", "penalty_sample_head")
# The exported head that gives a token without a net for logits: lm_head where there are several devices.
TOPK_HEAD = "lm_head_with_topk"


def prefill_mask(tokens: int, seq_length: int) -> np.ndarray:
    """Additive attention mask of a prompt: float32 [1,1,S,S], 0 where row i may see column j, else -9984.

    Row i < tokens sees columns 0..i. Rows of the padding see nothing: what they compute is never read.
    """
    mask = np.full((seq_length, seq_length), MASKED, dtype=np.float32)
    mask[:tokens, :tokens][np.tril_indices(tokens)] = 0
    return mask[None, None]


def decode_mask(position: int, seq_length: int) -> np.ndarray:
    """Additive attention mask of one new token: float32 [1,1,1,S+1]; it sees rows 0..position-1 and itself (last)."""
    mask = np.full(seq_length + 1, MASKED, dtype=np.float32)
    mask[:position] = 0
    mask[seq_length] = 0
    return mask[None, None, None]


def net_kind(net: str) -> str:
    """`block_cache_3` -> `block_cache`."""
    head, _, tail = net.rpartition("_")
    return head if tail.isdecimal() else net


def weight_group(net: str) -> str:
    """The net whose weights a net has: `block_cache_3` -> `block_3`, `embedding_cache` -> `embedding`."""
    return net.replace("_cache", "").removesuffix("_with_topk")


def count_layers(nets: Iterable[str]) -> int:
    """L, of a model whose nets have these names: one more than the highest block, but no more than there are names."""
    names = list(nets)
    # Of a damaged file a number may have any number of digits; Python refuses to read over 4300.
    numbers = [int(net[6:15]) for net in names if net_kind(net) == "block" and net[6:].isdecimal()]
    return min(1 + max(numbers, default=-1), len(names))


def needed_nets(layers: int, heads: Iterable[str] = ()) -> list[str]:
    """The nets without which there is no chat, in the order in which a bmodel has them; of one layer at least."""
    blocks = [f"{kind}_{i}" for i in range(max(layers, 1)) for kind in ("block", "block_cache")]
    return ["embedding", "embedding_cache", "lm_head", *heads, *blocks]


def phase_nets(layers: int, nets: Iterable[str]) -> dict[str, list[str]]:
    """The nets that run, in order, for the first token ("prefill") and for each further one ("decode")."""
    heads = [net for net in ("lm_head", "greedy_head") if net in nets]
    return {
        "prefill": ["embedding", *(f"block_{i}" for i in range(layers)), *heads],
        "decode": ["embedding_cache", *(f"block_cache_{i}" for i in range(layers)), *heads],
    }


def net_groups(layers: int, rows: int = 1) -> dict[str, list[str]]:
    """What is exported, by the weights that nets share: {group: its nets, in the order they are exported}.

    Nets that decode several rows at once are greedy: they have no head to sample with.
    """
    groups = {"embedding": ["embedding", "embedding_cache"]}
    groups |= {f"block_{i}": [f"block_{i}", f"block_cache_{i}"] for i in range(layers)}
    if rows > 1:
        return groups | {"lm_head": ["lm_head"], "greedy_head": ["greedy_head"]}
    return groups | {"lm_head": ["lm_head", TOPK_HEAD]} | {head: [head] for head in HEADS}


@dataclass(frozen=True)
class QwenShape:
    """What the nets of a bmodel say of the model.

    heads: h on one device. rows: R. token_head: lm_head gives a token, not logits. sampling: there is a
    penalty_sample_head.
    """

    layers: int
    seq_length: int
    hidden_size: int
    heads: int
    head_dim: int
    rows: int
    token_head: bool
    sampling: bool

    def cache_bytes(self, devices: int = 1) -> int:
        """Bytes of all keys and values in bfloat16."""
        return 2 * 2 * self.layers * self.seq_length * self.heads * self.head_dim * devices


def qwen_shape(nets: Mapping[str, NetInfo], where: object) -> QwenShape:
    """The model that the nets describe, checked against the contract. where: the bmodel's name, for messages.

    Raises UserError where a net is missing, or has other inputs or outputs.
    """

    def refusal(what: str) -> UserError:
        return UserError(f"{where} {what}: it is not a whole Qwen model, compile it again.")

    layers = count_layers(nets)
    needed = needed_nets(layers)
    if missing := [net for net in needed if net not in nets]:
        raise refusal(f"lacks the net {', '.join(missing[:4])} and has {', '.join(list(nets)[:6])}")
    head = nets["lm_head"].outputs
    token_head = bool(head) and head[0].dtype == "int32"
    if not token_head and "greedy_head" not in nets:
        raise refusal("lacks the net greedy_head, and its lm_head gives logits")
    for net in needed:
        info, kind = nets[net], net_kind(net)
        devices = {tensor.device for tensor in (*info.inputs, *info.outputs)}
        found, wanted = (len(info.inputs), len(info.outputs)), (len(INPUT_NAMES[kind]), len(OUTPUT_NAMES[kind]))
        if len(devices) == 1 and found != wanted:
            raise refusal(f"has a net {net} of {found} inputs and outputs, not {wanted}")
    try:
        states = nets["block_0"].inputs[0].shape
        past = next(t.shape for t in nets["block_cache_0"].inputs if len(t.shape) == 4 and t.shape[1] > 1)
        shape = QwenShape(
            layers=layers,
            seq_length=states[1],
            hidden_size=states[2],
            heads=past[2],
            head_dim=past[3],
            rows=nets["block_cache_0"].inputs[0].shape[1],
            token_head=token_head,
            sampling="penalty_sample_head" in nets,
        )
    except (IndexError, StopIteration):
        raise refusal("has blocks whose inputs are not states [1,S,H] and caches [1,S,h,d]") from None
    if past[1] != shape.seq_length or shape.heads * shape.head_dim < 1:
        raise refusal(f"has a prefill of {shape.seq_length} rows and a cache of {past[1:]}")
    return shape
