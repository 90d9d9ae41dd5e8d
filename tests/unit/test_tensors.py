import numpy as np
import torch

from helpers.tensors import from_bf16, to_bf16


def test_rounding_is_pytorchs_for_every_kind_of_number():
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32)
    # Halfway between two bfloat16, the one below and the one above it, for every upper half.
    ties = np.arange(1 << 16, dtype=np.uint32) << 16
    words = np.concatenate([random, *(ties + lower for lower in (0, 0x7FFF, 0x8000, 0x8001))])
    values = words.view(np.float32)
    found, expected = to_bf16(values), torch.from_numpy(values).bfloat16()
    number = ~np.isnan(values)
    np.testing.assert_array_equal(found[number], expected.view(torch.int16).numpy().view(np.uint16)[number])
    assert number.sum() > 300_000 and np.isnan(from_bf16(found[~number])).all()


def test_what_is_bfloat16_already_stays():
    words = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values = from_bf16(words)
    assert values.shape == words.shape and values.dtype == np.float32
    number = ~np.isnan(values)
    np.testing.assert_array_equal(to_bf16(values)[number], words[number])
