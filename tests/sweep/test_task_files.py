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
    path.write_text(good)
    monkeypatch.undo()
    plan = plan_sweep(choices(path, out=tmp_path / "other"))
    monkeypatch.setattr("kvbench.sweep.command.plan_sweep", lambda _: plan)
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


def runs_of(tmp_path: Path, *names: str, out: str = "") -> list[Path]:
    """Runs of files `my.jsonl` in folders of these names; each has its own answer."""
    folders = []
    for name in names:
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "my.jsonl", 2, 3, answer=f"melon {name}")
        folders.append(run_sweep(choices(path, out=tmp_path / (out or f"out-{name}"))).folder)
    return folders


def test_a_report_keeps_two_files_of_a_name_apart(tmp_path: Path) -> None:
    report = make_report(runs_of(tmp_path, "a", "b"))
    assert set(report.points["task"]) == {"my (a/my.jsonl)", "my (b/my.jsonl)"}
    assert set(report.points["samples"]) == {2}
    assert not [note for note in report.notes if "edited" in note or "more than once" in note]
    assert set(make_report([tmp_path / "out-a"]).points["task"]) == {"my"}


def test_a_report_keeps_a_file_and_a_generated_task_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "recall.jsonl", 2, 3)
    read = run_sweep(choices(path, context=256)).folder
    made = replace(choices(path, context=256), task=("recall",), samples=3, out=tmp_path / "made")
    report = make_report([read, run_sweep(made).folder])
    samples = dict(zip(report.points["task"], report.points["samples"], strict=True))
    assert samples == {f"recall ({path.parent.name}/recall.jsonl)": 2, "recall (generated)": 3}
    assert not [note for note in report.notes if "older code" in note]


def test_one_folder_takes_one_source_of_a_name(tmp_path: Path) -> None:
    (folder,) = runs_of(tmp_path, "a", out="same")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(InputError, match=r"holds other samples of a task 'my', from .*a/my.jsonl"):
        runs_of(tmp_path, "b", out="same")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    read = run_sweep(choices(write(tmp_path / "recall.jsonl", 2), context=256))
    made = replace(choices(tmp_path / "recall.jsonl", context=256), task=("recall",))
    with pytest.raises(InputError, match=r"other samples of a task 'recall', .* kvbench itself"):
        run_sweep(made)
    assert read.measured == 2


def test_one_folder_takes_one_source_of_processes_that_start_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b").mkdir()
    other = choices(write(tmp_path / "b" / "my.jsonl", 2), out=tmp_path / "same")
    plan = plan_sweep(other)  # before the folder is there
    (folder,) = runs_of(tmp_path, "a", out="same")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("kvbench.sweep.command.plan_sweep", lambda _: plan)
    with pytest.raises(InputError, match="holds other samples of a task 'my'"):
        run_sweep(other)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_file_that_was_moved_keeps_its_finished_work(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    first = write(tmp_path / "a" / "my.jsonl", 2, 3)
    out = tmp_path / "out"
    assert measured(choices(first, out=out))[0] == 4
    moved = first.rename(tmp_path / "b" / "my.jsonl")
    assert measured(choices(moved, out=out))[0] == 0
    assert measured(choices(moved, out=out, budgets=(0.5, 0.7)))[0] == 2
    write(moved, 2, 4)  # an edit after the move
    assert measured(choices(moved, out=out))[0] == 2
    elsewhere = run_sweep(choices(write(tmp_path / "c" / "my.jsonl", 2, 4), method=("lagkv",)))
    report = make_report([out, elsewhere.folder])
    assert set(report.points["task"]) == {"my"}
    assert set(report.points.loc[report.points["budget"] != 0.7, "samples"]) == {2}
    assert {record.source for record in read_records(out)} == {str(first), str(moved)}


def test_records_of_before_sources_were_kept_take_that_of_their_run(tmp_path: Path) -> None:
    folders = runs_of(tmp_path, "a", "b")
    for folder in folders:
        for path in folder.glob("samples-*"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            path.write_text("".join(json.dumps(row | {"source": ""}) + "\n" for row in rows))
    assert set(make_report(folders[:1]).points["samples"]) == {2}
    with pytest.raises(InputError, match="do not say where their samples were read"):
        make_report(folders)


@pytest.mark.parametrize("compress", ["prompt", "context"])
def test_what_a_line_says_of_its_parts_is_part_of_the_sample(compress: str, tmp_path: Path) -> None:
    """Else the old cells stay: of another prompt where it is cut, of another end of the context."""
    row = {
        "prompt": " ".join(FACTS * 2) + "\nQuestion: What is the secret word for fox?\nAnswer:",
        "answer": "melon",
        "metric": "substring_exact_match",
        "max_new_tokens": 8,
    }
    path = tmp_path / "my.jsonl"
    footprints = []
    for at in (100, 60, 100):
        path.write_text(json.dumps({**row, "question_at": at, "context_span": [0, at]}))
        count, _ = measured(choices(path, compress=compress))
        footprints.append(list(make_report([tmp_path / "out"]).points["kv_footprint"])[1])
        assert count == (2 if len(footprints) < 3 else 0)
    assert footprints[0] == footprints[2]
    assert (footprints[0] == footprints[1]) == (compress == "prompt")


def test_tokens_start_where_they_start() -> None:
    tokenizer = load_model("tiny", device="cpu").tokenizer
    text = "The secret word for f\u00f6x is \U0001f642 melon."
    starts = token_starts(tokenizer, text)
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert len(starts) == len(tokenizer.encode(text, add_special_tokens=False))
    assert token_starts(tokenizer, "x\u4f60\u597dy") == [0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    "words", ["\U0001f642\u4f60", "\u4f60\u597d\u3002", "\u041c\u043e\u0441\u043a\u0432\u0430 "]
)
def test_text_that_is_read_as_bytes_is_cut_by_characters(words: str, tmp_path: Path) -> None:
    context = words * 100
    path = write(tmp_path / "my.jsonl", 1, instruction="", context=context)
    whole = prompts(plan_sweep(choices(path)))[0]
    for most in (60, 100, 200):
        plan = plan_sweep(choices(path, context=most, too_long="cut"))
        kept = len(prompts(plan)[0])
        assert most - 8 - 4 < kept <= most - 8  # less than a character is lost
        assert plan.cells[0].cut_tokens == len(whole) - kept
    bare = prompts(plan_sweep(choices(write(path, 1, instruction="", context=""))))[0]
    write(path, 1, instruction="", context=context)
    with pytest.raises(InputError, match="line 1: nothing of its context fits"):
        plan_sweep(choices(path, context=len(bare) + 8, too_long="cut"))


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
