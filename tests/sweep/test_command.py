"""A sweep as a function: its result, its silence, and the folder that it writes to."""

import json
import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED, ModelCard, read_card
from kvbench.records import read_records
from kvbench.spec import method_names
from kvbench.sweep import command
from kvbench.sweep.command import (
    COMPARED,
    Choices,
    SweepPlan,
    choose_methods,
    plan_sweep,
    run_sweep,
)
from kvbench.sweep.folder import experiment, find_folder
from kvbench.sweep.progress import Listener

COMMON = {"model": "some/model", "context": 256, "seed": 0}


class Notes(Listener):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def choices(samples: int = 2, task: str = "rag", **others: Any) -> Choices:
    return Choices(
        method=("recency",), task=(task,), budgets=(0.5,), samples=samples, context=256, **others
    )


def stored(folder: Path, common: dict[str, Any], *experiments: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    invocations = [{"experiment": each} for each in experiments]
    (folder / "run.json").write_text(json.dumps({"common": common, "invocations": invocations}))


def test_a_sweep_prints_nothing_and_tells_what_it_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = run_sweep(choices())
    assert capfd.readouterr() == ("", "")
    today = date.today().isoformat()
    assert first.folder == Path(f"results/runs/tiny-rag-{today}")
    assert (first.planned, first.measured, first.reused) == (4, 4, 0)
    assert (first.failed, first.left_out, first.exit_code) == ([], [], 0)
    assert len(read_records(first.folder)) == 4

    # the same command on a later day, with more samples: the same run
    earlier = first.folder.rename(first.folder.with_name("tiny-rag-2001-02-03"))
    heard = Notes()
    more = run_sweep(choices(samples=3), heard)
    assert (more.folder, more.measured, more.reused) == (earlier, 2, 4)
    assert heard.notes == [f"continuing {earlier}: 4 of 6 cells are there"]
    again = run_sweep(choices(samples=3), heard)
    assert (again.folder, again.measured, again.reused) == (earlier, 0, 6)
    assert heard.notes[-1] == f"all 6 cells are measured already in {earlier}"

    # another experiment with the same settings: another run
    other = plan_sweep(choices(option={"sinks": "2"}))
    assert other.folder == Path(f"results/runs/tiny-rag-{today}")
    assert plan_sweep(choices(task="recall")).folder.name == f"tiny-recall-{today}"
    assert not other.folder.exists()
    # a trial costs more than a hundredth of so few cells
    assert other.seconds(share=0.01) is None
    assert len(other.batches) == 1


def test_without_methods_those_of_the_paper_are_measured_and_all_is_everything() -> None:
    scores = read_card(EMBEDDED["tiny"])
    specs, left_out = choose_methods(Choices(), scores)
    assert [spec.name for spec in specs] == ["full", *COMPARED]
    assert left_out == []
    every, _ = choose_methods(Choices(method=("all",)), scores)
    assert sorted(spec.name for spec in every) == method_names()
    more, _ = choose_methods(Choices(method=("prulong+snapkv", "all", "snapkv")), scores)
    assert sorted(spec.name for spec in more) == sorted(["prulong+snapkv", *method_names()])
    # what lacks something is left out, unless it was asked for by name
    learnt = ["duoattention", "prulong"]
    for choices, missing in (
        (Choices(), learnt),
        (Choices(method=("all",)), [*learnt, "saliency-heads"]),
    ):
        specs, left_out = choose_methods(choices, ModelCard())
        assert not set(missing) & {spec.name for spec in specs}
        assert [line.split()[0] for line in left_out] == missing
    with pytest.raises(InputError, match="prulong needs"):
        choose_methods(Choices(method=("all", "prulong")), ModelCard())


def test_failures_and_an_interrupt_are_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_at(error: type[BaseException], method: str) -> None:
        def plan(choices: Choices) -> SweepPlan:
            def failing(model: Any, rows: Sequence[Row], **how: Any) -> list[Outcome]:
                if any(row.spec.name == method for row in rows):
                    raise error("broken")
                return run_rows(model, rows, **how)

            made = plan_sweep(choices)
            made.sweep.run_rows = failing
            return made

        monkeypatch.setattr(command, "plan_sweep", plan)

    stop_at(ValueError, "recency")
    result = run_sweep(choices(out=tmp_path / "r"))
    assert (result.measured, len(result.failed), result.exit_code) == (2, 2, 1)
    assert result.failed[0].error == "ValueError: broken"
    stop_at(KeyboardInterrupt, "full")
    heard = Notes()
    result = run_sweep(choices(out=tmp_path / "r", samples=3), heard)
    assert (result.interrupted, result.exit_code, result.measured) == (True, 130, 0)
    assert "the same command continues it" in heard.notes[-1]


def test_a_new_folder_is_named_by_model_tasks_and_date(tmp_path: Path) -> None:
    today = date.today().isoformat()
    name = find_folder(tmp_path, COMMON, experiment(["recall", "rag"], None, {})).name
    assert name == f"model-rag+recall-{today}"
    many = experiment(["a", "b", "c", "d"], None, {})
    assert find_folder(tmp_path, COMMON, many).name == f"model-4-tasks-{today}"
    long = find_folder(tmp_path, COMMON, experiment(["\u00e9" * 120], None, {}))
    long.mkdir()  # its name is not too long
    assert long.name.endswith(today)


def test_only_the_same_experiment_is_continued(tmp_path: Path) -> None:
    today = date.today().isoformat()
    wanted = experiment(["rag"], ["snapkv", "recency"], {})
    stored(tmp_path / "model-rag-2001-01-01", COMMON, wanted)
    (tmp_path / "model-rag-2001-01-02").mkdir()
    (tmp_path / "model-rag-2001-01-02" / "run.json").write_text("{")  # damaged
    stored(tmp_path / "named-by-hand", COMMON, experiment(["rag"], ["knorm"], {}))
    same = experiment(["rag"], ["recency", "snapkv"], {})
    assert find_folder(tmp_path, COMMON, same).name == "model-rag-2001-01-01"
    for other in (
        experiment(["rag"], ["snapkv"], {}),
        experiment(["rag"], None, {}),
        experiment(["rag"], ["knorm"], {}),
        experiment(["rag"], ["recency", "snapkv"], {"window": "8"}),
    ):
        assert find_folder(tmp_path, COMMON, other).name == f"model-rag-{today}"
    assert find_folder(tmp_path, {**COMMON, "seed": 1}, same).name == f"model-rag-{today}"
    stored(tmp_path / f"model-rag-{today}", COMMON, experiment(["rag"], None, {}))
    assert find_folder(tmp_path, {**COMMON, "seed": 1}, same).name == f"model-rag-{today}-2"


def test_a_damaged_line_is_measured_again_and_nothing_else(tmp_path: Path) -> None:
    choices = Choices(
        method=("recency",), task=("recall",), samples=2, budgets=(0.5,), out=tmp_path
    )
    run_sweep(choices)
    (file,) = tmp_path.glob("samples-*.jsonl")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], lines[1][:100] + b"\n", *lines[2:]]))
    listener = Notes()
    again = run_sweep(choices, listener)
    assert (again.planned, again.reused, again.measured) == (4, 3, 1)
    (note,) = [note for note in listener.notes if "is measured again" in note]
    assert note.startswith(f"what is damaged is measured again: {file}, line 2: not a record")
    found = read_records(tmp_path, [])
    assert sorted((r.method, r.sample) for r in found) == [
        (method, sample) for method in ("full", "recency") for sample in (0, 1)
    ]
    os.mkfifo(tmp_path / "samples-pipe.jsonl")
    with pytest.raises(InputError, match=r"samples-pipe.jsonl: it is not a regular file; mend it"):
        run_sweep(choices)
