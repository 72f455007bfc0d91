"""Sweeps over seeds and options: the cells are those of a run with one seed and one value."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import InputError
from kvbench.records import Record, read_records
from kvbench.registry import tasks
from kvbench.run_folder import read_settings
from kvbench.spec import labels_of, parse_method, parse_methods
from kvbench.sweep.command import Choices, plan_sweep, run_sweep
from kvbench.task import Sample, Task

LINES = [
    {
        "prompt": f"The word for the {animal} is {word}. Question: which word? Answer:",
        "reference": [word],
        "metric": "exact_match",
        "max_new_tokens": 2,
    }
    for animal, word in (("owl", "cherry"), ("fox", "lemon"))
]
MEASURED = ("fingerprint", "prediction", "score", "resident_rows", "kv_bytes_peak", "sample_code")


def choices(folder: Path, **others: Any) -> Choices:
    file = folder / "lines.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    how: dict[str, Any] = {"method": ("random", "snapkv"), "task": ("rag", str(file))}
    how |= {"budgets": (0.5,), "samples": 2, "context": 256, "device": "cpu"}
    return Choices(**{**how, **others})


def by_cell(folder: Path) -> dict[Any, Record]:
    records = read_records(folder)
    found = {(r.task, r.method, str(r.options), r.sample, r.sample_seed): r for r in records}
    assert len(found) == len(records)
    return found


def test_cells_of_several_seeds_are_those_of_each_alone(tmp_path: Path) -> None:
    both = choices(tmp_path, seed=(3, 5), out=tmp_path / "both")
    plan = plan_sweep(both)
    assert (plan.planned, plan.common["seed"]) == (24, [3, 5])
    # the rows of a question that is read share its prefill, whatever their seeds
    groups = [{(c.sample.task, c.sample.index, c.sample_seed) for c in b} for b, _ in plan.batches]
    assert any({("lines", 0, 3), ("lines", 0, 5)} <= group for group in groups)
    run_sweep(both)
    together = by_cell(tmp_path / "both")
    for seed in (3, 5):
        alone = choices(tmp_path, seed=seed, out=tmp_path / f"s{seed}")
        assert run_sweep(alone).planned == 12
        assert (
            json.loads((tmp_path / f"s{seed}" / "run.json").read_text())["common"]["seed"] == seed
        )
        for key, record in by_cell(tmp_path / f"s{seed}").items():
            assert record.sample_seed == seed
            for name in MEASURED:
                assert getattr(together[key], name) == getattr(record, name), name
    assert run_sweep(both).reused == 24
    # seeds make other samples of a task that makes them, and read the same ones
    tails = {(r.task, r.sample_seed, r.sample): r.prompt_tail for r in together.values()}
    assert tails["rag", 3, 0] != tails["rag", 5, 0]
    assert tails["lines", 3, 0] == tails["lines", 5, 0]


def test_samples_count_for_each_seed_and_one_seed_is_a_number(tmp_path: Path) -> None:
    plan = plan_sweep(choices(tmp_path, seed=(1, 2, 1), samples=1))
    assert [(c.sample_seed, c.sample.index) for c in plan.cells[:6]] == [(1, 0)] * 3 + [(2, 0)] * 3
    assert choices(tmp_path, seed=(4,)) == choices(tmp_path, seed=4)
    with pytest.raises(InputError, match="seed is empty"):
        choices(tmp_path, seed=())
    with pytest.raises(InputError, match="seed must be at least 0"):
        choices(tmp_path, seed=(0, -1))


class Same(Task):
    """Makes the same samples with every seed."""

    name, metric, subtasks = "same", "exact match", ("any",)

    def sample(self, index: int, **given: Any) -> Sample:
        """One word."""
        return Sample("same", "any", index, f"word {index}", ["x"], 2)

    def score(self, prediction: str, sample: Sample) -> float:
        """None."""
        return 0.0


def test_a_task_that_heeds_no_seed_takes_one_seed_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks._known, "same", Same)
    given = choices(tmp_path, task=("same",), seed=(0, 1))
    with pytest.raises(InputError, match="makes the same samples with the seeds 0 and 1"):
        plan_sweep(given)
    assert plan_sweep(replace(given, seed=1)).planned == 6


def test_every_value_of_an_option_is_a_method_of_its_own(tmp_path: Path) -> None:
    options = {"snapkv.window": ("4", "8"), "kernel": ("3", "5"), "sinks": ("1", "2")}
    assert labels_of(parse_methods("snapkv", options)) == [
        "snapkv (window=4, kernel=3)",
        "snapkv (window=4, kernel=5)",
        "snapkv (window=8, kernel=3)",
        "snapkv (window=8, kernel=5)",
    ]
    assert labels_of(parse_methods("recency", options)) == [
        "recency (sinks=1)",
        "recency (sinks=2)",
    ]
    assert parse_methods("knorm", options) == [parse_method("knorm", {})]
    # the value for one method beats that for all
    one = parse_methods("snapkv", {"window": ("4", "8"), "snapkv.window": "16"})
    assert [spec.options["window"] for spec in one] == [16]
    both = parse_methods("random-heads+snapkv", options)
    assert len(both) == 8
    with pytest.raises(InputError, match="window must be at least 1"):
        parse_methods("snapkv", {"window": ("8", "0")})

    swept = choices(
        tmp_path,
        method=("snapkv",),
        task=("rag",),
        samples=1,
        option={"snapkv.window": ("4", "8")},
        out=tmp_path / "r",
    )
    assert run_sweep(swept).measured == 3
    run = read_settings(tmp_path / "r")
    assert run is not None
    assert run["invocations"][0]["experiment"]["options"] == {"snapkv.window": ["4", "8"]}
    again = run_sweep(replace(swept, option={"snapkv.window": "8"}))
    assert (again.planned, again.reused) == (2, 2)  # the same cells as alone
