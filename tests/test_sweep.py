"""A sweep goes on when cells fail, and says which; the engine here is one that fails to order."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.engine import Outcome, Row
from kvbench.plan import Cell
from kvbench.results import RunWriter, read_records
from kvbench.spec import parse_method
from kvbench.sweep import Sweep, batches
from kvbench.task import Sample


def cell(method: str, sample: int, chunk: int | None = None) -> Cell:
    made = Sample("echo", "any", sample, "prompt", "x", 3)
    spec = parse_method(method, {})
    return Cell(f"{method}/{sample}/{chunk}", made, [1, 2], spec, 0.5, chunk, 0)


def failing(rows: Sequence[Row]) -> list[Outcome]:
    """As run_rows, but out of memory as soon as a `random` row is among the rows."""
    if any(row.spec.name == "random" for row in rows):
        raise MemoryError("no more\nmemory")
    one = Outcome([5], 0.5, 0.5, 0.5, 5, 10, 0, 100, None, 0.1, 0.1, 2, 1)
    return [one] * len(rows)


def sweep(run_rows: Any, score: Any = lambda prediction, sample: 1.0) -> Sweep:
    model: Any = SimpleNamespace(
        name="m", tokenizer=SimpleNamespace(decode=lambda tokens, **_: "x")
    )
    task: Any = SimpleNamespace(name="echo", score=score)
    return Sweep(
        model=model,
        tasks={"echo": task},
        seed=0,
        context=16,
        prefill_chunk=8,
        batch_rows=8,
        run_rows=run_rows,
    )


def test_a_failing_cell_costs_only_itself(tmp_path: Path) -> None:
    cells = [cell(method, i) for i in range(3) for method in ("full", "snapkv", "random")]
    seen: list[Cell] = []
    with RunWriter(tmp_path / "run", {}, {}) as writer:
        failed = sweep(lambda model, rows, **_: failing(rows)).run(cells, writer, seen.append)
    assert sorted(c.fingerprint for c in seen) == sorted(c.fingerprint for c in cells)
    assert {r.method for r in failed} == {"random"}
    records = read_records(tmp_path / "run")
    assert len(records) == 9
    for record in records:
        if record.method == "random":
            assert record.error == "MemoryError: no more memory"
            assert record.score is None
        else:
            assert (record.score, record.prediction, record.error) == (1.0, "x", None)


@pytest.mark.parametrize("score", [2.0, float("nan"), -0.1])
def test_a_score_out_of_range_is_a_failure_not_a_result(tmp_path: Path, score: float) -> None:
    measure = sweep(lambda model, rows, **_: failing(rows), lambda prediction, sample: score)
    with RunWriter(tmp_path / "run", {}, {}) as writer:
        failed = measure.run([cell("full", 0)], writer, lambda _: None)
    assert "not in 0..1" in (failed[0].error or "")


def test_an_interrupt_keeps_the_batches_before_it(tmp_path: Path) -> None:
    calls = 0

    def interrupted(model: Any, rows: Sequence[Row], **_: Any) -> list[Outcome]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return failing(rows)

    cells = [cell("full", i) for i in range(40)]
    with RunWriter(tmp_path / "run", {}, {}) as writer, pytest.raises(KeyboardInterrupt):
        sweep(interrupted).run(cells, writer, lambda _: None)
    assert len(read_records(tmp_path / "run")) == 16


def test_batches_lose_and_repeat_nothing() -> None:
    cells = [
        cell(method, i, chunk)
        for i in range(7)
        for method, chunk in (("full", None), ("snapkv", None), ("recency", 8), ("recency", 4))
    ]
    for size in (1, 2, 5, 100):
        made = list(batches(cells, size, 8))
        assert sorted(c.fingerprint for b in made for c in b) == sorted(
            c.fingerprint for c in cells
        )
        for batch in made:
            assert len(batch) <= size
            assert len({c.prefill_chunk or 8 for c in batch}) == 1
