"""Work units and shards: nothing lost, nothing twice, a sample never split, loads that are even."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvbench.spec import parse_method
from kvbench.sweep.plan import Cell
from kvbench.sweep.units import (
    dealt,
    longest_first,
    note_on_workers,
    shard,
    tokens_of,
    units_of,
)
from kvbench.task import Sample

SPEC = parse_method("recency", {})


def cells_of(lengths: dict[str, list[int]], budgets: int = 2) -> list[Cell]:
    """Samples of tasks with prompts of these lengths, in the order of a plan."""
    most = max(map(len, lengths.values()), default=0)
    return [
        Cell(f"{task}/{index}/{budget}", made, range(length), SPEC, 0.1 * (budget + 1), None, 0)
        for index in range(most)
        for task, each in lengths.items()
        for length in each[index : index + 1]
        for made in [Sample(task, task, index, "", None, 1)]
        for budget in range(budgets)
    ]


def test_a_unit_is_a_sample_with_all_its_cells() -> None:
    units = units_of(cells_of({"a": [10, 20], "b": [5]}))
    assert [[cell.fingerprint for cell in unit] for unit in units] == [
        ["a/0/0", "a/0/1"],
        ["b/0/0", "b/0/1"],
        ["a/1/0", "a/1/1"],
    ]
    assert [tokens_of(unit) for unit in units] == [22, 12, 42]


def test_the_longest_goes_to_the_least_loaded() -> None:
    assert dealt([3, 9, 5, 4, 4], 2, float) == [[9, 4], [5, 4, 3]]
    assert longest_first([("a", 2), ("b", 3), ("c", 2)], lambda unit: unit[1]) == [
        ("b", 3),
        ("a", 2),
        ("c", 2),
    ]


def test_workers_that_save_no_time_are_named() -> None:
    assert note_on_workers(4, 4, None) == note_on_workers(4, 0, 2) == note_on_workers(2, 9, 2) == []
    assert "share 3 samples; more than 3" in note_on_workers(4, 3, None)[0]
    assert "share 9 samples and 2 cores; more than 2" in note_on_workers(4, 9, 2)[0]


lengths = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(st.integers(1, 50), max_size=8), min_size=1
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths, st.integers(1, 9))
def test_shards_split_the_plan(given_lengths: dict[str, list[int]], count: int) -> None:
    cells = cells_of(given_lengths)
    shards = [shard(cells, index + 1, count) for index in range(count)]
    assert sorted(c.fingerprint for part in shards for c in part) == sorted(
        c.fingerprint for c in cells
    )
    for part in shards:
        assert part == [cell for cell in cells if cell in part]  # in the order of the plan
    owners: dict[Any, set[int]] = {}
    for index, part in enumerate(shards):
        for cell in part:
            owners.setdefault(cell.unit, set()).add(index)
    assert all(len(found) == 1 for found in owners.values())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lengths, st.integers(1, 9))
def test_no_share_is_longer_than_the_shortest_and_one_unit(
    given_lengths: dict[str, list[int]], count: int
) -> None:
    units = units_of(cells_of(given_lengths))
    loads = [sum(map(tokens_of, share)) for share in dealt(units, count, tokens_of)]
    assert max(loads) - min(loads) <= max(map(tokens_of, units), default=0)


def test_other_budgets_leave_the_shards_as_they_are() -> None:
    lengths = {"a": [10, 30, 20, 25], "b": [5, 40]}
    for index in range(1, 4):
        few, many = (
            {cell.unit for cell in shard(cells_of(lengths, budgets), index, 3)}
            for budgets in (1, 5)
        )
        assert few == many
