"""`kvbench check`: verdicts on methods and tasks, and exit codes."""

import random
from dataclasses import replace
from typing import Any

import pytest
from helpers import broken

from kvbench.cli.app import main
from kvbench.registry import methods, tasks
from kvbench.sweep import check
from kvbench.task import Sample, Task, Tokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "SHAPES", check.SHAPES[-1:])
    monkeypatch.setattr(check, "CONTEXTS", check.CONTEXTS[:1])


def verdicts(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str], str]:
    """The exit code, the verdict of each check, and all that is printed."""
    code = main(["check", name])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    return code, {line[1]: line[0] for line in lines}, out


SHIPPED = ["snapkv", "knorm-naive", "recency", "prulong+knorm-naive", "h2o", "quest", "kvzip"]
SHIPPED += ["ada-snapkv", "snapkv-bounded"]


@pytest.mark.parametrize("name", SHIPPED)
def test_the_methods_that_ship_hold(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, found, _ = verdicts(name, capsys)
    assert code == 0
    assert found == dict.fromkeys(check.METHOD_CHECKS, "ok")


@pytest.mark.parametrize("name", tasks.names())
def test_the_tasks_that_ship_hold(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "CONTEXTS", (256, 1024))
    code, found, _ = verdicts(name, capsys)
    assert code == 0
    assert set(found.values()) <= {"ok", "skip"}
    assert set(found) == set(check.TASK_CHECKS)


DRAWN = random.Random(0)
METHODS: list[tuple[Any, str]] = [
    (broken.method(broken.SCORES["nan"][0]), "answers"),
    (broken.method(windows=broken.WINDOWS["heads"][0]), "answers"),
    (broken.writing(broken.WRITES["queries"]), "read-only"),
    (broken.writing(lambda view: view.positions.numpy().fill(0)), "read-only"),
    (broken.method(lambda view: broken.norms(view) + DRAWN.random() * view.keys[..., 0]), "repeat"),
]


@pytest.mark.parametrize(("bad", "wrong"), METHODS)
def test_a_bad_method_falls(
    bad: Any, wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(methods._known, "bad", type(bad))
    code, found, out = verdicts("bad", capsys)
    assert code == 1
    assert any(verdict == "FAIL" for check, verdict in found.items() if check.startswith(wrong))
    assert "prefill chunk" in out
    if wrong == "answers":  # no other check was made
        assert set(found.values()) == {"FAIL", "skip"}


class Guess(Task):
    """A task without faults."""

    name, metric, subtasks = "guess", "match", ("a", "b")

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """A short text."""
        word = f"{index}-{seed}"
        subtask = self.subtasks[index % 2]
        return Sample("guess", subtask, index, f"Say {word}.", word, 8)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the word occurs."""
        return float(sample.reference in prediction)


def with_sample(**changes: Any) -> Any:
    """The task, with other samples."""

    class Other(Guess):
        def sample(self, index: int, **how: Any) -> Sample:
            made = super().sample(index, **how)
            return replace(made, **{k: f() if callable(f) else f for k, f in changes.items()})

    return Other


def with_score(score: Any) -> Any:
    """The task, with other scores."""
    return type("Other", (Guess,), {"score": lambda self, prediction, sample: score(prediction)})


TASKS: list[tuple[Any, str]] = [
    (with_sample(reference={1}), "samples"),
    (with_sample(max_new_tokens=300), "length"),
    (with_sample(prompt=lambda: f"Say {random.random()}"), "repeatable"),
    (with_sample(prompt="Say x"), "different"),
    (with_sample(subtask="a"), "subtasks"),
    (with_score(lambda prediction: len(prediction)), "scores"),
    (with_score(lambda prediction: float(prediction)), "scores"),
]


@pytest.mark.parametrize(("bad", "wrong"), TASKS)
def test_a_bad_task_falls(
    bad: Any, wrong: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks._known, "guess", Guess)
    assert verdicts("guess", capsys)[0] == 0
    monkeypatch.setitem(tasks._known, "guess", bad)
    code, found, _ = verdicts("guess", capsys)
    assert code == 1
    assert found[wrong] == "FAIL"


def test_an_unknown_name_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "snapk"]) == 2
    assert "did you mean 'snapkv'?" in capsys.readouterr().err
    assert main(["check", "recal"]) == 2
    assert "did you mean 'recall'?" in capsys.readouterr().err


def test_a_method_with_its_own_capacity_has_no_closed_form(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, found, out = verdicts("prulong+snapkv-patched", capsys)
    assert code == 0
    assert found == {**dict.fromkeys(check.METHOD_CHECKS, "ok"), "counts": "skip"}
    assert "no closed form for a method with its own capacity" in out
