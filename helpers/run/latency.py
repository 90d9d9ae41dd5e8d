"""Where the time goes: the compiler's estimates, and measurements with warm-up, repetitions, median and p95.

Three kinds of time exist, and every record names its own: "measured" on a chip, "estimated" by the compiler's cycle
model, "simulator wall" time, which says nothing about the chip.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from helpers.run.engines.base import Engine
from helpers.run.generation import QwenRunner

KINDS = {
    "measured": "measured on a chip",
    "estimated": "estimated by the compiler's cycle model",
    "simulator wall": "simulator wall time, not the chip's",
}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in ms of repeated measurements in s, and how many there were."""
    if not len(seconds):
        return {"median_ms": 0.0, "p95_ms": 0.0, "count": 0}
    values = np.asarray(seconds) * 1e3
    return {
        "median_ms": round(float(np.median(values)), 4),
        "p95_ms": round(float(np.percentile(values, 95)), 4),
        "count": len(values),
    }


@contextlib.contextmanager
def timed_runs(engine: Engine, seconds: dict[str, list[float]]) -> Iterator[None]:
    """While active, the seconds of every net that an engine runs join those under its name."""
    run = engine.run

    def timed(net, inputs, outputs):
        started = time.perf_counter()
        run(net, inputs, outputs)
        seconds[net].append(time.perf_counter() - started)

    engine.run = timed
    try:
        yield
    finally:
        del engine.run  # the timed method hides the class's own


def measure(
    engine: Engine, prompt_lengths: Sequence[int], *, new_tokens: int = 4, warmup: int = 1, repetitions: int = 3
) -> dict:
    """Latency of prefill and decode over prompt lengths, whole and net by net.

    Returns {"kind", "warmup", "repetitions", "prompts": [{"tokens", "first_token": summary, "decode": summary}],
    "nets": {net: summary}}; all in ms. The tokens are arbitrary: neither net's time depends on them.
    Raises UserError where a prompt length does not fit S.
    """
    runner = QwenRunner(engine)
    record = {"kind": engine.kind_of_time, "warmup": warmup, "repetitions": repetitions, "prompts": []}
    nets: dict[str, list[float]] = defaultdict(list)
    for length in prompt_lengths:
        ids = [1 + i % 255 for i in range(length)]
        first, decode = [], []
        for _ in range(warmup):
            list(runner.generate(ids, max_new_tokens=1 + new_tokens))
        with timed_runs(engine, nets):
            for _ in range(repetitions):
                list(runner.generate(ids, max_new_tokens=1 + new_tokens))
                first.append(runner.timings.first_token_s)
                decode += runner.timings.decode_s
        record["prompts"].append({"tokens": length, "first_token": summary(first), "decode": summary(decode)})
    record["nets"] = {net: summary(seconds) for net, seconds in nets.items()}
    return record
