"""An engine over numpy: a small random Qwen-like model behind the nets' contract, with R rows a decode step.

Memory is one array a tensor, views are numpy's own: what a runner writes where it should not is seen at once.
"""

import numpy as np

from helpers.bf16 import from_bf16, to_bf16
from helpers.engines.base import (
    HOST_DTYPE,
    DeviceTensor,
    Engine,
    NetInfo,
    TensorInfo,
    check_allocation,
    check_copy,
    check_run,
    check_values,
    check_view,
)


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
    """

    name = "numpy"
    kind_of_time = "none"

    def __init__(self, model, seq_length, rows=1, sample_head=None):
        self.model, self.sample_head = model, sample_head
        s, r, w, v = seq_length, rows, model.width, model.vocabulary
        cache, new = (1, s, model.heads, model.head_dim), (1, r, model.heads, model.head_dim)
        nets = {
            "embedding": ([((1, s), "int32")], [((1, s, w), "bfloat16")]),
            "embedding_cache": ([((1, r), "int32")], [((1, r, w), "bfloat16")]),
            "lm_head": ([((r, w), "bfloat16")], [((r, v), "float32")]),
            "greedy_head": ([((r, v), "float32")], [((r, 1), "int32")]),
        }
        if sample_head:
            number, candidates = ((1,), "float32"), (1, 50)
            nets["penalty_sample_head"] = (
                [((1, v), "float32"), ((1, s), "int32"), number, number, number],
                [(candidates, "float32"), (candidates, "int32")],
            )
        bf16 = "bfloat16"
        for i in range(len(model.layers)):
            nets[f"block_{i}"] = (
                [((1, s, w), bf16), ((1, s), "int32"), ((1, 1, s, s), bf16)],
                [((1, s, w), bf16), (cache, bf16), (cache, bf16)],
            )
            nets[f"block_cache_{i}"] = (
                [((1, r, w), bf16), ((1, r), "int32"), ((1, 1, r, s + r), bf16), (cache, bf16), (cache, bf16)],
                [((1, r, w), bf16), (new, bf16), (new, bf16)],
            )
        infos = {
            net: NetInfo(net, *(tuple(TensorInfo("", *t) for t in side) for side in sides), "io_alone", False)
            for net, sides in nets.items()
        }
        super().__init__((0,), infos)
        self._own = {
            (net, side, index): self.allocate(info.shape, info.dtype)
            for net, described in infos.items()
            for side, tensors in (("in", described.inputs), ("out", described.outputs))
            for index, info in enumerate(tensors)
        }

    def input_tensor(self, net, index):
        return self._own[net, "in", index]

    def output_tensor(self, net, index):
        return self._own[net, "out", index]

    def allocate(self, shape, dtype, device=0):
        shape = check_allocation(shape, dtype)
        return DeviceTensor(shape, dtype, 0, np.zeros(shape, HOST_DTYPE[dtype]).reshape(-1))

    def view(self, tensor, offset_elements, shape):
        offset_elements, shape = check_view(tensor, offset_elements, shape)
        memory = tensor.memory[offset_elements : offset_elements + int(np.prod(shape))]
        return DeviceTensor(shape, tensor.dtype, 0, memory, tensor)

    def write(self, tensor, values):
        values = check_values(tensor, values)
        tensor.memory[:] = values.reshape(-1)
        self.bytes_to_device += values.nbytes

    def read(self, tensor):
        self.bytes_to_host += tensor.bytes
        return tensor.memory.reshape(tensor.shape).copy()

    def copy(self, source, target):
        check_copy(source, target)
        target.memory[:] = source.memory

    def close(self):
        pass

    def run(self, net, inputs, outputs):
        check_run(self.nets[net], inputs, outputs)
        arrays = [t.memory.reshape(t.shape) for t in inputs]
        arrays = [
            from_bf16(a).astype(np.float64) if t.dtype == "bfloat16" else a for t, a in zip(inputs, arrays, strict=True)
        ]
        for tensor, result in zip(outputs, self._compute(net, *arrays), strict=True):
            result = to_bf16(result.astype(np.float32)) if tensor.dtype == "bfloat16" else result
            tensor.memory[:] = result.astype(HOST_DTYPE[tensor.dtype]).reshape(-1)

    def _compute(self, net, *arrays):
        if net.startswith("embedding"):
            return [self.model.embedding[arrays[0]]]
        if net == "lm_head":
            return [arrays[0] @ self.model.head]
        if net == "greedy_head":
            return [arrays[0].argmax(axis=-1)]
        if net == "penalty_sample_head":
            return self.sample_head(*arrays)
        states, positions, mask, *past = arrays
        return self.model.layer(int(net.split("_")[-1]), states[0], positions[0], mask[0, 0], *(p[0] for p in past))
