"""What compiling nets takes, from the bytes of their weights: seconds, memory and disk."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.compile import memory
from helpers.cost import Work
from helpers.nets import net_kind

# Bytes of a weight in a bmodel. A group of 64 has a scale and a zero point, 3 bytes together.
STORED = {"F32": 4, "BF16": 2, "W8BF16": 1 + 3 / 64, "W4BF16": 0.5 + 3 / 64}
BMODEL_BYTES = 5_600_000  # of a bmodel without weights: the library that the chip loads
# Measured on 2 cores with nets of 13 to 620 million weights: seconds of one core for the start of a compile server, for
# the kernels of a kind of block, a net, a million weights, a GB of what is combined; bytes that the front end takes.
_START, _KERNELS, _A_NET, _A_MILLION, _A_COMBINED_GB = 2.5, 2.0, 0.3, 0.09, 8.0
_FRONT_END = 150_000_000
FIRST = ("block_0", "block_cache_0")  # of each kind: they build kernels for those after them


@dataclass(frozen=True)
class Needs:
    """Of one net. memory, scratch: bytes of memory and of disk while it compiles. stays: bytes of its bmodel."""

    net: str
    seconds: float
    memory: int
    scratch: int
    stays: int


def needs_of(net: str, weight_bytes: int, quantize: str) -> Needs:
    """weight_bytes: of its ONNX, float32. quantize: of helpers.compile.options.net_settings."""
    million, stored = weight_bytes / 4e6, STORED[quantize] / 4
    # The weights as they come and as they are stored; a matrix that is quantised once more while that lasts, which
    # counts where a net is one matrix.
    copies = 1.5 + 3.6 * stored + (1.5 if net_kind(net).startswith("lm_head") and quantize.startswith("W") else 0)
    stays = int(BMODEL_BYTES + stored * weight_bytes)
    scratch = int((1 + stored) * weight_bytes) + stays
    return Needs(net, _A_NET + _A_MILLION * million, int(_FRONT_END + copies * weight_bytes), scratch, stays)


def work_of(
    what: str,
    folder: Path,
    nets: Sequence[Needs],
    at_once: int,
    there: int = 0,
    combined: int = 0,
    beside: int = 0,
    own: int = 0,
    start: float = 0,
) -> Work:
    """What it takes to compile nets in this order, and to combine them. Raises UserError where memory is too small.

    Bytes of disk: there, of earlier bmodels, which go when theirs come; combined, of the bmodel of all; beside, of what
    is made before. own: bytes of memory that this process takes beside. start: seconds before.
    """
    parts = {
        need.net: need.seconds + _START * (number < at_once) + _KERNELS * (need.net in FIRST)
        for number, need in enumerate(nets)
    }
    windows = [nets[i : i + at_once] for i in range(len(nets))]
    scratch = [_sum(nets[:i], "stays") + _sum(window, "scratch") for i, window in enumerate(windows)]
    if combined:
        # model_tool holds one net a second time while it combines.
        scratch.append(_sum(nets, "stays") + combined + max((need.stays for need in nets), default=0))
        parts["all nets combined"] = _A_COMBINED_GB * combined / 1e9
    # Nets that run at once do not reach their peaks at once.
    together = max(((_sum(window, "memory") + max(n.memory for n in window)) / 2 for window in windows), default=0)
    if nets:
        largest = max(nets, key=lambda need: need.memory)
        memory.require(largest.net, largest.memory, memory.budget())
        together = min(together, memory.budget())
    disk = max([*(peak - there for peak in scratch), combined, *(need.scratch for need in nets)], default=0)
    return Work(what, folder, parts, own + together, beside + disk, at_once=at_once, start=start)


def _sum(nets: Iterable[Needs], what: str) -> int:
    return sum(getattr(need, what) for need in nets)
