"""What a piece of work takes: time, memory and disk; said and checked before it, measured beside it, kept afterwards.

The seconds said before are those of idle cores like the ones where the constants were measured. After the first part
they are scaled to this machine as it is. Nothing is refused because of them.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from helpers import machine
from helpers.errors import UserError

_EVERY = 0.1  # seconds between two looks at what is taken


@dataclass(frozen=True)
class Cost:
    """Wall time in seconds; bytes at the peak, beside what was taken when the work began."""

    seconds: float
    memory_bytes: int
    disk_bytes: int


class Work:
    """A prediction, and what the work then takes: `with work:` around it, `work.done(part)` after each part.

    parts: {part: seconds on idle cores} of what is still to do, `at_once` of them at the same time; start: seconds
    before them. memory, disk: bytes at the peak; nothing where no part is to do. folder: that grows.
    """

    def __init__(
        self,
        what: str,
        folder: Path,
        parts: dict[str, float],
        memory: float,
        disk: float,
        at_once: int = 1,
        start: float = 0.0,
    ) -> None:
        self.what, self.folder, self._parts, self._start = what, folder, parts, start
        seconds = start + max(sum(parts.values()) / at_once, *parts.values()) if parts else 0
        self.before = self.predicted = Cost(seconds, int(memory), int(disk)) if parts else Cost(0, 0, 0)
        self._log, self._over, self._others, self._disk = machine.log, threading.Event(), 0, 0

    def announce(self, more_memory: str, more_disk: str, log: Callable[[str], None] = machine.log) -> None:
        """Log what it needs. Raises UserError where memory or disk are not there, with what to do in each case."""
        self._log, need = log, self.before
        memory, disk = machine.free_memory(), machine.free_disk(self.folder)
        require(self.what, need.memory_bytes, "memory", memory, more_memory)
        require(self.what, need.disk_bytes, "disk", disk, more_disk, f" on the disk that holds {self.folder}")
        if self._parts:
            log(
                f"{self.what} needs {need.memory_bytes / 1e9:.1f} GB of memory ({memory / 1e9:.1f} free), "
                f"{need.disk_bytes / 1e9:.2f} GB of disk ({disk / 1e9:.1f} free), about {_span(need.seconds)} on "
                f"{machine.cores()} idle cores"
            )

    def done(self, part: str) -> None:
        """Say so of each part; after the first of several the prediction is that of this machine."""
        if part in self._parts and self.predicted is self.before and len(self._parts) > 1:
            slower = (time.monotonic() - self._began) / (self._start + self._parts[part])
            self.predicted = replace(self.before, seconds=self.before.seconds * slower)
            self._log(f"{self.what}: {part} is done; at this speed it takes {_span(self.predicted.seconds)} in all")

    def record(self) -> dict:
        """{predicted, taken: of a Cost each} for a manifest; {before} where the first part changed the prediction.

        Memory taken: of this process, at its peak; of what it started, resident memory of no file, at theirs (what a
        fork shares counts in each).
        """
        memory = _status("self", "VmHWM") - self._own + self._others
        taken = Cost(time.monotonic() - self._began, memory, max(self._disk, _size(self.folder) - self._size))
        costs = {"predicted": self.predicted, "taken": taken}
        costs |= {"before": self.before} if self.before != self.predicted else {}
        return {name: {key: round(value, 1) for key, value in asdict(cost).items()} for name, cost in costs.items()}

    def __enter__(self) -> "Work":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self._began, self._own, self._size = time.monotonic(), _status("self", "VmHWM"), _size(self.folder)
        self._watch = threading.Thread(target=self._look, args=(_started_by(os.getpid()),), daemon=True)
        self._watch.start()
        return self

    def _look(self, before: int) -> None:
        wait = _EVERY
        while not self._over.wait(wait):
            began = time.monotonic()
            self._others = max(self._others, _started_by(os.getpid()) - before)
            self._disk = max(self._disk, _size(self.folder) - self._size)
            wait = max(_EVERY, 20 * (time.monotonic() - began))  # in a folder with many other files

    def __exit__(self, *_) -> None:
        self._over.set()
        self._watch.join()


def require(what: str, need: float, kind: str, free: float, remedy: str, where: str = "") -> None:
    """Raises UserError where more bytes are needed than are free. kind: "memory" or "disk". remedy: what to do."""
    if need > free:
        needed, there = (f"{count / 1e9:.{1 if count >= 1e8 else 3}f}" for count in (need, free))
        raise UserError(f"{what} needs {needed} GB of {kind}, {there} GB are free{where}: {remedy}.")


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _status(process: int | str, field: str) -> int:
    """Bytes that the system says of a process; 0 where it has just ended."""
    with suppress(OSError):
        found = re.search(rf"^{field}:\s+(\d+)", Path(f"/proc/{process}/status").read_text(), re.M)
        return int(found[1]) << 10 if found else 0
    return 0


def _children(process: int) -> Iterator[int]:
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, file.read_text().split()):
                yield from (child, *_children(child))


def _started_by(process: int) -> int:
    return sum(_status(child, "RssAnon") for child in _children(process))


def _size(folder: Path) -> int:
    """Bytes of the files below a folder; one of several names counts once."""
    sizes = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it has just moved
                state = os.lstat(os.path.join(place, name))
                sizes[state.st_ino] = state.st_size
    return sum(sizes.values())
