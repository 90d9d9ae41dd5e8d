"""What the compiler's own cycle model of BM1684X says of a net: an estimate, not a measurement.

The compiler writes `compiler_profile_0.txt` for each net: one line a command, then its summary.
"""

import re
from pathlib import Path

from helpers.errors import UserError

PROFILE = "compiler_profile_0.txt"
# The frequency that the cycle model's own "runtime" line assumes.
FREQUENCY = 1.0e9
_SUMMARY = {
    "cycles": (re.compile(r"^TCYC\s*:\s*(\d+)", re.MULTILINE), int),
    "ddr_bw": (re.compile(r"^DDR BW USAGE\s*:\s*([\d.eE+-]+)%", re.MULTILINE), float),
    "flops": (re.compile(r"^flops:\s*(\d+)", re.MULTILINE), int),
}


def read_profile(path: str | Path) -> dict[str, int | float]:
    """cycles, ms (at 1 GHz), ddr_bw (percent of the memory bandwidth in use) and flops of one net.

    Raises UserError where the file is not such a profile.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): compile the net again.") from None
    profile: dict[str, int | float] = {}
    for key, (pattern, convert) in _SUMMARY.items():
        found = pattern.findall(text)
        if not found and key == "flops":
            # Nets that only move data have no such line.
            found = ["0"]
        if not found:
            raise UserError(f"{path} is not a compiler profile (it has no line for {key}): compile the net again.")
        profile[key] = convert(found[-1])
    return profile | {"ms": round(profile["cycles"] / FREQUENCY * 1e3, 6)}


def estimates(nets: dict[str, dict]) -> dict[str, float] | None:
    """first_token_ms and decode_ms of a whole model from its nets' records; None where a net has no cycles.

    First token: embedding, all blocks, the head. Decode: embedding_cache, all block_caches, the head. Dynamic nets
    have no profile. The head is lm_head and, where there is one, greedy_head.
    """

    def total(*kinds: str) -> float | None:
        chosen = [record.get("ms") for net, record in nets.items() if net in kinds or _kind(net) in kinds]
        return None if not chosen or None in chosen else round(sum(chosen), 6)

    head = ("lm_head", "greedy_head")
    first = total("embedding", "block", *head)
    decode = total("embedding_cache", "block_cache", *head)
    return None if first is None or decode is None else {"first_token_ms": first, "decode_ms": decode}


def _kind(net: str) -> str:
    head, _, number = net.rpartition("_")
    return head if number.isdigit() else net
