"""The nets chained on the host as the chip chains them, with numpy arrays; and parity: how far two of them differ.

`HostChain` walks the contract of helpers.nets over anything that runs a net by name (helpers.parity.hosts). So patched
PyTorch, onnxruntime and (for per-net parity) the chip's own nets are compared on the very same inputs.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from helpers.nets import decode_mask, net_kind, prefill_mask


class HostChain:
    """Prefill and decode over `nets.run(net, *arrays)`, keys and values in numpy.

    `record` (when a dict is given) receives, per net, the inputs it was given and the outputs it gave: lists of arrays.
    """

    def __init__(self, nets, record: dict | None = None):
        self.nets, self.record = nets, record
        self.position = 0
        self.caches: list[list[np.ndarray]] = []

    def _run(self, net: str, *inputs: np.ndarray) -> list[np.ndarray]:
        outputs = self.nets.run(net, *inputs)
        if self.record is not None:
            self.record[net] = ([np.array(a) for a in inputs], [np.array(a) for a in outputs])
        return outputs

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after a prompt: float32 [V]."""
        count, seq_length = len(ids), self.nets.seq_length
        padded = np.zeros((1, seq_length), dtype=np.int32)
        padded[0, :count] = ids
        positions = np.zeros((1, seq_length), dtype=np.int32)
        positions[0, :count] = np.arange(count)
        mask = prefill_mask(count, seq_length)
        states = self._run("embedding", padded)[0]
        self.caches = []
        for i in range(self.nets.layers):
            states, key, value = self._run(f"block_{i}", states, positions, mask)
            self.caches.append([np.array(key), np.array(value)])
        self.position = count
        return self._run("lm_head", states[:, count - 1])[0].reshape(-1)

    def decode(self, token: int) -> np.ndarray:
        """Logits after one more token: float32 [V]."""
        position = np.array([[self.position]], dtype=np.int32)
        mask = decode_mask(self.position, self.nets.seq_length)
        states = self._run("embedding_cache", np.array([[token]], dtype=np.int32))[0]
        for i, (keys, values) in enumerate(self.caches):
            states, key, value = self._run(f"block_cache_{i}", states, position, mask, keys, values)
            keys[:, self.position], values[:, self.position] = key[:, 0], value[:, 0]
        self.position += 1
        return self._run("lm_head", states[:, 0])[0].reshape(-1)

    def greedy(self, ids: Sequence[int], stop_ids: Iterable[int], max_new_tokens: int | None = None) -> list[int]:
        """Greedy answer to a prompt, without its stop token, with the limits of QwenRunner.generate."""
        stop_ids, tokens = frozenset(stop_ids), []
        room = self.nets.seq_length - len(ids) + 1
        for _ in range(room if max_new_tokens is None else min(max_new_tokens, room)):
            logits = self.decode(tokens[-1]) if tokens else self.prefill(ids)
            token = int(logits.argmax())
            if token in stop_ids:
                break
            tokens.append(token)
        return tokens


def compare(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Largest absolute difference and cosine similarity of two float arrays of the same shape."""
    found, expected = (np.asarray(a, dtype=np.float64).reshape(-1) for a in (found, expected))
    norms = np.linalg.norm(found) * np.linalg.norm(expected)
    return {
        "max_abs": float(np.abs(found - expected).max()),
        "cosine": float(found @ expected / norms) if norms else float(np.array_equal(found, expected)),
    }


def parity(recorded: dict, nets, *, tokens: int) -> dict[str, dict[str, float]]:
    """Run each recorded net alone on its recorded inputs; compare outputs. `tokens`: rows that are not padding.

    recorded: from HostChain(record=...). Returns {net: {max_abs, cosine}}, the worst of a net's outputs.
    """
    return {net: _worst(net, nets.run(net, *inputs), expected, tokens) for net, (inputs, expected) in recorded.items()}


def chained_parity(found: dict, expected: dict, *, tokens: int) -> dict[str, dict[str, float]]:
    """Compare two chains' records of the same prompt and tokens, net by net: errors have travelled with the states."""
    return {net: _worst(net, found[net][1], outputs, tokens) for net, (_, outputs) in expected.items()}


def _worst(net: str, found: list[np.ndarray], expected: list[np.ndarray], tokens: int) -> dict[str, float]:
    rows = np.s_[:, :tokens] if net_kind(net) in ("block", "embedding") else ...
    figures = [compare(f[rows], e[rows]) for f, e in zip(found, expected, strict=True)]
    return {"max_abs": max(f["max_abs"] for f in figures), "cosine": min(f["cosine"] for f in figures)}
