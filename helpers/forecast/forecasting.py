"""How fast a model will be on BM1684X, and what it takes there, from the cycles of its nets.

    first token   = (embedding + layers · block + lm_head) / share of prefill
    further token = embedding_cache + layers · block_cache + lm_head + nets · launch + passes · KV cache / bandwidth

The cycles are the compiler's, of a chip that never waits for anything but its memory. Three constants stand for what a
real one waits for beside: the launch is that of the program on the host, in Python or in C++ (in prefill it is part of
the share). They are fitted on published measurements by `python -m benchmarks.fit_forecast`.
"""

from dataclasses import dataclass
from pathlib import Path

from helpers.compile.profile import FREQUENCY
from helpers.errors import UserError
from helpers.forecast import figures
from helpers.forecast.shape import HOSTS, Shape

# Bytes a second at which large loads of weights run in the cycle model (a profile prints 50.31, in GiB/s).
BANDWIDTH = 54.018 * FREQUENCY
KIND = "estimated"  # by the compiler's cycle model, and the constants


@dataclass(frozen=True)
class Constants:
    """prefill_share: of the cycle model's speed, as chips reach it in prefill.

    launch_s: {kind of program on the host: seconds that it takes to start a net of a decode step}.
    cache_passes: how often a step moves all keys and values beside the once that the cycle model has.
    """

    prefill_share: float
    launch_s: dict[str, float]
    cache_passes: float


PROGRAMS = ("python", "c++")
# As `python -m benchmarks.fit_forecast` prints them, with the factor that published figures lie off.
CONSTANTS = Constants(prefill_share=0.73, launch_s={"python": 0.00037, "c++": 0.0}, cache_passes=1.6)
FIRST_TOKEN_SPREAD, TOKENS_SPREAD = 1.2, 1.15


@dataclass(frozen=True)
class Forecast:
    """A forecast in seconds, tokens a second and bytes over all devices.

    The intervals are as wide as published measurements lie off that do not contradict others. first_token_parts,
    token_parts: seconds, as of phase_seconds. fits: {host: whether a device of it has room}.
    """

    first_token_s: float
    first_token_s_interval: tuple[float, float]
    tokens_per_s: float
    tokens_per_s_interval: tuple[float, float]
    device_bytes: int
    device_parts: dict[str, int]
    fits: dict[str, bool]
    first_token_parts: dict[str, float]
    token_parts: dict[str, float]
    kind: str = KIND


def forecast(
    shape: Shape, constants: Constants = CONSTANTS, out: Path = figures.OUT, program: str = "python"
) -> Forecast:
    """Forecast a shape; what of it is not known is compiled first (figures_of). Raises UserError.

    program: on the host, one of PROGRAMS.
    """
    nets = figures_of(shape, out)
    first, token = (phase_seconds(shape, nets, suffix, constants, program) for suffix in ("", "_cache"))
    first_s, token_s = sum(first.values()), sum(token.values())
    memory = device_parts(shape, nets)
    needed = sum(memory.values())
    return Forecast(
        first_token_s=first_s,
        first_token_s_interval=(first_s / FIRST_TOKEN_SPREAD, first_s * FIRST_TOKEN_SPREAD),
        tokens_per_s=1 / token_s,
        tokens_per_s_interval=(1 / token_s / TOKENS_SPREAD, TOKENS_SPREAD / token_s),
        device_bytes=needed,
        device_parts=memory,
        # A board has one device.
        fits={
            host: needed / shape.num_device <= room and (host != "soc" or shape.num_device == 1)
            for host, room in HOSTS.items()
        },
        first_token_parts=first,
        token_parts=token,
    )


def figures_of(shape: Shape, out: Path = figures.OUT) -> dict[str, dict]:
    """{kind of net: {cycles, weight_bytes, instruction_bytes, scratch_bytes}} of a model of this shape.

    What is not known is compiled, which takes minutes, and kept in `out`. Sizes in bytes, over all devices; cycles at
    1 GHz, of one device.
    Raises UserError where memory or disk do not suffice, or with what the compiler says.
    """
    there = figures.known(out)
    missing = [kind for kind in figures.KINDS if figures.key_of(kind, shape) not in there]
    if missing:
        # Only here: torch takes a second to import, and what is known is answered without.
        from helpers.forecast.compiling import compile_figures

        there |= compile_figures(shape, missing, out)
    found = {kind: there[figures.key_of(kind, shape)] for kind in figures.KINDS}
    if refused := [entry["error"] for entry in found.values() if "error" in entry]:
        raise UserError(f"The compiler does not take this shape: {refused[0]}")
    return found


def cycle_seconds(shape: Shape, nets: dict, suffix: str) -> dict[str, float]:
    """Seconds of the cycle model in prefill (suffix "") or in a decode step ("_cache"), by kind of net."""
    counts = {f"embedding{suffix}": 1, f"block{suffix}": shape.layers, "lm_head": 1}
    return {kind: count * nets[kind]["cycles"] / FREQUENCY for kind, count in counts.items()}


def phase_seconds(
    shape: Shape, nets: dict, suffix: str, constants: Constants = CONSTANTS, program: str = "python"
) -> dict[str, float]:
    """Forecast seconds of prefill (suffix "") or of a decode step ("_cache"), by what they go into."""
    parts = cycle_seconds(shape, nets, suffix)
    if suffix:
        parts["launches"] = (shape.layers + 2) * constants.launch_s[program]
        parts["KV cache"] = constants.cache_passes * shape.cache_bytes / shape.num_device / BANDWIDTH
    else:
        parts["waiting"] = sum(parts.values()) * (1 / constants.prefill_share - 1)
    return parts


def device_parts(shape: Shape, nets: dict) -> dict[str, int]:
    """Bytes of device memory by what they are for, over all devices. Nets that share weights have them once."""
    # The embedding that was compiled has fewer rows.
    embedding = nets["embedding"]["weight_bytes"] * shape.vocab_size // figures.EMBEDDING_ROWS
    each = {"block": shape.layers, "block_cache": shape.layers, "embedding": 1, "embedding_cache": 1, "lm_head": 1}
    return {
        "weights": embedding + shape.layers * nets["block"]["weight_bytes"] + nets["lm_head"]["weight_bytes"],
        "KV cache": shape.cache_bytes,
        "instructions": sum(count * nets[net]["instruction_bytes"] for net, count in each.items()),
        "scratch": max(net["scratch_bytes"] for net in nets.values()),  # one net runs at a time
    }
