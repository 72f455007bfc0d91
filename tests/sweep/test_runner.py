"""A sweep continues when cells fail, and names them. The engine here fails on demand."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.sweeps import cell, failing, sweep

from kvbench.engine.row import Outcome, Row
from kvbench.records import read_records
from kvbench.run_folder import RunWriter
from kvbench.sweep.plan import Cell
from kvbench.sweep.runner import batches
from kvbench.task import Sample


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


def test_out_of_memory_halves_until_it_fits_and_is_not_tried_again(tmp_path: Path) -> None:
    tried: list[int] = []

    def scarce(model: Any, rows: Sequence[Row], **_: Any) -> list[Outcome]:
        tried.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
        return failing(rows)

    cells = [cell("full", i) for i in range(16)]
    with RunWriter(tmp_path / "run", {}, {}) as writer:
        assert sweep(scarce).run(cells, writer, lambda _: None) == []
    assert len(read_records(tmp_path / "run")) == 16
    assert tried == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]  # 8 and 4 failed once, then nobody asked again


def test_a_cell_that_does_not_fit_alone_fails_and_the_sweep_goes_on(tmp_path: Path) -> None:
    def scarce(model: Any, rows: Sequence[Row], **_: Any) -> list[Outcome]:
        if any(row.spec.name == "recency" for row in rows):
            raise MemoryError
        return failing(rows)

    cells = [cell(method, i) for i in range(2) for method in ("full", "recency", "snapkv")]
    with RunWriter(tmp_path / "run", {}, {}) as writer:
        failed = sweep(scarce).run(cells, writer, lambda _: None)
    assert [(r.method, r.error) for r in failed] == [("recency", "MemoryError: no message")] * 2
    with RunWriter(tmp_path / "small", {}, {}) as writer:
        failed = sweep(scarce, memory_limit=50).run(cells, writer, lambda _: None)
    assert len(failed) == 6
    assert "needs 0 MiB beside the model" in (failed[0].error or "")


def test_batches_lose_and_repeat_nothing() -> None:
    cells = [
        cell(method, i, chunk)
        for i in range(7)
        for method, chunk in (("full", None), ("snapkv", None), ("recency", 8), ("recency", 4))
    ]
    for size in (1, 2, 5, 100, None):
        for limit in (100, 250, 10**9):
            made = list(batches(cells, 8, lambda some: 100 * len(some), limit, size))
            assert sorted(c.fingerprint for b in made for c in b) == sorted(
                c.fingerprint for c in cells
            )
            for batch in made:
                assert len(batch) <= min(size or 64, limit // 100)
                assert len({c.prefill_chunk or 8 for c in batch}) == 1


def test_the_cells_of_a_sample_stay_together_as_far_as_memory_allows() -> None:
    names = ["full", "snapkv-naive", "snapkv", "recency", "pyramidkv", "knorm-naive"]
    cells = [cell(name, i, None) for i in range(5) for name in names]
    whole = list(batches(cells, 8, lambda some: len(some), 14, None))
    assert [len({c.sample.index for c in batch}) for batch in whole] == [2, 2, 1]
    for batch in batches(cells, 8, lambda some: len(some), 3, None):
        # what shares the whole prefill is not mixed with what does not
        assert len({c.spec.depends_on_chunk for c in batch}) == 1


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_group_stays_below_what_was_predicted(chunk: int | None) -> None:
    from helpers.engine import spec, tokens
    from helpers.models import loaded_model

    from kvbench.engine.run import run_rows
    from kvbench.sweep.cost import cost_of, entry_bytes, workspace

    model = loaded_model()
    for names in (["snapkv", "pyramidkv"], ["full", "snapkv"], ["recency", "snapkv-naive", "full"]):
        rows = [Row(tokens(150), 20, spec(name), b) for name in names for b in (0.2, 0.5, 0.8)]
        rows += [Row(tokens(140, 1), 20, spec(name), 0.4) for name in names]
        predicted = cost_of(model, rows, chunk).bytes
        measured = run_rows(model, rows, prefill_chunk=chunk)[0].group_bytes_peak
        assert measured <= predicted
        assert predicted - workspace(model, 150, chunk or 150) <= 1.5 * measured
        assert measured > 100 * entry_bytes(model, model.layers[0])


def test_the_answer_is_recorded_and_scored_up_to_its_stop_string(tmp_path: Path) -> None:
    made = Sample("echo", "any", 0, "prompt", "x", 3, stop=(";", "."))
    stopping = replace(cell("full", 0), sample=made)
    scored: list[str] = []

    def score(prediction: str, sample: Sample) -> float:
        scored.append(prediction)
        return 1.0

    asked: list[Row] = []

    def run(model: Any, rows: Sequence[Row], **_: Any) -> list[Outcome]:
        asked.extend(rows)
        return failing(rows)

    measured = sweep(run, score)
    measured.model.tokenizer.decode = lambda tokens, **_: "one. two; three"
    with RunWriter(tmp_path / "run", {}, {}) as writer:
        measured.run([stopping, cell("full", 1)], writer, lambda cell: None)
    records = read_records(tmp_path / "run")
    assert [record.prediction for record in records] == ["one", "one. two; three"]
    assert scored == ["one", "one. two; three"]
    assert [row.stop for row in asked] == [(";", "."), ()]
