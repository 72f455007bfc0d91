"""How far a sweep is, on stderr: a bar on a terminal, a few lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from kvbench.sweep.plan import Cell

SECONDS_BETWEEN_LINES = 20.0


@contextmanager
def show_progress(cells: Sequence[Cell]) -> Iterator[Callable[[Cell], None]]:
    """Yields what is to be called with every finished cell; time left goes by tokens."""
    with (_bar if sys.stderr.isatty() else _lines)(cells) as advance:
        yield advance


@contextmanager
def _bar(cells: Sequence[Cell]) -> Iterator[Callable[[Cell], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[cells]} cells"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    done = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(
            "measuring", total=sum(cell.tokens for cell in cells), done=0, cells=len(cells)
        )

        def advance(cell: Cell) -> None:
            nonlocal done
            done += 1
            progress.update(bar, advance=cell.tokens, done=done)

        yield advance


@contextmanager
def _lines(cells: Sequence[Cell]) -> Iterator[Callable[[Cell], None]]:
    start = last = time.monotonic()
    total, tokens, done = sum(cell.tokens for cell in cells), 0, 0
    print(f"measuring {len(cells)} cells", file=sys.stderr, flush=True)

    def advance(cell: Cell) -> None:
        nonlocal last, tokens, done
        done, tokens = done + 1, tokens + cell.tokens
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < len(cells):
            last = now
            left = (now - start) * (total - tokens) / tokens
            line = f"{done}/{len(cells)} cells, about {duration(left)} left"
            print(line, file=sys.stderr, flush=True)

    yield advance


def duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 5 min, 2.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
