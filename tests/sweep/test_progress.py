"""The time left: by the trial before the first group ends, by what was measured from then on."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.sweep import progress as module
from kvbench.sweep.progress import Listener, Progress


class Heard(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def started(self, progress: Progress) -> None:
        self.lines.append(f"start{progress.left}")

    def advanced(self, progress: Progress) -> None:
        self.lines.append(f"{progress.task} {progress.done}/{progress.cells}{progress.left}")


def cell(task: str, tokens: int) -> Any:
    return SimpleNamespace(sample=SimpleNamespace(task=task), tokens=tokens)


def test_a_listener_hears_the_task_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    heard = Heard()
    progress = Progress(heard, cells=3, tokens=400)
    progress.start(60.0)
    now += 10
    progress.starting([cell("recall", 100)])
    now += 10
    progress.finished(cell("recall", 100))
    now += 5
    progress.starting([cell("rag", 300)])
    now += 100
    assert progress.seconds_left == 0
    assert heard.lines == [
        "start, about 60 s left",
        "recall 0/3, about 50 s left",
        "recall 1/3, about 60 s left",  # a quarter of the tokens took 20 s
        "rag 1/3, about 55 s left",
    ]


def test_without_a_trial_nothing_is_said_until_a_cell_is_done() -> None:
    heard = Heard()
    progress = Progress(heard, cells=1, tokens=10)
    progress.start(None)
    progress.starting([cell("rag", 10)])
    assert heard.lines == ["start", "rag 0/1"]
