"""How far one tensor is from another, and how far is still healthy: that depends on what the nets compute with."""

from dataclasses import dataclass

import numpy as np

from helpers.parity.chain import compare

# Normalised mean square error that rounding explains, by what the nets compute with. Measured on healthy models, the
# embedded one and small ones of random weights, and four times the worst that was seen:
# `pytest -s tests/unit/test_diagnose.py -k healthy` prints them.
LIMITS = {"float32": 1e-9, "bf16": 4e-4, "int8": 5e-4, "int4": 0.08}
# Up to ten times its limit a tensor is suspicious: a larger model, or larger activations, may be no more than that.
BROKEN = 10.0
# One column of many may be wrong, as where one row of weights is, and all together hide it. Of its own power, or of a
# mean column's where that is more, a column may have this many limits; the worst that was seen has 1.7.
COLUMN = 8.0
# Below this share of its limit it is as good as equal.
EXACT = 1e-3


@dataclass(frozen=True)
class Figures:
    """cosine; nmse: |found - expected|² / |expected|², infinite where not every value is finite; sqnr: dB.

    column: that of the worst column, over all rows.
    """

    cosine: float
    nmse: float
    column: float

    @property
    def sqnr(self) -> float:
        return float(-10 * np.log10(max(self.nmse, 1e-30)))

    def past(self, mode: str) -> bool:
        """Whether more than rounding is needed to explain it."""
        return self.nmse > LIMITS[mode] or self.column > COLUMN * LIMITS[mode]

    def band(self, mode: str) -> str:
        """exact, rounding, suspicious or broken, for a mode of LIMITS."""
        share = max(self.nmse, self.column / COLUMN) / LIMITS[mode]
        return next(
            (name for name, most in (("exact", EXACT), ("rounding", 1), ("suspicious", BROKEN)) if share <= most),
            "broken",
        )


def figures(found: np.ndarray, expected: np.ndarray) -> Figures:
    """Figures of two arrays of one shape; of token ids: equal or not."""
    found, expected = (np.asarray(array, dtype=np.float64) for array in (found, expected))
    if not np.isfinite(found).all():
        return Figures(0.0, float("inf"), float("inf"))
    columns = int(np.prod(expected.shape[2:])) if expected.ndim > 2 else expected.shape[-1]
    error, power = (np.square(array).reshape(-1, columns).sum(axis=0) for array in (found - expected, expected))
    if not power.any():
        return Figures(float(not error.any()), *[float("inf") if error.any() else 0.0] * 2)
    column = (error / np.maximum(power, power.mean())).max()
    return Figures(compare(found, expected)["cosine"], float(error.sum() / power.sum()), float(column))
