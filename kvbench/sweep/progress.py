"""How far a sweep is: counted in tokens, and told to a listener that shows it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvbench.sweep.plan import Cell


class Listener:
    """Hears what a sweep does. This one ignores it; the command line's shows it."""

    def note(self, text: str) -> None:
        """One line for the user, such as which run is continued."""

    def note_on_others(self, text: str) -> None:
        """One line about other processes that write to the same run folder."""
        self.note(text)

    def started(self, progress: "Progress") -> None:
        """Measuring starts. `progress` is the same object in every call, and kept up to date."""

    def advanced(self, progress: "Progress") -> None:
        """A group of cells starts, or a cell is finished."""

    def stopped(self) -> None:
        """Measuring ended, or was interrupted."""


@dataclass
class Progress:
    """How many cells of a sweep are done, and how long the rest will take; tells `listener`."""

    listener: Listener
    cells: int
    tokens: int  # of all cells
    task: str = ""  # of the group that is being measured
    done: int = 0
    done_tokens: int = 0
    began: float = 0.0  # seconds of time.monotonic
    expected: float | None = None  # seconds for all cells; None while nothing is known

    def start(self, expected: float | None) -> None:
        """Measuring starts; it will take about `expected` seconds."""
        self.began, self.expected = time.monotonic(), expected
        self.listener.started(self)

    def starting(self, batch: Sequence[Cell]) -> None:
        """A group of cells starts."""
        self.task = batch[0].sample.task
        self.listener.advanced(self)

    def finished(self, cell: Cell) -> None:
        """Count a cell."""
        self.count(self.task, cell.tokens)

    def count(self, task: str, tokens: int) -> None:
        """Count a cell; from the first one on, the time left is predicted by tokens a second."""
        self.task = task
        self.done += 1
        self.done_tokens += tokens
        self.expected = (time.monotonic() - self.began) * self.tokens / max(1, self.done_tokens)
        self.listener.advanced(self)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all cells are done; None while nothing is known about it."""
        if self.expected is None:
            return None
        return max(0.0, self.began + self.expected - time.monotonic())

    @property
    def left(self) -> str:
        """`seconds_left` as people say it; empty while nothing is known about it."""
        left = self.seconds_left
        return "" if left is None else f", about {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 5 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
