"""What memory a net takes to compile, what there is, and a gate that lets as many nets run as fit."""

import contextlib
import threading
from collections.abc import Iterator

from helpers import machine
from helpers.errors import UserError

# Peak memory of one net, measured at Qwen-7B's size: 1.7 GB for a block (0.81 GB of float32 weights), 7.5 GB for an
# embedding and 8.6 GB for lm_head (2.49 GB each). The base is the front end's own, with room to spare.
BASE = 500_000_000
PER_WEIGHT_BYTE = 3.3


def needed(weights_bytes: int) -> int:
    """Bytes of memory that compiling a net takes at its peak. weights_bytes: size of its ONNX with its weights."""
    return int(BASE + PER_WEIGHT_BYTE * weights_bytes)


def budget() -> int:
    """Bytes of memory that nets may take together: most of what is free now."""
    return int(0.9 * machine.free_memory())


def require(net: str, need: int, free: int) -> None:
    """Raises UserError where a net needs more bytes of memory than there are."""
    if need > free:
        raise UserError(
            f"Compiling {net} needs {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: close other programs, "
            "add swap, or compile on a larger machine (--scheduler)."
        )


class MemoryGate:
    """Lets as many nets compile at once as fit into so many bytes; by default, what is free when the first comes."""

    def __init__(self, free: int | None = None):
        self._free = free
        self._used = 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def room_for(self, net: str, need: int) -> Iterator[None]:
        """Wait until what a net needs fits beside what runs. Raises UserError where it never will."""
        with self._changed:
            if self._free is None:
                self._free = budget()
            require(net, need, self._free)
            self._changed.wait_for(lambda: self._used + need <= self._free)
            self._used += need
        try:
            yield
        finally:
            with self._changed:
                self._used -= need
                self._changed.notify_all()


gate = MemoryGate()  # of this process
