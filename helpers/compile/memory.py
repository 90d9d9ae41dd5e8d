"""A gate that lets as many nets compile at once as fit into memory."""

import contextlib
import threading
from collections.abc import Iterator

from helpers import cost, machine


def budget() -> int:
    """Bytes of memory that nets may take together: most of what is free now."""
    return int(0.9 * machine.free_memory())


def require(net: str, need: int, free: int) -> None:
    """Raises UserError where a net needs more bytes of memory than there are."""
    remedy = "close other programs, add swap, or compile on a larger machine (--scheduler)"
    cost.require(f"Compiling {net}", need, "memory", free, remedy)


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
