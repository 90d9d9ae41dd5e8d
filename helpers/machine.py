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


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """(free, total) bytes of memory: what this process may still take without swapping, and what there is.

    The least of the machine's and of what each control group that the process is in (a container's, a job's) leaves.
    A group's page cache that was not used lately counts as free, as the kernel counts it for the machine.
    """
    text = (root / "proc/meminfo").read_text(encoding="utf-8")
    total, free = (int(re.search(rf"^{field}:\s+(\d+)", text, re.M)[1]) << 10 for field in ("MemTotal", "MemAvailable"))
    for group in _control_groups("memory", root):
        # v1 counts the groups below in total_inactive_file only, which stands last; v2 has one line for both.
        idle = ["0", *re.findall(r"^(?:total_)?inactive_file (\d+)", _text(group / "memory.stat"), re.M)][-1]
        # Of cgroup v2, and of v1. A limit of "max" is none.
        for limit_file, used_file in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            limit, used = (_text(group / f"memory.{file}").strip() for file in (limit_file, used_file))
            if limit.isdecimal() and used.isdecimal():
                total, free = min(total, int(limit)), min(free, max(0, int(limit) - int(used) + int(idle)))
    return free, total


def free_memory() -> int:
    """Bytes of memory that this process may still take."""
    return memory()[0]


def cores(root: Path = Path("/")) -> int:
    """Cores that this process may use at once: those it may run on, or the share of a container where that is less."""
    usable = len(os.sched_getaffinity(0))
    for group in _control_groups("cpu", root):
        of_v1 = " ".join(_text(group / f"cpu.cfs_{what}_us") for what in ("quota", "period"))
        quota, period, *_ = [*(_text(group / "cpu.max") or of_v1).split(), "", ""]
        if quota.isdecimal():  # without a limit it is "max", or -1
            usable = min(usable, math.ceil(int(quota) / int(period)))
    return max(1, usable)


def _control_groups(controller: str, root: Path) -> Iterator[Path]:
    """Folders of the control groups (v1 of this controller, v2) that this process is in, from its own upwards.

    In a container the path may be the host's, whose folders are not there: the uppermost is the container's own.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / (controller if controllers else "")
            own = mount / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(mount))


def _text(file: Path) -> str:
    """What a file of the system says, nothing where it is not there."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def free_disk(path: str | Path) -> int:
    """Free bytes on the disk that holds `path` or its nearest existing parent."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def tool_versions() -> dict[str, str]:
    """Installed versions of the tools that decide what an artefact contains, plus Python's."""
    versions = {"python": platform.python_version()}
    for name in ("tpu-mlir", "torch", "onnx", "onnxruntime", "transformers", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def description() -> dict[str, object]:
    """Where an artefact was made: architecture, system, number of usable cores."""
    return {"architecture": platform.machine(), "system": platform.system(), "cores": cores()}


def log(message: str) -> None:
    """A line of progress for people: standard error, so that standard output stays machine-readable."""
    print(message, file=sys.stderr, flush=True)


_said: dict[str, object] = {}


def log_once(message: str) -> None:
    """Log a line, once a process: whichever thread comes first says it."""
    own = object()
    if _said.setdefault(message, own) is own:
        log(message)
