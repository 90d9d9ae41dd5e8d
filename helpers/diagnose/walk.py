"""A prompt and two more tokens through the nets of one rung, and what went into and came out of each net."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from helpers.nets import OUTPUT_NAMES, decode_mask, net_kind, prefill_mask
from helpers.parity.chain import HostChain
from helpers.parity.hosts import OriginalModel

# {(phase, net): (inputs, outputs)}, in the order in which they ran.
Record = dict[tuple[str, str], tuple[list[np.ndarray], list[np.ndarray]]]
PREFILL, DECODE, DECODE_AGAIN = PHASES = ("prefill", "decode", "second decode")


@dataclass(frozen=True)
class Text:
    """ids: of the prompt. fed: the two tokens that are decoded after it."""

    ids: Sequence[int]
    fed: Sequence[int]

    def rows(self, phase: str, net: str) -> slice:
        """Which rows of a net's outputs are no padding."""
        return slice(len(self.ids)) if phase == PREFILL and net != "lm_head" else slice(None)


def outputs_of(net: str, text: Text, phase: str, arrays: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """A net's outputs by their names, without padding."""
    rows = text.rows(phase, net)
    named = zip(OUTPUT_NAMES[net_kind(net)], arrays, strict=True)
    return [(name, array[:, rows] if array.ndim > 2 else array) for name, array in named]


def walk(nets, text: Text) -> Record:
    """Of anything that runs a net by its name (helpers.parity.hosts)."""
    chain, record = HostChain(nets), {}
    steps = [lambda: chain.prefill(text.ids), *(lambda token=token: chain.decode(token) for token in text.fed)]
    for phase, step in zip(PHASES, steps, strict=False):
        chain.record = {}
        step()
        record |= {(phase, net): arrays for net, arrays in chain.record.items()}
    return record


def walk_original(original: OriginalModel, ids: Sequence[int], seq_length: int) -> tuple[Record, Text]:
    """The same of the unpatched model, which has no nets: what the nets would be given, and ought to give.

    The tokens fed are its own two likeliest.
    """
    model, record, fed, past = original.model, {}, [], None
    count, layers = len(ids), len(original.model.transformer.h)
    caches: list[list[np.ndarray]] = []
    for phase in PHASES:
        new = list(ids) if phase == PREFILL else fed[-1:]
        taken: list[np.ndarray] = []
        parts = [model.transformer.wte, *model.transformer.h]
        hooks = [part.register_forward_hook(_keeper(taken)) for part in parts]
        try:
            with torch.no_grad():
                result = model(torch.tensor([new], device=original.device), past_key_values=past, use_cache=True)
        finally:
            for hook in hooks:
                hook.remove()
        past = result.past_key_values
        rows, start = (seq_length, 0) if phase == PREFILL else (1, count + len(fed) - 1)
        states, suffix = [_padded(state, rows) for state in taken], "" if phase == PREFILL else "_cache"
        positions = _padded(np.arange(start, start + len(new), dtype=np.int32)[None], rows)
        mask = prefill_mask(count, seq_length) if phase == PREFILL else decode_mask(start, seq_length)
        record[phase, f"embedding{suffix}"] = [_padded(np.array([new], dtype=np.int32), rows)], states[:1]
        for i in range(layers):
            key, value = (_array(part)[:, -len(new) :] for part in past[i][:2])
            inputs = [states[i], positions, mask, *([a.copy() for a in caches[i]] if caches and suffix else [])]
            record[phase, f"block{suffix}_{i}"] = inputs, [states[i + 1], _padded(key, rows), _padded(value, rows)]
            if phase == PREFILL:
                caches.append([_padded(key, rows), _padded(value, rows)])
            else:
                for cache, row in zip(caches[i], (key, value), strict=True):
                    cache[:, start] = row[:, 0]
        logits = result.logits[:, -1].float().cpu().numpy()
        record[phase, "lm_head"] = [taken[-1][:, -1]], [logits]
        fed.append(int(logits.argmax()))
    return record, Text(list(ids), fed[:2])


def _keeper(taken: list[np.ndarray]):
    return lambda part, given, output: taken.append(_array(output))


def _array(output) -> np.ndarray:
    tensor = output[0] if isinstance(output, tuple) else output
    return np.array(tensor.float().cpu().numpy())


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, [(0, 0), (0, rows - array.shape[1])] + [(0, 0)] * (array.ndim - 2))
