"""What the command line says on stderr: lines, and how far a sweep is."""

import sys
import time
from typing import TYPE_CHECKING

from kvbench.escape import console, plain
from kvbench.sweep.progress import Listener, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 20.0


def say(text: str, name: str = "kvbench: ") -> None:
    """Print one line for the user on stderr."""
    print(plain(f"{name}{text}"), file=sys.stderr, flush=True)


def show(text: str = "") -> None:
    """Print one line of a result on stdout."""
    print(plain(text))


class Terminal(Listener):
    """Shows a sweep's progress: a bar on a terminal, a line now and then elsewhere."""

    bar: "Bar | None" = None
    last = 0.0  # when the last line was printed

    def note(self, text: str) -> None:
        """Print the note."""
        say(text)

    def started(self, progress: Progress) -> None:
        """Draw the bar, or print the first line."""
        if not sys.stderr.isatty():
            self.last = time.monotonic()
            say(f"measuring {progress.cells} cells{progress.left}", name="")
            return
        from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar
        from rich.text import Text

        class Measuring(ProgressColumn):
            def render(self, task: object) -> Text:
                return Text(plain(f"measuring {progress.task}"))

        self.bar = Bar(
            Measuring(),
            BarColumn(),
            TextColumn("{task.fields[sweep].done}/{task.fields[sweep].cells} cells,"),
            TimeElapsedColumn(),
            TextColumn("passed{task.fields[sweep].left}"),
            console=console(stderr=True),
        )
        self.bar.add_task("", total=progress.tokens, sweep=progress)
        self.bar.start()

    def advanced(self, progress: Progress) -> None:
        """Move the bar, or print a line if the last one is old."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=progress.done_tokens)
        elif time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            done = f"{progress.done}/{progress.cells} cells done{progress.left}"
            say(f"measuring {progress.task}: {done}", name="")

    def stopped(self) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.stop()
