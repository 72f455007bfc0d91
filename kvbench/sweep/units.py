"""Work units: what a worker takes at a time, a sample with all of its cells.

The cells of a sample share the prefill of its prompt, so they are never split between workers. See
`docs/scale.md`.
"""

import heapq
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from kvbench.sweep.plan import Cell

C = TypeVar("C", bound=Cell)
U = TypeVar("U")


def unit_of(cell: Cell) -> Hashable:
    """The unit that a cell belongs to."""
    return cell.sample.task, cell.sample.index


def units_of(cells: Sequence[C]) -> list[list[C]]:
    """The cells in their units, in the order of the plan."""
    units: dict[Hashable, list[C]] = {}
    for cell in cells:
        units.setdefault(unit_of(cell), []).append(cell)
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
    mine: set[Any] = {unit_of(u[0]) for u in dealt(units_of(cells), count, tokens_of)[index - 1]}
    return [cell for cell in cells if unit_of(cell) in mine]
