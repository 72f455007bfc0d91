"""Work units: what a worker takes at a time, a sample with all of its cells.

The cells of a sample share the prefill of its prompt, so they are never split between workers. See
`docs/scale.md`.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from kvbench.errors import InputError
from kvbench.sweep.plan import Cell, Unit

C = TypeVar("C", bound=Cell)
U = TypeVar("U")


def units_of(cells: Sequence[C]) -> list[list[C]]:
    """The cells in their units, in the order of the plan."""
    units: dict[Unit, list[C]] = {}
    for cell in cells:
        units.setdefault(cell.unit, []).append(cell)
    return list(units.values())


def longest_first(units: Sequence[U], cost: Callable[[U], float]) -> list[U]:
    """The units in the order in which workers take them: what is long must not start last."""
    return sorted(units, key=cost, reverse=True)


def dealt(units: Sequence[U], count: int, cost: Callable[[U], float]) -> list[list[U]]:
    """The units in `count` shares of about equal cost: the longest first, to the least loaded.

    Equal units always give equal shares, so that shards need not talk to each other.
    """
    shares: list[list[U]] = [[] for _ in range(count)]
    loads: list[tuple[float, int]] = [(0.0, index) for index in range(count)]
    for unit in longest_first(units, cost):
        load, index = loads[0]
        shares[index].append(unit)
        heapq.heapreplace(loads, (load + cost(unit), index))
    return shares


def tokens_of(unit: Sequence[Cell]) -> int:
    """What a unit costs, as all machines agree: the tokens of its cells."""
    return sum(cell.tokens for cell in unit)


def shard(cells: Sequence[C], index: int, count: int) -> list[C]:
    """The cells of shard `index` of `count`, counted from 1, in the order of the plan."""
    mine = {unit[0].unit for unit in dealt(units_of(cells), count, tokens_of)[index - 1]}
    return [cell for cell in cells if cell.unit in mine]


def note_on_workers(workers: int, units: int, cores: int | None) -> list[str]:
    """A note if there are more workers than units, or than the cores of a CPU that they share."""
    if not units or workers <= min(units, cores or units):
        return []
    what = f"{units} samples" + (f" and {cores} cores" if cores else "")
    most = min(units, cores or units)
    return [f"{workers} workers share {what}; more than {most} take memory and save no time"]


def slurm_shard(environment: Mapping[str, str]) -> tuple[int, int] | None:
    """The shard of a job in a Slurm array, by its variables; None outside of an array.

    They describe the array that was submitted last. If only some jobs of an array are submitted
    again, they do not say how many shards there were. InputError for an array that looks so, with a
    single job or a first one other than 0 and 1, and for variables that cannot be understood.
    """
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    texts = [environment.get(f"SLURM_ARRAY_TASK_{name}") for name in names]
    if texts[0] is None:
        return None
    try:
        number, count, first, last, step = (int(text) for text in texts if text is not None)
    except ValueError:
        number = count = first = last = step = 0
    jobs = range(first, last + 1, max(1, step))
    if step < 1 or len(jobs) != count or count < 2 or first not in (0, 1) or number not in jobs:
        raise InputError(
            "this job is part of a Slurm array whose SLURM_ARRAY_TASK_* variables do not say "
            "which part (an array like 1-8, or 0-14:2, does); give --shard I/N"
        )
    return jobs.index(number) + 1, count
