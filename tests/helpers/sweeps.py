"""Sweeps of made-up cells under an engine that a test gives, with no model."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from kvbench.engine.row import Outcome, Row
from kvbench.spec import parse_method
from kvbench.sweep.plan import Cell
from kvbench.sweep.runner import Sweep
from kvbench.task import Sample


def cell(method: str, sample: int, chunk: int | None = None) -> Cell:
    made = Sample("echo", "any", sample, "prompt", "x", 3)
    spec = parse_method(method, {})
    return Cell(
        f"{method}/{sample}/{chunk}", made, [1, 2], spec, 1.0 if method == "full" else 0.5, chunk, 0
    )


def failing(rows: Sequence[Row]) -> list[Outcome]:
    """As run_rows, but out of memory as soon as a `random` row is among the rows."""
    if any(row.spec.name == "random" for row in rows):
        raise MemoryError("no more\nmemory")
    one = Outcome([5], 0.5, 0.5, 0.5, 0.5, 5, 10, 0, 100, None, 0.1, 0.1, 2, 1, [[0, 0]], 1, 100)
    return [one] * len(rows)


class Weighed(Sweep):
    """A sweep whose cells take 100 bytes each."""

    def bytes(self, batch: Sequence[Cell]) -> int:
        return 100 * len(batch)


def sweep(
    run_rows: Any, score: Any = lambda prediction, sample: 1.0, memory_limit: int = 10**9
) -> Sweep:
    model: Any = SimpleNamespace(
        name="m", tokenizer=SimpleNamespace(decode=lambda tokens, **_: "x")
    )
    task: Any = SimpleNamespace(name="echo", score=score)
    return Weighed(
        model=model,
        tasks={"echo": task},
        context=16,
        prefill_chunk=8,
        memory_limit=memory_limit,
        batch_rows=8,
        run_rows=run_rows,
    )
