"""Memory and cores, the limits of containers included, over the files of cgroup v1 and v2."""

import os
from pathlib import Path

import pytest

from helpers import machine

GB = 1 << 30
MEMINFO = f"MemTotal:       {16 * GB >> 10} kB\nMemFree:  1 kB\nMemAvailable:   {12 * GB >> 10} kB\n"


@pytest.fixture
def system(tmp_path):
    def write(groups: str, files: dict[str, object]) -> Path:
        files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": groups} | files
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(content))
        return tmp_path

    return write


def v1(group: str, limit: int, used: int, idle: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup/memory{group}"
    stat = f"cache 7\ninactive_file 5\ntotal_inactive_file {idle}"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


def v2(group: str, limit: object, used: int, idle: int = 0) -> dict[str, object]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": limit,
        f"{folder}/memory.current": used,
        f"{folder}/memory.stat": f"anon 3\ninactive_file {idle}\nslab 1",
    }


UNLIMITED_V1 = 0x7FFFFFFFFFFFF000
V1, V2 = "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n", "0::/job/step\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {}, (12, 16)),
        (V1, v1("/docker/abc", 4 * GB, GB), (3, 4)),
        (V1, v1("", 4 * GB, GB), (3, 4)),  # the path is the host's; the container sees its own group at the top
        (V1, v1("/docker/abc", UNLIMITED_V1, GB), (12, 16)),
        (V1, v1("/docker/abc", 4 * GB, 4 * GB, idle=2 * GB), (2, 4)),
        (V1, v1("/docker/abc", 2 * GB, 3 * GB), (0, 2)),
        (V1, v1("/docker", 6 * GB, 5 * GB) | v1("/docker/abc", 4 * GB, GB), (1, 4)),
        (V2, v2("/job/step", 4 * GB, GB), (3, 4)),
        ("0::/\n", v2("", 4 * GB, GB), (3, 4)),
        (V2, v2("/job/step", "max", GB), (12, 16)),
        (V2, v2("/job", 8 * GB, 7 * GB, idle=GB) | v2("/job/step", "max", GB), (2, 8)),
        (V2, v2("/job/step", 32 * GB, GB), (12, 16)),
        ("4:memory:/a\n0::/a\n", v1("/a", 3 * GB, GB) | v2("/a", "max", 0), (2, 3)),
        ("3:cpu:/a\n", {"sys/fs/cgroup/cpu/a/memory.max": GB, "sys/fs/cgroup/cpu/a/memory.current": 0}, (12, 16)),
    ],
)
def test_memory_is_the_least_that_the_machine_and_its_groups_leave(system, groups, files, expected):
    free, total = machine.memory(system(groups, files))
    assert (free / GB, total / GB) == expected


def test_no_control_groups_at_all(system):
    root = system("", {})
    (root / "proc/self/cgroup").unlink()
    assert machine.memory(root) == (12 * GB, 16 * GB) and machine.cores(root) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (V2, {"sys/fs/cgroup/job/step/cpu.max": "250000 100000"}, 3),
        (V2, {"sys/fs/cgroup/job/step/cpu.max": "max 100000", "sys/fs/cgroup/job/cpu.max": "100000 100000"}, 1),
        (V2, {"sys/fs/cgroup/job/step/cpu.max": "5000 100000"}, 1),
        (V2, {"sys/fs/cgroup/job/step/cpu.max": "max 100000"}, 8),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": 200000, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000}, 2),
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1, "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000}, 8),
    ],
)
def test_cores_are_no_more_than_the_containers_share(system, monkeypatch, groups, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert machine.cores(system(groups, files)) == expected


def test_here_it_is_what_the_system_says():
    free, total = machine.memory()
    assert 0 < free <= total
    assert 1 <= machine.cores() <= len(os.sched_getaffinity(0))


def test_free_is_what_an_ordinary_user_may_still_write(tmp_path, monkeypatch):
    sizes = os.statvfs_result((4096, 4096, 1000, 500, 400, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: sizes)
    assert machine.free_disk(tmp_path / "not" / "there") == 400 * 4096
