"""What this process may use of the machine: cores, threads and memory.

A container or a batch system limits both by control groups (cgroups) of Linux, version 1 or 2.
Every group from the process's own up to the root may hold a limit, and all of them count.
"""

import math
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from kvbench.errors import InputError

ROOT = Path("/")
SECONDS_WATCHED = 0.2  # of other work; the kernel counts hundredths


def use_threads(count: int) -> None:
    """Let PyTorch use `count` threads on the CPU, in this process from now on.

    InputError for more threads than the machine has cores.
    """
    if count > (cores := os.cpu_count() or count):
        raise InputError(f"{count} threads are too many: this machine has {cores} cores")
    os.environ["OMP_NUM_THREADS"] = str(count)
    if "torch" in sys.modules:  # else it reads the number when it is imported
        sys.modules["torch"].set_num_threads(count)


@cache
def limit_threads(root: Path = ROOT) -> str:
    """Lower the number of PyTorch's threads, if nobody has chosen it, to the cores that are free.

    PyTorch takes every core that the process may run on. Threads that share cores with other work
    wait for each other, and are then slower than one thread. The control groups count as well, and
    a process decides once. Returns a note for the user, empty if nothing was lowered.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1 or os.environ.get("OMP_NUM_THREADS"):
        return ""
    allowed = max(1, math.ceil(min(allowed_cores(root), threads)))
    free = max(1, min(allowed, round(free_cores())))
    if free == threads:
        return ""
    torch.set_num_threads(free)
    why = "other work is busy" if free < allowed else "a control group allows no more"
    return f"{free} of {threads} threads are used, because {why} (--threads chooses the number)"


def free_cores() -> float:
    """How many of the cores that this process may run on are idle, watched for a moment."""
    import psutil

    busy = psutil.cpu_percent(SECONDS_WATCHED, percpu=True)
    try:
        cores = psutil.Process().cpu_affinity()
    except AttributeError:  # macOS has none
        cores = list(range(len(busy)))
    return sum(1 - busy[core] / 100 for core in cores if core < len(busy))


def allowed_cores(root: Path = ROOT) -> float:
    """Cores' worth of time that the control groups give this process; infinite without a limit."""
    least = math.inf
    for folder in groups("cpu", root):
        texts = read(folder / "cpu.max").split()  # version 2: "200000 100000" or "max 100000"
        texts = texts or [read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        quota, period = (number(text) for text in (*texts, "", "")[:2])
        if 0 < quota < math.inf and 0 < period < math.inf:
            least = min(least, quota / period)
    return least


def free_memory(root: Path = ROOT) -> int:
    """Bytes that this process may still take: of the machine's, and of each control group's."""
    import psutil

    return max(0, int(min(psutil.virtual_memory().available, room(root))))


def room(root: Path = ROOT) -> float:
    """Bytes that are left in the fullest control group; infinite without a limit.

    Pages of files count as free, because the kernel drops them before it kills a process, but not
    those that processes have mapped, such as libraries.
    """
    least = math.inf
    for folder in groups("memory", root):
        limits = ("memory.max", "memory.high", "memory.limit_in_bytes")
        limit = min(number(read(folder / name)) for name in limits)
        used = number(read(folder / "memory.current") or read(folder / "memory.usage_in_bytes"))
        if limit == math.inf or used == math.inf:
            continue
        lines = (line.split() for line in read(folder / "memory.stat").splitlines())
        stat = {words[0]: int(words[1]) for words in lines if len(words) == 2}
        files, mapped = (
            sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in names)
            for names in (("inactive_file", "active_file"), ("file_mapped", "mapped_file"))
        )
        dropped = max(0, files - mapped) + stat.get("slab_reclaimable", 0)
        least = min(least, limit - max(0, used - dropped))
    return least


def groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The folders of this process's control group and of those above it that have `controller`."""
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        folder = mount / path.lstrip("/")
        # In a container the path may be the host's: its group is then what is mounted.
        if ".." in folder.parts or not folder.is_dir():
            folder = mount
        yield from (at for at in (folder, *folder.parents) if at.is_relative_to(mount))


def read(path: Path) -> str:
    """A file's text; empty if there is none, as for a controller of another version."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def number(text: str) -> float:
    """A number in a control group's file; infinite for `max`, no text or anything else."""
    try:
        return float(text)
    except ValueError:
        return math.inf
