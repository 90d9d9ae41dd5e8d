"""An engine over numpy: a small random Qwen-like model behind the nets' contract, with R rows a decode step.

Memory is one array a tensor, views are numpy's own: what a runner writes where it should not is seen at once.
"""

import numpy as np

from helpers.run.engines.base import Engine
from helpers.tensors import HOST_DTYPE, NetInfo, TensorInfo, from_bf16, to_bf16


def rotate(x, positions):
    """Rotary embedding of [R,h,d] in pairs of halves, with d/2 angles a position."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / 10.0 ** np.arange(half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def rounded(x):
    """The nearest bfloat16 numbers, in float64."""
    return from_bf16(to_bf16(x.astype(np.float32))).astype(np.float64)


class RandomModel:
    """Weights of a causal transformer in float64: `layers` of attention with tanh after each, vocabulary V."""

    def __init__(self, vocabulary, seed, width=8, layers=2, heads=2):
        random = np.random.default_rng(seed)
        self.vocabulary, self.width, self.heads, self.head_dim = vocabulary, width, heads, width // heads
        self.embedding = random.normal(size=(vocabulary, width))
        self.layers = [random.normal(size=(4, width, width)) / 2 for _ in range(layers)]
        self.head = random.normal(size=(width, vocabulary))

    def layer(self, i, states, positions, mask, keys=None, values=None):
        """states [R,H], positions [R], mask [R,past+R] -> states [R,H], new key and value [R,h,d]."""
        wq, wk, wv, wo = self.layers[i]
        normed = states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + 1e-6)
        query, key, value = ((normed @ w).reshape(len(states), self.heads, self.head_dim) for w in (wq, wk, wv))
        # As on the chip a row is bfloat16 before anybody sees it, in the same step or from the cache.
        query, key, value = rotate(query, positions), rounded(rotate(key, positions)), rounded(value)
        keys = key if keys is None else np.concatenate([keys, key])
        values = value if values is None else np.concatenate([values, value])
        scores = np.einsum("rhd,khd->hrk", query, keys) + mask
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hrk,khd->rhd", scores, values).reshape(len(states), -1)
        return np.tanh(states + mixed @ wo), key, value


class NumpyEngine(Engine):
    """`model` compiled, as it were, for S = seq_length and `rows` new tokens a decode step.

    sample_head: what computes penalty_sample_head, where there is one (the fixture of that name).
    token_head: lm_head gives the token, as the documented lm_head_with_topk does, and there is no greedy_head.
    devices: how many share the heads of its blocks; head_devices: how many are given what lm_head reads.
    """

    name = "numpy"
    kind_of_time = "none"

    def __init__(self, model, seq_length, rows=1, sample_head=None, token_head=False, devices=1, head_devices=1):
        self.model, self.sample_head = model, sample_head
        s, r, w, v = seq_length, rows, model.width, model.vocabulary
        cache, new = ((1, length, model.heads // devices, model.head_dim) for length in (s, r))
        bf16 = "bfloat16"
        nets = {
            "embedding": ([((1, s), "int32")], [((1, s, w), bf16)], devices),
            "embedding_cache": ([((1, r), "int32")], [((1, r, w), bf16)], devices),
            "lm_head": ([((r, w), bf16)], [((r, 1), "int32") if token_head else ((r, v), "float32")], head_devices),
        }
        if not token_head:
            nets["greedy_head"] = ([((r, v), "float32")], [((r, 1), "int32")], 1)
        if sample_head:
            number, candidates = ((1,), "float32"), (1, 50)
            nets["penalty_sample_head"] = (
                [((1, v), "float32"), ((1, s), "int32"), number, number, number],
                [(candidates, "float32"), (candidates, "int32")],
                1,
            )
        for i in range(len(model.layers)):
            nets[f"block_{i}"] = (
                [((1, s, w), bf16), ((1, s), "int32"), ((1, 1, s, s), bf16)],
                [((1, s, w), bf16), (cache, bf16), (cache, bf16)],
                devices,
            )
            nets[f"block_cache_{i}"] = (
                [((1, r, w), bf16), ((1, r), "int32"), ((1, 1, r, s + r), bf16), (cache, bf16), (cache, bf16)],
                [((1, r, w), bf16), (new, bf16), (new, bf16)],
                devices,
            )
        infos = {
            net: NetInfo(
                net,
                *(tuple(TensorInfo("", *t, k) for k in range(count) for t in side) for side in sides),
                "io_alone",
                False,
            )
            for net, (*sides, count) in nets.items()
        }
        self._sharing = {net: count for net, (*_, count) in nets.items()}
        super().__init__(range(devices), infos, {}, 0)

    def _allocate(self, shape, dtype, device):
        return np.zeros(shape, HOST_DTYPE[dtype]).reshape(-1)

    def _view(self, tensor, offset_elements, shape):
        return tensor.memory[offset_elements : offset_elements + int(np.prod(shape))]

    def _write(self, tensor, values):
        tensor.memory[:] = values.reshape(-1)

    def _read(self, tensor):
        return tensor.memory.reshape(tensor.shape).copy()

    def _copy(self, source, target):
        target.memory[:] = source.memory

    def close(self):
        pass

    def _run(self, net, inputs, outputs):
        # A net reads its first input again after it has begun to write: a block adds to it what it computed.
        assert not np.shares_memory(inputs[0].memory, outputs[0].memory)
        arrays = [t.memory.reshape(t.shape) for t in inputs]
        arrays = [
            from_bf16(a).astype(np.float64) if t.dtype == "bfloat16" else a for t, a in zip(inputs, arrays, strict=True)
        ]
        count = self._sharing[net]
        parts = [arrays[k * len(arrays) // count : (k + 1) * len(arrays) // count] for k in range(count)]
        # Keys and values have their heads over the devices; everything else each of them has whole.
        whole = 3 if net.startswith("block") else len(parts[0])
        for part in parts[1:]:
            for a, b in zip(part[:whole], parts[0][:whole], strict=True):
                np.testing.assert_array_equal(a, b)
        merged = [np.concatenate(p, axis=2) for p in zip(*(part[whole:] for part in parts), strict=True)]
        results = self._compute(net, *parts[0][:whole], *merged)
        if net.startswith("block"):
            states, *new = results
            shares = [np.split(rows, count, axis=1) for rows in new]
            each = [result for k in range(count) for result in (states, *(share[k] for share in shares))]
        else:
            each = results * count
        for tensor, result in zip(outputs, each, strict=True):
            result = to_bf16(result.astype(np.float32)) if tensor.dtype == "bfloat16" else result
            tensor.memory[:] = result.astype(HOST_DTYPE[tensor.dtype]).reshape(-1)

    def _compute(self, net, *arrays):
        if net.startswith("embedding"):
            return [self.model.embedding[arrays[0]]]
        if net == "lm_head":
            logits = arrays[0] @ self.model.head
            return [logits if "greedy_head" in self.nets else logits.argmax(axis=-1)]
        if net == "greedy_head":
            return [arrays[0].argmax(axis=-1)]
        if net == "penalty_sample_head":
            return self.sample_head(*arrays)
        states, positions, mask, *past = arrays
        return self.model.layer(int(net.split("_")[-1]), states[0], positions[0], mask[0, 0], *(p[0] for p in past))
