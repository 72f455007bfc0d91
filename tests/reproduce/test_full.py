"""The full scale: what is missing, what is left out, and its rehearsal from end to end."""

import json
import shutil
from inspect import signature
from pathlib import Path

import pytest
from helpers.process import kvbench_here
from pandas import read_csv

from kvbench.cli.reproduce import OF_SCALE, reproduce
from kvbench.errors import InputError
from kvbench.judge import use_judge
from kvbench.models.load import load_model
from kvbench.report.figures import Picture
from kvbench.reproduce.datasets import published_data_sets
from kvbench.reproduce.full import (
    absent_data,
    full_choices,
    in_turn,
    left_out_notes,
    missing_data,
    workloads,
)
from kvbench.reproduce.rehearsal import make_task_files

TASKS = list(dict.fromkeys(each.task for each in published_data_sets().values()))


def test_missing_task_files_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    for each in published_data_sets().values():
        if not each.left_out and each.name not in ("json_kv", "html_to_tsv_2k"):
            file = tmp_path / each.task / f"{each.name}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.touch()
    helmet, longproc = missing_data(tmp_path, False, TASKS)
    assert (
        f"json_kv; make them with 'kvbench convert helmet CHECKOUT --task recall --out {tmp_path}"
        in helmet
    )
    assert "html_to_tsv_2k" in longproc
    assert missing_data(tmp_path, False, ["rag", "icl"]) == []
    *_, judged = missing_data(tmp_path, True, TASKS)
    assert "longqa/narrativeqa_130772.jsonl, summ/infbench_sum_eng_129672.jsonl" in judged
    assert "metric 'judged'" in judged


def test_data_sets_without_a_judge_are_named(tmp_path: Path) -> None:
    alone = full_choices(tmp_path, tmp_path, options={}, judge=None)
    assert "Left out: narrativeqa_130772, infbench_sum" in left_out_notes(alone)[0]
    judged = full_choices(tmp_path, tmp_path, options={}, judge=("big", "http://host/v1"))
    assert left_out_notes(judged)[0].startswith("Judged by big at http://host/v1: narrativeqa")


def test_workloads_have_the_papers_lengths_and_numbers() -> None:
    loads = {load.data_set: load for load in workloads(None, context=131072)}
    assert len(loads) == len(published_data_sets())
    assert loads["kilt_nq"].samples == 600
    assert loads["msmarco_rerank_psg"].samples == 123
    assert (loads["html_to_tsv_8k"].prompt, loads["html_to_tsv_8k"].answer) == (38000, 10240)
    assert loads["json_kv"].prompt + loads["json_kv"].answer <= 131072
    short = workloads(["recall", "mine"], context=1000, samples=10, answer=20)
    assert [load.samples for load in short] == [3, 3, 2, 2, 10]
    assert all(load.prompt + load.answer <= 1000 for load in short)
    assert in_turn([1, 5, 2], 7) == [1, 4, 2]
    assert in_turn([1, 5], None) == [1, 5]


def test_a_rehearsals_data_are_completed_whatever_a_killed_process_left(tmp_path: Path) -> None:
    """Any file may be missing; what is there stays as it is, and what is made is the same again."""

    def make(folder: Path) -> dict[str, bytes]:
        wanted = {each.task for each in absent_data(folder, True, ["travel_planning", "icl"])}
        make_task_files(folder, load_model("tiny").tokenizer, 1, 42, wanted)
        assert not absent_data(folder, True, ["travel_planning", "icl"])
        assert sorted(path.name for path in folder.iterdir()) == ["icl", "travel_planning"]
        return {path.name: path.read_bytes() for path in folder.glob("*/*")}

    whole = make(tmp_path / "whole")
    assert len(whole) == 1 + 5 + 1  # files, of which one is the manifest of both
    for left in ("", "icl", "icl/manifest.json", "icl/icl_nlu_8296shot_balance.jsonl"):
        folder = tmp_path / "killed"
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "icl")
        (folder / "travel_planning/travel_planning_2k.jsonl").unlink()
        if left.startswith("icl"):
            (folder / "icl").mkdir()
        if left.count("."):
            shutil.copy(tmp_path / "whole" / left, folder / left)
        assert make(folder) == whole
        shutil.rmtree(folder)


REHEARSAL = "--scale full --rehearse"
WRONG = {
    "--scale full --task recall,nosuch": "the full scale has no task 'nosuch': known: html_to_tsv",
    "--scale full --task recal": "no task 'recal': did you mean 'recall'?",
    "--scale full --method nosuch": "unknown method 'nosuch'",
    "--scale full --task summ": "a language model judges the answers of summ: give --judge",
    "--scale full --judge big": "give --judge and --judge-url",
    "--scale full --judge-url http://host/v1": "give --judge and --judge-url",
    "--scale full --judge big --judge-url foo": "the judge's address 'foo' does not start with",
    "--scale full --model tiny": "--model has no effect with --scale full, only with --rehearse",
    "--scale full --seed 1": "--seed has no effect with --scale full, only with --scale small",
    f"{REHEARSAL} --task recall,nosuch": "the full scale has no task 'nosuch'",
    f"{REHEARSAL} --method snapkv,nosuch": "unknown method 'nosuch'",
    f"{REHEARSAL} --data nowhere": "--data has no effect with --rehearse, only with --scale full",
    f"{REHEARSAL} --option foo=1": "--option has no effect with --rehearse",
    f"{REHEARSAL} --judge x --judge-url http://host/v1": "--judge has no effect with --rehearse",
    f"{REHEARSAL} --workers 2": "only with --scale small and --scale full",
    f"{REHEARSAL} --dry-run": "only with --scale small and --scale full",
    "--task recall": "--task has no effect with --scale small, only with --scale full and --rehe",
    "--budgets 0.5": "--budgets has no effect with --scale small",
    "--judge x": "--judge has no effect with --scale small",
    "--rehearse": "add --scale full",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_cannot_be_reproduced_is_refused_before_anything_is_written(
    words: str, tmp_path: Path
) -> None:
    done = kvbench_here("reproduce", *words.split(), folder=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert WRONG[words] in line
    assert list(tmp_path.iterdir()) == []


def test_every_option_belongs_to_a_scale() -> None:
    assert set(signature(reproduce).parameters) - {"ctx"} <= set().union(*OF_SCALE.values())


def test_choices_of_the_full_scale_name_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task 'nosuch'"):
        full_choices(tmp_path, tmp_path, options={}, judge=None, task=("recall", "nosuch"))
    some = full_choices(tmp_path, tmp_path, options={}, judge=None, task=("recall", "summ"))
    assert some.task == (str(tmp_path / "recall"),)


def test_a_rehearsal_runs_all_eight_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last file; pictures are not rendered, which takes more time than all else."""
    monkeypatch.setattr(Picture, "files", lambda self: {f"{self.stem}.png": b"drawn elsewhere"})
    how = ["--method", "prulong,snapkv", "--budgets", "0.5", "--out", "out"]
    done = kvbench_here("reproduce", *REHEARSAL.split(), *how, folder=tmp_path)
    use_judge(None)  # what a process that ends need not do
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("REHEARSAL")
    out = tmp_path / "out"
    table = read_csv(out / "table.csv")
    ours = table[table["baseline"].notna()]
    assert set(ours["task"]) == set(TASKS)
    # chunks are 1/128 of the paper's
    assert set(ours.loc[ours["method"] == "prulong", "prefill_chunk"]) == {256, 1024, 64}
    # what the embedded model cannot do has no critical footprint, not a made-up one
    nothing = ours["baseline"] == 0
    assert set(ours.loc[nothing, "task"]) >= {"travel_planning"}
    assert ours.loc[nothing, "critical_footprint"].isna().all()
    assert ours.loc[~nothing, "critical_footprint"].notna().all()
    assert {"recall", "rag", "rerank", "summ", "longqa"} <= set(ours.loc[~nothing, "task"])
    text = (out / "table.md").read_text()
    assert text.startswith("**REHEARSAL")
    assert "paper \\(not comparable\\)" in text or "paper (not comparable)" in text
    assert "not measurable" in text
    records = [
        json.loads(line)
        for file in (out / "run").glob("samples-*.jsonl")
        for line in file.read_text().splitlines()
    ]
    assert not [record["error"] for record in records if record.get("error")]
    assert {record["subtask"] for record in records} == set(published_data_sets())
