"""The full scale: what is missing, what is left out, and its rehearsal from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pandas import read_csv

from kvbench.reproduce.datasets import published_data_sets
from kvbench.reproduce.full import (
    full_choices,
    in_turn,
    left_out_notes,
    missing_data,
    workloads,
)

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


def test_a_rehearsal_runs_all_eight_tasks(tmp_path: Path) -> None:
    how = ["--method", "prulong,snapkv", "--budgets", "0.5", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "kvbench", "reproduce", "--scale", "full", "--rehearse", *how],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
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
