"""The figures of parity: worst where they should be, and not of padding."""

import numpy as np
import pytest

from helpers.parity.chain import chained_parity, compare, parity


def test_a_difference_counts_whatever_its_sign():
    assert compare(np.array([1.0, -3.0]), np.array([1.0, 1.0])) == {
        "max_abs": 4.0,
        "cosine": pytest.approx(-2 / np.sqrt(20)),
    }
    assert compare(np.zeros(2), np.zeros(2)) == {"max_abs": 0.0, "cosine": 1.0}
    assert compare(np.zeros(2), np.ones(2)) == {"max_abs": 1.0, "cosine": 0.0}


def rows(*values):
    """[1,3,2]: three rows."""
    return np.array([[[value, 1.0] for value in values]])


@pytest.mark.parametrize("net, counted", [("embedding", False), ("block_0", False), ("block_cache_0", True)])
def test_the_worst_of_a_nets_outputs_counts_and_padding_does_not(net, counted):
    expected = [rows(1, 2, 3), rows(1, 2, 3), rows(1, 2, 3)]
    found = [rows(1, 2, 3), rows(1, 2.5, 3), rows(1, 2, 9)]

    class Nets:
        def run(self, name, *inputs):
            assert name == net and [i.tolist() for i in inputs] == [[5]]
            return found

    figures = parity({net: ([np.array([5])], expected)}, Nets(), tokens=2)[net]
    assert figures["max_abs"] == (6.0 if counted else 0.5)
    taken = slice(None) if counted else slice(2)
    pairs = [(f[:, taken], e[:, taken]) for f, e in zip(found, expected, strict=True)]
    assert figures["cosine"] == min(compare(f, e)["cosine"] for f, e in pairs) < 1
    chained = chained_parity({net: ([], found)}, {net: ([np.array([5])], expected)}, tokens=2)
    assert chained == {net: figures}
