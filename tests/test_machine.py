"""What a process may use: control groups as files that lie as the kernel shows them."""

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import torch

from kvbench.errors import InputError
from kvbench.machine import allowed_cores, free_cores, free_memory, limit_threads, room, use_threads

MIB = 2**20
UNLIMITED = "9223372036854771712"


def system(root: Path, own: str, groups: Mapping[str, Mapping[str, object]]) -> Path:
    """A root folder with /proc/self/cgroup and the files of each group in /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for group, files in groups.items():
        folder = root / "sys/fs/cgroup" / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")
    return root


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert room(tmp_path) == allowed_cores(tmp_path) == math.inf
    assert abs(free_memory(tmp_path) - psutil.virtual_memory().available) < 2000 * MIB


def test_version_2_counts_every_group_up_to_the_root(tmp_path: Path) -> None:
    stat = f"anon 1\nfile_mapped {10 * MIB}\ninactive_file {20 * MIB}\nactive_file {40 * MIB}"
    full: dict[str, object] = {"memory.current": 300 * MIB, "memory.stat": stat}
    groups: dict[str, dict[str, object]] = {
        "": {"cgroup.controllers": "cpu memory"},
        "slice": {**full, "memory.max": 430 * MIB, "memory.high": "max"},
        "slice/job": {**full, "memory.max": "max", "memory.high": "max"},
    }
    root = system(tmp_path, "0::/slice/job\n", groups)
    assert room(root) == (430 - 300 + 20 + 40 - 10) * MIB
    assert free_memory(root) == room(root)
    (tmp_path / "sys/fs/cgroup/slice/job/memory.high").write_text(f"{310 * MIB}\n")
    assert room(root) == (310 - 300 + 50) * MIB


@pytest.mark.parametrize("own", ["/docker/12ab", "/docker/12ab/../../other", "/"])
def test_version_1_in_a_container_shows_its_own_group(own: str, tmp_path: Path) -> None:
    """The path is the host's, and the group is mounted at the top."""
    stat = f"inactive_file 7\ntotal_inactive_file {30 * MIB}\ntotal_active_file 0"
    limits: dict[str, object] = {
        "memory.limit_in_bytes": 430 * MIB,
        "memory.usage_in_bytes": 400 * MIB,
    }
    quota: dict[str, object] = {"cpu.cfs_quota_us": 150000, "cpu.cfs_period_us": 100000}
    lines = f"4:memory:{own}\n2:cpu,cpuacct:{own}\n1:name=systemd:{own}\n0::{own}\n"
    groups: dict[str, dict[str, object]] = {
        "memory": {**limits, "memory.stat": stat},
        "cpu": quota,
    }
    root = system(tmp_path, lines, groups)
    assert room(root) == 60 * MIB
    assert allowed_cores(root) == 1.5


def test_a_group_without_a_limit_or_over_it(tmp_path: Path) -> None:
    limits: dict[str, object] = {
        "memory.limit_in_bytes": UNLIMITED,
        "memory.usage_in_bytes": 5 * MIB,
    }
    above: dict[str, object] = {
        "memory.limit_in_bytes": 10 * MIB,
        "memory.usage_in_bytes": 12 * MIB,
    }
    unlimited: dict[str, object] = {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}
    lines = "4:memory:/a/b\n2:cpu,cpuacct:/\n"
    root = system(tmp_path, lines, {"memory/a/b": limits, "memory/a": above, "cpu": unlimited})
    assert room(root) < 0
    assert free_memory(root) == 0
    assert allowed_cores(root) == math.inf


def quota(root: Path, text: str) -> Path:
    return system(root, "0::/slice/job\n", {"slice": {"cpu.max": text}, "slice/job": {}})


@pytest.fixture
def four_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """PyTorch has four threads at first, and all cores are free; the numbers set, one by one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr("kvbench.machine.free_cores", lambda: 4.0)
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    return threads


@pytest.mark.parametrize(
    ("text", "free", "threads"),
    [
        ("max 100000", 4.0, 4),
        ("max 100000", 3.6, 4),
        ("max 100000", 2.9, 3),
        ("max 100000", 0.0, 1),
        ("150000 100000", 4.0, 2),
        ("150000 100000", 1.0, 1),
        ("50000 100000", 4.0, 1),
        ("800000 100000", 4.0, 4),
    ],
)
def test_threads_are_no_more_than_the_free_cores_and_the_quota(
    text: str,
    free: float,
    threads: int,
    four_threads: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvbench.machine.free_cores", lambda: free)
    note = limit_threads.__wrapped__(quota(tmp_path, text))
    assert four_threads[-1] == threads
    assert note.startswith(f"{threads} of 4 threads are used" if threads < 4 else "")
    assert bool(note) == (threads < 4)


def test_the_user_says_how_many_threads(
    four_threads: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = quota(tmp_path, "50000 100000")
    with pytest.raises(InputError, match="5 threads are too many: this machine has 4 cores"):
        use_threads(5)
    use_threads(3)
    assert limit_threads.__wrapped__(root) == ""
    assert four_threads == [4, 3]


def test_free_cores_are_those_that_this_process_may_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds, percpu: [0.0, 100.0, 25.0, 0.0])
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda process: [1, 2])
    assert free_cores() == 0.75


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "5000 None"),
        ({"GOMP_SPINCOUNT": "7"}, "7 None"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "None PASSIVE"),
    ],
)
def test_threads_wait_briefly_unless_the_user_says_how(
    given: dict[str, str], expected: str
) -> None:
    code = "import os, kvbench; e = os.environ.get"
    code += "; print(e('GOMP_SPINCOUNT'), e('OMP_WAIT_POLICY'))"
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in names} | given
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == expected
