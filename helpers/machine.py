"""This machine as a process sees it: memory and cores, the limits of its container included; disk, tool versions."""

import contextlib
import math
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

TOOLS = ("tpu-mlir", "torch", "onnx", "onnxruntime", "transformers", "numpy")


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes of memory: what this process may still take without swapping, and what there is.

    The least of the machine's and of what each control group that the process is in (a container's, a job's) leaves.
    A group's page cache that was not used lately counts as free, as the kernel counts it for the machine.
    root: where proc and sys are.
    """
    text = (root / "proc/meminfo").read_text(encoding="utf-8")
    total, free = (int(re.search(rf"^{field}:\s+(\d+)", text, re.M)[1]) << 10 for field in ("MemTotal", "MemAvailable"))
    for group in _control_groups("memory", root):
        # Of cgroup v2, and of v1. A limit of "max" is none.
        for limit_file, used_file in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            limit, used = _number(group / f"memory.{limit_file}"), _number(group / f"memory.{used_file}")
            if limit is not None and used is not None:
                total, free = min(total, limit), min(free, max(0, limit - used + _idle_cache(group)))
    return free, total


def free_memory() -> int:
    """Bytes of memory that this process may still take."""
    return memory()[0]


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use at once: those it may run on, or the share of a container where that is less."""
    usable = len(os.sched_getaffinity(0))
    for group in _control_groups("cpu", root):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text(encoding="utf-8").split())
        if quota and period and quota > 0:
            usable = min(usable, math.ceil(quota / period))
    return max(1, usable)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups (v1 of this controller, v2) that this process is in, from its own upwards.

    In a container the path may be the host's, whose folders are not there: the uppermost is the container's own.
    """
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                mount = root / "sys/fs/cgroup" / (controller if controllers else "")
                own = mount / path.lstrip("/")
                yield from (group for group in (own, *own.parents) if group.is_relative_to(mount))


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _idle_cache(group: Path) -> int:
    try:
        text = (group / "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    # v1 counts the groups below in total_inactive_file only; v2 has one line for both.
    found = re.search(r"^total_inactive_file (\d+)", text, re.M) or re.search(r"^inactive_file (\d+)", text, re.M)
    return int(found[1]) if found else 0


def free_disk(path: str | Path) -> int:
    """Free bytes on the disk that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def tool_versions() -> dict[str, str]:
    """Installed versions of the tools that decide what an artefact contains, plus Python's."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def description() -> dict[str, object]:
    """Where an artefact was made: architecture, system, number of usable cores."""
    return {"architecture": platform.machine(), "system": platform.system(), "cores": cores()}


def log(message: str) -> None:
    """A line of progress for people: standard error, so that standard output stays machine-readable."""
    print(message, file=sys.stderr, flush=True)
