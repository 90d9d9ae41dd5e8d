"""How fast a model will be on BM1684X, and what it takes there, from the cycles of its nets.

    first token   = (embedding + layers · block + lm_head) / share of prefill
    further token = (embedding_cache + layers · block_cache + lm_head + passes · KV cache / bandwidth) / share of decode

The cycles are the compiler's, of a chip that never waits for anything but its memory. Three constants stand for what a
real one waits for beside. They are fitted on published measurements by `python -m benchmarks.fit_forecast`. A constant
for each net that the host starts was tried in place of the passes: the fit makes it 0.
"""

from dataclasses import dataclass
from pathlib import Path

from helpers.compile.profile import FREQUENCY
from helpers.errors import UserError
from helpers.forecast import figures
from helpers.forecast.shape import Shape

# Bytes that a program gets of 16 GB: on a card; on a board, unless its memory is divided otherwise than as delivered.
HOSTS = {"soc": 9_000_000_000, "pcie": 14_700_000_000}
# Bytes a second at which large loads of weights run in the cycle model (a profile prints 50.31, in GiB/s).
BANDWIDTH = 54.018 * FREQUENCY
KIND = "estimated"  # by the compiler's cycle model, and the constants


@dataclass(frozen=True)
class Constants:
    """prefill_share, decode_share: of the cycle model's speed, as chips reach it.

    cache_passes: how often a step moves all keys and values beside the once that the cycle model has.
    """

    prefill_share: float
    decode_share: float
    cache_passes: float


# As `python -m benchmarks.fit_forecast` prints them, with the factor that published figures lie off.
CONSTANTS = Constants(prefill_share=0.73, decode_share=0.89, cache_passes=1.6)
FIRST_TOKEN_SPREAD, TOKENS_SPREAD = 1.15, 1.25


@dataclass(frozen=True)
class Forecast:
    """A forecast in seconds, tokens a second and bytes over all devices.

    The intervals hold as many published measurements as the fit was off. first_token_parts, token_parts: seconds of
    {embedding, blocks, lm_head, the rest}. fits: {host: whether a device of it has room}.
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


def forecast(shape: Shape, constants: Constants = CONSTANTS, out: Path = figures.OUT) -> Forecast:
    """Forecast a shape; what of it is not known is compiled first (figures_of). Raises UserError."""
    nets = figures_of(shape, out)
    first = phase_seconds(shape, nets, "", constants.prefill_share)
    token = phase_seconds(shape, nets, "_cache", constants.decode_share, constants.cache_passes)
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
        fits={host: needed / shape.num_device <= room for host, room in HOSTS.items()},
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


def phase_seconds(
    shape: Shape, nets: dict, suffix: str, share: float = 1.0, cache_passes: float = 0.0
) -> dict[str, float]:
    """Seconds of prefill (suffix "") or of a decode step ("_cache"), by what they go into."""
    counts = {f"embedding{suffix}": 1, f"block{suffix}": shape.layers, "lm_head": 1}
    seconds = [count * nets[net]["cycles"] / FREQUENCY for net, count in counts.items()]
    cache = cache_passes * shape.cache_bytes / shape.num_device / BANDWIDTH
    waiting = (sum(seconds) + cache) / share - sum(seconds) - cache
    return dict(zip(("embedding", "blocks", "lm_head", "KV cache", "waiting"), [*seconds, cache, waiting], strict=True))


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
