"""What the compiler's own cycle model of BM1684X says of a net: an estimate, not a measurement.

The compiler writes `compiler_profile_0.txt` for each net: one line a command, then its summary.
"""

import re
from pathlib import Path

from helpers.bmodel.bmodel import Net
from helpers.compile.log import read_log
from helpers.nets import net_kind

PROFILE = "compiler_profile_0.txt"
FIGURES = ("bytes", "cycles", "ms", "ddr_bw", "flops")
FREQUENCY = 1.0e9  # as the cycle model's own "runtime" line assumes
_SUBNET = re.compile(r"^TCYC\s*:\s*(\d+).*?^DDR BW USAGE\s*:\s*([\d.eE+-]+)%", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(
    r"(?P<layer>\S+)\|\w+\|s:(?P<start>\d+)\|b:\d+\|g:\d+\|e:\d+\|t:(?P<cycles>\d+)(?:\|dr:\d+\|sz:(?P<bytes>\d+))?"
)
_FLOPS = re.compile(r"^flops:\s*(\d+)", re.MULTILINE)


def read_profile(path: str | Path, devices: int = 1) -> dict[str, int | float] | None:
    """cycles, ms (at 1 GHz), ddr_bw (percent of the memory bandwidth in use) and flops of one net.

    A net of several subnets has their cycles added up; devices that share it work at the same time, so the sum is
    divided by their number (what passes between them is not in it). None where the model says nothing: of a net whose
    shapes are dynamic, or that is one operator which the chip's scalar core runs (the TopK of greedy_head).
    """
    text = read_log(Path(path))
    subnets = [(int(cycles), float(usage)) for cycles, usage in _SUBNET.findall(text)]
    total = sum(count for count, _ in subnets)
    if not total:
        return None
    cycles = -(-total // devices)
    return {
        "cycles": cycles,
        "ms": round(cycles / FREQUENCY * 1e3, 6),
        "ddr_bw": round(sum(count * usage for count, usage in subnets) / total, 3),
        # Of the whole net, repeated for each subnet; nets that only move data have none.
        "flops": max(map(int, _FLOPS.findall(text)), default=0),
    }


def net_figures(net: Net, path: Path) -> dict[str, int | float | None]:
    """FIGURES of a compiled net: bytes of weights and instructions, and of its profile, where that has any."""
    size = {"bytes": net.weight_bytes + net.instruction_bytes}
    return dict.fromkeys(FIGURES) | size | (read_profile(path, net.devices) or {})


def commands(path: str | Path) -> list[dict]:
    """Every command of a net: layer (of the MLIR), start and cycles (of the cycle model), bytes that it moves.

    bytes is None for a command of the compute unit; the others are of the engine that moves data (GDMA).
    """
    return [
        {key: int(value) if value and value.isdigit() else value for key, value in match.groupdict().items()}
        for match in _COMMAND.finditer(Path(path).read_text(encoding="utf-8", errors="replace"))
    ]


def estimates(nets: dict[str, dict]) -> dict[str, float] | None:
    """first_token_ms and decode_ms of a whole model from its nets' records; None where one of them has no cycles.

    What the cycle model does not cover is not in it: launching nets, and the choice of the token from the logits.
    """

    def total(*kinds: str) -> float | None:
        chosen = [record.get("ms") for net, record in nets.items() if net_kind(net) in kinds]
        return None if not chosen or None in chosen else round(sum(chosen), 6)

    first = total("embedding", "block", "lm_head")
    decode = total("embedding_cache", "block_cache", "lm_head")
    return None if first is None or decode is None else {"first_token_ms": first, "decode_ms": decode}
