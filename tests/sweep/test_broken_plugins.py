"""One bad sample or method costs its own cells; the rest of the sweep is measured, unchanged."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from helpers import broken

from kvbench.errors import InputError
from kvbench.method import Method
from kvbench.records import Record, read_records
from kvbench.registry import methods, tasks
from kvbench.sweep.command import Choices, SweepResult, run_sweep
from kvbench.task import Sample, Task, Tokenizer

Change = Callable[[Sample], Any]


class Echo(Task):
    """Sample 1 is changed by `change`."""

    name, metric, subtasks = "echo", "exact match", ("any",)
    change: Change = staticmethod(lambda sample: sample)

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """A short list of words."""
        words = f"{'the badger and the crane ' * 12} {index}"
        made = Sample("echo", "any", index, words, ["x"], 4)
        return type(self).change(made) if index == 1 else made

    def score(self, prediction: str, sample: Sample) -> float:
        """Half; it also tries to change what other cells are scored by."""
        sample.reference.append("changed")
        return 0.5


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def changed(**values: Any) -> Change:
    return lambda sample: Sample(**{**vars(sample), **values})


def sweep(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    change: Change = lambda sample: sample,
    bad: Method | None = None,
) -> SweepResult:
    """A sweep of 3 samples under full attention, SnapKV and, if given, a bad method."""
    monkeypatch.setattr(Echo, "change", staticmethod(change))
    monkeypatch.setitem(tasks._known, "echo", Echo)
    names = ["snapkv"]
    if bad is not None:
        monkeypatch.setitem(methods._known, "bad", type(bad))
        names.append("bad")
    return run_sweep(
        Choices(
            method=tuple(names), task=("echo",), budgets=(0.3, 0.6), samples=3, out=folder / "r"
        )
    )


SAMPLES: dict[str, tuple[Change, str]] = {
    "it raises": (raising(ValueError("no such\nline")), "ValueError: no such line"),
    "it ends the program": (raising(SystemExit(5)), "SystemExit: 5"),
    "bad input": (raising(InputError("too short")), "too short"),
    "nothing": (lambda sample: None, "returns a NoneType; expected a Sample"),
    "an empty prompt": (changed(prompt=""), "its prompt is empty"),
    "a prompt of bytes": (changed(prompt=b"x"), "its prompt is a bytes; expected a text"),
    "a set": (changed(reference={1, 2}), "its reference cannot be stored as JSON"),
    "nan": (changed(reference=float("nan")), "its reference cannot be stored as JSON"),
    "no answer": (changed(max_new_tokens=0), "its max_new_tokens is 0; expected an int"),
    "half a token": (changed(max_new_tokens=2.5), "its max_new_tokens is 2.5"),
    "too long": (changed(max_new_tokens=10**6), "takes 10000"),
    "another index": (changed(index=7), "calls itself sample 7 of 'echo'; expected sample 1"),
    "another task": (changed(task="rag"), "calls itself sample 1 of 'rag'"),
    "another subtask": (changed(subtask=None), "its subtask is a NoneType"),
}


@pytest.mark.parametrize(("change", "message"), SAMPLES.values(), ids=SAMPLES)
def test_a_bad_sample_is_named_and_the_others_are_measured(
    change: Change, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = sweep(monkeypatch, tmp_path, change)
    assert (result.planned, result.measured, result.exit_code) == (9, 6, 1)
    assert [(r.task, r.sample, r.score) for r in result.failed] == [("echo", 1, None)] * 3
    assert {r.method for r in result.failed} == {"full", "snapkv"}
    for record in result.failed:
        assert (record.error or "").startswith("sample 1 of task 'echo': ")
        assert message in (record.error or "")
    assert sorted(r.sample for r in read_records(tmp_path / "r") if r.error is None) == [
        *[0] * 3,
        *[2] * 3,
    ]
    assert {json.dumps(r.reference) for r in read_records(tmp_path / "r") if not r.error} == {
        '["x"]'
    }
    # the same command tries the failed cells again
    again = sweep(monkeypatch, tmp_path)
    assert (again.measured, again.exit_code) == (3, 0)


def test_bad_input_that_concerns_all_samples_stops_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "sample", raising(InputError("choose a longer --context")))
    with pytest.raises(InputError, match="choose a longer --context"):
        sweep(monkeypatch, tmp_path)
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr(Echo, "sample", raising(KeyError("broken")))
    assert len(sweep(monkeypatch, tmp_path).failed) == 9


def test_a_task_that_makes_another_sample_each_time_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter(range(99))
    sample = Echo.sample

    def another(self: Echo, index: int, **given: Any) -> Sample:
        made = sample(self, index, **given)
        return replace(made, prompt=f"{made.prompt} {next(numbers)}")

    monkeypatch.setattr(Echo, "sample", another)
    result = sweep(monkeypatch, tmp_path)
    assert (result.measured, len(result.failed), result.exit_code) == (0, 9, 1)
    assert all("makes another sample each time" in (r.error or "") for r in result.failed)


def test_a_task_that_cannot_be_made_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Echo, "__init__", raising(ValueError("no data")))
    with pytest.raises(InputError, match="task 'echo' cannot be made: ValueError: no data"):
        sweep(monkeypatch, tmp_path)


def kept(records: list[Record]) -> dict[tuple[str, float, int], Any]:
    return {
        (r.method, r.budget, r.sample): (r.prediction, r.resident_rows, r.kv_bytes_peak, r.score)
        for r in records
        if r.method != "bad"
    }


NUMBERS = count()
BAD: dict[str, tuple[Method, str]] = {
    "scores": (broken.method(broken.SCORES["shape"][0]), "layer 0: scores returns a tensor [4, 5]"),
    "nan": (broken.method(broken.SCORES["nan"][0]), "NaN or infinite"),
    "capacity": (broken.method(capacity=broken.CAPACITIES["negative"][0]), "capacity returns -3"),
    "windows": (broken.method(windows=broken.WINDOWS["layers"][0]), "windows returns 1 layers"),
    "windows that raise": (broken.method(windows=raising(KeyError("x"))), "KeyError: 'x'"),
    "ends the program": (broken.method(raising(SystemExit(3))), "SystemExit: 3"),
    "writes": (broken.writing(broken.WRITES["queries"]), "scores writes to the view"),
    "writes to blocks": (broken.writing(broken.WRITES["NumPy"]), "scores writes to the view"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_a_bad_method_is_named_and_the_others_are_measured_unchanged(
    bad: Method, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep(monkeypatch, tmp_path / "without")
    expected = kept(read_records(tmp_path / "without" / "r"))
    result = sweep(monkeypatch, tmp_path, bad=bad)
    assert (result.measured, result.exit_code) == (9, 1)
    assert [r.method for r in result.failed] == ["bad"] * 6
    assert all(message in (r.error or "") for r in result.failed)
    assert kept(read_records(tmp_path / "r")) == expected


@pytest.mark.parametrize(
    ("remarks", "message"),
    [
        (raising(KeyError("x")), "KeyError: 'x'"),
        (lambda self: {"x": {1}}, "not JSON serializable"),
        (lambda self: {"x": float("inf")}, "not JSON compliant"),
        (lambda self: {"x": next(NUMBERS)}, "they change each time"),
    ],
)
def test_remarks_that_cannot_be_recorded_cost_their_method_only(
    remarks: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = broken.method()
    monkeypatch.setattr(type(bad), "remarks", remarks)
    result = sweep(monkeypatch, tmp_path, bad=bad)
    assert (result.measured, result.exit_code) == (9, 1)
    assert {r.method for r in result.failed} == {"bad"}
    assert all(message in (r.error or "") for r in result.failed)
    assert all("method 'bad': its options and remarks" in (r.error or "") for r in result.failed)
