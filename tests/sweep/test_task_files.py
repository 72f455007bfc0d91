"""Sweeps over task files: length control, chat templates, and what is measured again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import InputError
from kvbench.models.load import load_model
from kvbench.records import Record, read_records
from kvbench.registry import open_task
from kvbench.report.build import make_report
from kvbench.run_folder import read_settings
from kvbench.sweep.command import Choices, SweepPlan, invocation, plan_sweep, run_sweep
from kvbench.sweep.length import token_starts, without
from kvbench.sweep.plan import StoredPrompt
from kvbench.task import Sample

FACTS = [f"The secret word for {animal} is melon." for animal in ("fox", "owl", "bear", "crow")]


def write(path: Path, *lengths: int, **more: Any) -> Path:
    """A task file whose samples have contexts of so many sentences."""
    rows = [
        {
            "instruction": "Remember the facts.\n",
            "context": " ".join(FACTS[i % len(FACTS)] for i in range(length)),
            "question": "\nQuestion: What is the secret word for fox?\n",
            "answer_prefix": "Answer:",
            "answer": "melon",
            "metric": "substring_exact_match",
            "max_new_tokens": 8,
            **more,
        }
        for length in lengths
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choices(path: Path, **changes: Any) -> Choices:
    """Full attention and SnapKV on a task file, beside which the run is."""
    given: dict[str, Any] = {"budgets": (0.5,), "method": ("snapkv",), "out": path.parent / "out"}
    return Choices(task=(str(path),), device="cpu", **{**given, **changes})


def prompts(plan: SweepPlan) -> dict[int, list[int]]:
    """The token ids of each sample."""
    found = {}
    for cell in plan.cells:
        assert isinstance(cell.prompt, StoredPrompt)
        found[cell.sample.index] = cell.prompt.read()
    return found


def test_a_sample_that_is_too_long_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", 2, 40)
    with pytest.raises(InputError, match=r"my.jsonl, line 2: it takes \d+ tokens .* 200 is the m"):
        run_sweep(choices(path, context=200))
    assert not (tmp_path / "out").exists()


def test_the_end_of_the_context_is_cut(tmp_path: Path) -> None:
    """As HELMET does: the prompt's other tokens stay, the context keeps its first ones."""
    path = write(tmp_path / "my.jsonl", 2, 40)
    whole = prompts(plan_sweep(choices(path)))
    plan = plan_sweep(choices(path, context=200, too_long="cut"))
    cut = prompts(plan)
    tokenizer = load_model("tiny", device="cpu").tokenizer
    assert cut[0] == whole[0]
    assert len(cut[1]) == 200 - 8
    text = tokenizer.decode(cut[1], skip_special_tokens=True)
    assert text.startswith("Remember the facts.\nThe secret word for fox is melon. The")
    assert text.endswith("\nQuestion: What is the secret word for fox?\nAnswer:")
    by_sample = {cell.sample.index: cell for cell in plan.cells}
    assert by_sample[0].cut_tokens == 0
    assert by_sample[1].cut_tokens == len(whole[1]) - len(cut[1])
    assert plan.notes == [
        "my: 2 samples, all that there are",
        f"my: the contexts of 1 of 2 samples are cut, by {by_sample[1].cut_tokens} tokens at most",
    ]


def test_cut_and_skipped_samples_are_told_in_records_and_the_report(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", 2, 40, 3)
    cut = run_sweep(choices(path, context=200, too_long="cut"))
    records = {record.sample: record for record in read_records(cut.folder)}
    assert [records[i].cut_tokens == 0 for i in range(3)] == [True, False, True]
    assert {record.context for record in records.values()} == {200}
    notes = make_report([cut.folder]).notes
    assert any("my: the contexts of 1 of 3 samples are cut" in note for note in notes)

    out = tmp_path / "skipped"
    plan = plan_sweep(choices(path, context=200, too_long="skip", out=out))
    assert f"my: 1 of 3 samples left out, too long: {path}, line 2" in plan.notes
    skipped = run_sweep(choices(path, context=200, too_long="skip", out=out))
    assert {record.sample for record in read_records(out)} == {0, 2}
    settings = read_settings(out)
    assert settings is not None
    assert settings["invocations"][-1]["skipped"] == {"my": [1]}
    notes = make_report([skipped.folder]).notes
    assert any("my: 1 sample was left out, too long" in note for note in notes)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"context": 30, "too_long": "cut"}, "line 1: nothing of its context fits"),
        ({"context": 20, "too_long": "skip"}, "my: all samples are longer than 20 tokens"),
    ],
)
def test_what_cannot_be_made_to_fit_is_refused(
    more: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "my.jsonl", 40)
    with pytest.raises(InputError, match=reason):
        run_sweep(choices(path, **more))
    assert not (tmp_path / "out").exists()


def test_a_prompt_whose_context_is_not_known_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    row = {"prompt": " ".join(FACTS * 20), "answer": "melon"}
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match="line 1: its context is not known, so it cannot be cut"):
        plan_sweep(
            choices(path, context=200, too_long="cut", metric="exact_match", max_new_tokens=8)
        )


def measured(choice: Choices) -> tuple[int, dict[str, Record]]:
    """How many cells were measured, and all records by fingerprint."""
    result = run_sweep(choice)
    assert not result.failed
    return result.measured, {record.fingerprint: record for record in read_records(result.folder)}


def test_an_edited_line_is_measured_again_and_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", 2, 3, 4)
    assert measured(choices(path))[0] == 6
    before = path.read_text()
    for old, new, again in (
        ("bear is melon", "bear is lemon", 4),  # samples 1 and 2 hold it
        ('"answer": "melon"', '"answer": "lemon"', 6),
        ("\n", "\n", 0),
    ):
        path.write_text(before.replace(old, new))
        assert measured(choices(path))[0] == again
    path.write_text(before.replace('"max_new_tokens": 8', '"max_new_tokens": 8, "note": "x"'))
    assert measured(choices(path))[0] == 0  # the key means nothing


def test_a_line_that_changes_during_the_run_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "my.jsonl", 2, 3, 4)
    good = path.read_text()
    plans = [plan_sweep(choices(path, out=tmp_path / name)) for name in ("out", "other")]
    monkeypatch.setattr("kvbench.sweep.command.plan_sweep", lambda _: plans.pop(0))
    lines = good.splitlines(keepends=True)
    path.write_text(lines[0] + lines[1].replace("owl", "elk") + lines[2])
    result = run_sweep(choices(path))
    assert {record.sample for record in result.failed} == {1}
    assert all("my.jsonl, line 2: it has changed" in str(r.error) for r in result.failed)
    path.write_text(lines[0][:30])
    assert {record.sample for record in run_sweep(choices(path)).failed} == {0, 1, 2}
    monkeypatch.undo()
    path.write_text(good)
    count, records = measured(choices(path))
    assert count == 2  # the failed sample; the others are there
    assert len(records) == 6


def test_a_sample_says_whether_it_is_for_a_chat(tmp_path: Path) -> None:
    tiny = load_model("tiny", device="cpu").tokenizer
    path = write(tmp_path / "my.jsonl", 2, chat=False)
    plan = plan_sweep(choices(path, chat_template="auto"))
    assert {cell.sample.chat for cell in plan.cells} == {False}
    assert tiny.chat_template is None or "without the chat template" in " ".join(plan.notes)


def test_two_files_of_a_name_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "my.jsonl", 2)
        folders.append(run_sweep(choices(path, out=None)).folder)
    assert folders[0] != folders[1]


def test_tokens_start_where_they_start() -> None:
    tokenizer = load_model("tiny", device="cpu").tokenizer
    text = "The secret word for f\u00f6x is \U0001f642 melon."
    starts = token_starts(tokenizer, text)
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert len(starts) == len(tokenizer.encode(text, add_special_tokens=False))


def test_positions_move_with_what_is_cut() -> None:
    sample = Sample("t", "s", 0, "0123456789", "x", 1, question_at=8, context_span=(2, 7))
    shorter = without(sample, 4, 7)
    assert (shorter.prompt, shorter.context_span, shorter.question_at) == ("0123789", (2, 4), 5)


def test_an_edit_that_is_taken_back_counts_again(tmp_path: Path) -> None:
    facts = "The secret word for grey owl is melon.\nThe secret word for red fox is banjo.\n"
    path = write(
        *(tmp_path / "my.jsonl", 2, 3, 4),
        instruction="Each line below states one fact. Remember them all, then answer the question "
        "at the end in the words of the text.\n\n",
        context=facts,
        question="\nQuestion: What is the secret word for grey owl?\n",
        max_new_tokens=16,
    )
    good = path.read_text()
    assert measured(choices(path))[0] == 6
    before = make_report([tmp_path / "out"]).points
    path.write_text(good.replace('"answer": "melon"', '"answer": "lemon"', 1))
    assert measured(choices(path))[0] == 2
    edited = make_report([tmp_path / "out"])
    assert "my: 2 cells of samples that were edited since are left out" in edited.notes
    assert edited.points["score"].sum() < before["score"].sum()
    path.write_text(good)
    assert measured(choices(path))[0] == 0
    assert make_report([tmp_path / "out"]).points.equals(before)
    path.write_text("".join(good.splitlines(keepends=True)[:2]))
    assert measured(choices(path))[0] == 0
    assert set(make_report([tmp_path / "out"]).points["samples"]) == {2}
    assert measured(choices(path, samples=1))[0] == 0
    assert set(make_report([tmp_path / "out"]).points["samples"]) == {2}


def test_tasks_may_be_given_as_objects_and_beside_names(tmp_path: Path) -> None:
    task = open_task(str(write(tmp_path / "my.jsonl", 2)))
    choice = replace(choices(tmp_path / "my.jsonl"), task=(task, "recall"), samples=2, context=256)
    plan = plan_sweep(choice)
    assert {(cell.sample.task, cell.sample.index) for cell in plan.cells} == {
        *(("my", 0), ("recall", 0), ("recall", 1))
    }
    assert invocation(choice, plan)["settings"]["task"] == ["my", "recall"]
    assert {cell.sample.task: cell.most for cell in plan.cells} == {"my": 256, "recall": None}
