"""Several processes share a run folder, and what one leaves when it is killed is taken over."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.records import record, store
from helpers.sweeps import cell, failing, sweep

import kvbench
from kvbench import locks
from kvbench.engine.row import Outcome, Row
from kvbench.errors import InputError
from kvbench.records import read_records
from kvbench.run_folder import AddedRecords, RunWriter, current_codes, hash_of, read_settings
from kvbench.sweep import command, runner
from kvbench.sweep.claims import Claims
from kvbench.sweep.command import Choices, SweepPlan, plan_sweep, run_sweep
from kvbench.sweep.plan import Cell
from kvbench.sweep.progress import Listener

FORK = multiprocessing.get_context("fork")  # a process that costs no time to start


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)


def cells(count: int) -> list[Cell]:
    return [cell("full", index) for index in range(count)]


def engine(act: Callable[[int], None] = lambda rows: None) -> Callable[..., list[Outcome]]:
    """An engine that does something first, for a number of rows."""

    def run(model: Any, rows: Sequence[Row], **_: Any) -> list[Outcome]:
        act(len(rows))
        return failing(rows)

    return run


@pytest.fixture
def children() -> Iterator[Callable[..., list[Any]]]:
    """Starts processes that all begin at one instant; those that still run are killed."""
    started: list[Any] = []

    def start(*targets: Callable[[], None]) -> list[Any]:
        barrier = FORK.Barrier(len(targets))

        def run(target: Callable[[], None]) -> None:
            barrier.wait()
            target()

        made = [FORK.Process(target=run, args=(target,)) for target in targets]
        started.extend(made)
        for process in made:
            process.start()
        return made

    yield start
    for process in started:
        process.kill()
        process.join()


def lines(folder: Path) -> list[str]:
    """The fingerprint of every line of records."""
    files = folder.glob("samples-*.jsonl")
    return [json.loads(line)["fingerprint"] for f in files for line in f.read_text().splitlines()]


def test_processes_that_start_at_one_instant_share_the_work(
    tmp_path: Path, children: Callable[..., list[Any]]
) -> None:
    told = FORK.Queue()
    added = AddedRecords(tmp_path / "run")  # all know what is there before they start: nothing

    def measure(number: int) -> None:
        made = sweep(engine(lambda rows: time.sleep(0.02)))
        made.added = added
        finished: list[Cell] = []
        with RunWriter(tmp_path / "run", {}, {"number": number}) as writer:
            made.run(cells(120), writer, finished.append)
        told.put((made.measured, made.elsewhere, len(finished), made.failed))

    each = children(*(lambda number=number: measure(number) for number in range(3)))
    counts = [told.get(timeout=60) for _ in each]
    assert sum(measured for measured, *_ in counts) == 120
    for measured, elsewhere, finished, failed in counts:
        assert measured + elsewhere == finished == 120
        assert measured > 0
        assert failed == []
    assert sorted(lines(tmp_path / "run")) == sorted(c.fingerprint for c in cells(120))
    for process in each:
        process.join()
        assert process.exitcode == 0
    assert list((tmp_path / "run").glob("claims-*")) == []


def test_eight_processes_at_one_instant_keep_eight_invocations(
    tmp_path: Path, children: Callable[..., list[Any]]
) -> None:
    def append(number: int, model: str) -> None:
        try:
            with RunWriter(tmp_path / "a" / "run", {"model": model}, {"number": number}) as writer:
                writer.append([record("full", 1.0, number, 1.0)])
        except InputError as error:
            os._exit(2 if "other settings (model was " in str(error) else 3)

    models = "mmmmmmmmnnnn"
    each = children(*(lambda n=n, m=m: append(n, m) for n, m in enumerate(models)))
    for process in each:
        process.join()
    codes = [process.exitcode for process in each]
    settings = read_settings(tmp_path / "a" / "run")
    assert settings is not None
    kept = [number for number, code in enumerate(codes) if code == 0]
    assert {models[number] for number in kept} == {settings["common"]["model"]}
    assert len(kept) == models.count(settings["common"]["model"])
    assert {code for number, code in enumerate(codes) if number not in kept} == {2}
    assert sorted(one["number"] for one in settings["invocations"]) == kept
    assert sorted(r.sample for r in read_records(tmp_path / "a" / "run")) == kept


def test_processes_that_do_nothing_leave_nothing_and_disturb_nobody(
    tmp_path: Path, children: Callable[..., list[Any]]
) -> None:
    def use(number: int) -> None:
        for turn in range(20):
            with RunWriter(tmp_path / "run", {}, {}) as writer:
                if (number, turn) == (0, 10):
                    writer.append([record("full", 1.0, 0, 1.0)])

    each = children(*(lambda number=number: use(number) for number in range(4)))
    for process in each:
        process.join()
        assert process.exitcode == 0
    assert len(read_records(tmp_path / "run")) == 1
    assert read_settings(tmp_path / "run") is not None


def test_what_a_killed_process_leaves_is_taken_over_in_smaller_groups(
    tmp_path: Path, children: Callable[..., list[Any]]
) -> None:
    """The other process waits for it meanwhile: nothing else is left."""
    folder = tmp_path / "run"

    def hang() -> None:
        with RunWriter(folder, {}, {}) as writer:
            sweep(engine(lambda rows: time.sleep(1000))).run(cells(8), writer, lambda _: None)

    (process,) = children(hang)
    while not any("full/0" in f.read_text() for f in folder.glob("claims-*.json")):
        time.sleep(0.01)
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if text.startswith("waiting"):
            os.kill(process.pid, signal.SIGKILL)

    tried: list[int] = []
    made = sweep(engine(tried.append))
    with RunWriter(folder, {}, {}) as writer:
        made.run(cells(24), writer, lambda _: None, note=note)
    assert (made.measured, made.failed) == (24, [])
    assert sorted(tried) == [4, 4, 8, 8]  # groups as large did fit, so that only this one is halved
    assert notes == [
        "waiting for 8 cells that other processes measure",
        "a process ended without a word while it measured 8 cells of echo that need 0 MiB; "
        "they are measured in smaller groups",
    ]
    assert sorted(lines(folder)) == sorted(c.fingerprint for c in cells(24))
    assert list(folder.glob("claims-*")) == []


def leave_mark(folder: Path, name: str, group: Sequence[Cell]) -> None:
    """What a killed process leaves."""
    folder.mkdir(exist_ok=True)
    found = [each.fingerprint for each in group]
    claim = {"cells": found, "measuring": found, "task": "echo", "bytes": 100 * len(found)}
    (folder / f"claims-{name}.json").write_text(json.dumps(claim))
    (folder / f"samples-{name}.jsonl").touch()


def measured(folder: Path, count: int, run: Any) -> tuple[Any, list[str]]:
    notes: list[str] = []
    made = sweep(run)
    made.recorded = {record.fingerprint for record in read_records(folder) if not record.error}
    missing = [cell for cell in cells(count) if cell.fingerprint not in made.recorded]
    with RunWriter(folder, {}, {}) as writer:
        made.run(missing, writer, lambda _: None, note=notes.append)
    return made, notes


def test_after_a_silent_death_no_group_is_as_large(tmp_path: Path) -> None:
    leave_mark(tmp_path / "run", "a", cells(24)[:8])
    tried: list[int] = []
    made, notes = measured(tmp_path / "run", 24, engine(tried.append))
    assert (made.measured, tried) == (24, [4] * 6)
    assert len(notes) == 1
    assert list((tmp_path / "run").glob("claims-*")) == []


def test_a_cell_that_ended_two_processes_fails_and_the_rest_is_measured(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for name, group in {"a": cells(8), "b": cells(4), "c": cells(4)[2:3]}.items():
        leave_mark(folder, name, group)
    tried: list[int] = []

    def interrupt(rows: int) -> None:
        tried.append(rows)
        if rows == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(folder, 24, engine(interrupt))
    assert tried == [2, 1]  # the cell that ended its process is measured alone
    leave_mark(folder, "d", cells(4)[2:3])
    tried.clear()
    made, notes = measured(folder, 24, engine(tried.append))
    assert [(r.sample, r.error) for r in made.failed] == [(2, runner.ENDED)]
    # Cells 0 and 1 are there. Groups without the cell are as large as before.
    assert (made.measured, tried) == (21, [1, 2, 4, 8, 6])
    assert sum("1 cell of echo that needs" in note for note in notes) == 1
    assert list(folder.glob("claims-*")) == []
    # the same command tries it again
    again, notes = measured(folder, 24, engine())
    assert (again.measured, notes) == (1, [])


def test_a_damaged_or_needless_mark_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    leave_mark(folder, "a", [])
    leave_mark(folder, "b", cells(1))
    (folder / "claims-b.json").write_text('{"cells": ["full')
    (folder / "claims-folder.json").mkdir()  # not kvbench's: it stays, and stops nothing
    made, notes = measured(folder, 2, engine())
    assert (made.measured, notes) == (2, [])
    assert [path.name for path in folder.glob("claims-*")] == ["claims-folder.json"]


def test_unequal_batches_overlap_in_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunWriter(folder, {}, {}) as one, RunWriter(folder, {}, {}) as other:
        with Claims(one, AddedRecords(folder), set()) as first:
            second = Claims(other, AddedRecords(folder), set())
            assert first.take([cells(8)[:4], cells(8)[4:]])[0] == cells(8)[:4]
            left = [cells(9)[:3], cells(9)[3:6], cells(9)[6:]]
            assert second.take(left)[0] == cells(9)[4:6]
            assert left == [cells(9)[:3], cells(9)[3:4], cells(9)[6:]]
            assert second.take(left)[0] == cells(9)[6:]
            assert second.take(left)[0] == []
            one.append([record("full", 1.0, 1, 1.0, fingerprint=cells(2)[1].fingerprint)])
            taken, new = second.take(left)
            assert (taken, list(new)) == ([], [cells(2)[1].fingerprint])
            assert left == [[cells(9)[0], cells(9)[2]], cells(9)[3:4]]
        assert second.take(left)[0] == [cells(9)[0], cells(9)[2]]
        second.__exit__(None, None, None)
    assert list(folder.glob("claims-*")) == []


def test_cells_that_fail_elsewhere_are_done_and_named(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunWriter(folder, {}, {}) as other:

        def record_elsewhere(rows: int) -> None:
            for number in (8, 9):
                name = cells(10)[number].fingerprint
                other.append([record("full", 1.0, number, None, fingerprint=name, error="lost")])

        made, _ = measured(folder, 10, engine(record_elsewhere))
    assert (made.measured, made.elsewhere) == (8, 2)
    assert [failed.error for failed in made.failed] == ["lost", "lost"]


def test_without_locks_a_sweep_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_lock", lambda file, *flags: False)
    made, notes = measured(tmp_path / "run", 10, engine())
    assert made.measured == 10
    assert notes == [
        f"{tmp_path / 'run'} is on a file system without locks; start no other run there"
    ]


def test_a_folder_of_an_older_version_is_read_and_continued(tmp_path: Path) -> None:
    folder = store(tmp_path / "run", [record("full", 1.0, 0, 1.0)], context=7)
    for file in folder.glob("invocation-*.json"):
        file.unlink()
    older = {"started": "2026-01-02", "codes": {"task rag": "aa"}}
    common = {"model": "m", "context": 7}
    contents = {"format": 1, "common": common, "invocations": [older]}
    (folder / "run.json").write_text(json.dumps(contents))
    newer = {"started": "2026-02-01T00:00:00.000+00:00", "codes": {"task rag": "bb"}}
    with RunWriter(folder, common, newer):
        pass
    settings = read_settings(folder)
    assert settings is not None
    newer["common_hash"] = hash_of(common)
    assert settings["invocations"] == [older, newer]
    assert current_codes([settings]) == {"task rag": "bb"}
    assert json.loads((folder / "run.json").read_text()) == contents
    next(folder.glob("invocation-*.json")).write_text("[1]")
    with pytest.raises(InputError, match=r"invocation-.* is damaged .*; put back"):
        read_settings(folder)


def replace_folder(folder: Path) -> None:
    folder.rename(folder.with_name("other"))
    folder.mkdir()


GONE: dict[str, Callable[[Path], Any]] = {
    "deleted": shutil.rmtree,
    "renamed": lambda folder: folder.rename(folder.with_name("other")),
    "renamed, and another in its place": replace_folder,
    "its records deleted": lambda folder: next(folder.glob("samples-*")).unlink(),
    "its records emptied": lambda folder: os.truncate(next(folder.glob("samples-*")), 0),
}


@pytest.mark.parametrize("change", GONE.values(), ids=GONE)
def test_a_folder_that_goes_away_ends_the_run(
    change: Callable[[Path], Any], tmp_path: Path
) -> None:
    calls: list[int] = []

    def run(rows: int) -> None:
        calls.append(rows)
        if len(calls) == 2:
            change(tmp_path / "run")

    finished: list[Cell] = []
    with (
        pytest.raises(InputError, match=r"run has changed under the run: samples-.* was deleted"),
        RunWriter(tmp_path / "run", {}, {}) as writer,
    ):
        sweep(engine(run)).run(cells(24), writer, finished.append)
    assert len(finished) == 8
    assert len(calls) == 2


def test_nothing_is_called_finished_that_cannot_be_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with RunWriter(folder, {}, {}) as writer, RunWriter(folder, {}, {}) as other:
        other.append([record("full", 1.0, 0, 1.0)])
        writer.append([record("full", 1.0, 1, 1.0)])
        names = {record.fingerprint for record in read_records(folder)}
        writer.check_stored(names)
        other.path.unlink()
        with pytest.raises(InputError, match=r"1 of 2 finished cells cannot be read back from"):
            writer.check_stored(names)


def stop_with(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Make sweeps do something before their second group is measured."""

    def plan(choices: Choices) -> SweepPlan:
        made, calls = plan_sweep(choices), []
        run_rows = made.sweep.run_rows

        def acting(*given: Any, **how: Any) -> list[Outcome]:
            calls.append(given)
            if len(calls) == 2:
                act()
            return run_rows(*given, **how)

        made.sweep.run_rows = acting
        return made

    monkeypatch.setattr(command, "plan_sweep", plan)


class Notes(Listener):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def two_cells(out: Path) -> Choices:
    """One method and one budget on two samples, in batches of one row."""
    return Choices(
        method=("recency",),
        task=("rag",),
        budgets=(0.5,),
        samples=2,
        context=256,
        batch_rows=1,
        out=out,
    )


def test_an_end_by_the_system_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = two_cells(tmp_path / "r")
    stop_with(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    heard = Notes()
    result = run_sweep(choices, heard)
    assert (result.exit_code, result.measured) == (130, 1)
    assert heard.notes[-1].startswith("interrupted; what is finished is in ")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert list((tmp_path / "r").glob("claims-*")) == []

    def lose_and_interrupt() -> None:
        (tmp_path / "r").rename(tmp_path / "elsewhere")
        raise KeyboardInterrupt

    stop_with(monkeypatch, lose_and_interrupt)
    with pytest.raises(InputError, match="has changed under the run"):
        run_sweep(choices)
    assert len(read_records(tmp_path / "elsewhere")) == 2


def test_an_interrupt_before_the_first_record_does_not_promise_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = two_cells(tmp_path / "r")
    monkeypatch.setattr(
        "kvbench.sweep.runner.warm_up", lambda model: os.kill(os.getpid(), signal.SIGTERM)
    )
    heard = Notes()
    result = run_sweep(choices, heard)
    assert (result.exit_code, result.measured) == (130, 0)
    assert heard.notes[-1] == "interrupted; nothing was finished, so nothing is kept"
    assert not (tmp_path / "r").exists()
    with pytest.raises(KeyboardInterrupt, match=r"^nothing was finished, so nothing is kept$"):
        kvbench.run(tasks=["recall"], methods=["full"], samples=1, context=256, out=tmp_path / "r")


def test_debugging_shows_the_traceback_of_a_cell_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(rows: int) -> None:
        raise ValueError("broken")

    measured(tmp_path / "quiet", 1, engine(fail))
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("KVBENCH_DEBUG", "1")
    made, _ = measured(tmp_path / "run", 1, engine(fail))
    assert made.failed[0].error == "ValueError: broken"
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "in fail" in shown
