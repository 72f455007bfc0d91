"""Which cells each process of a run folder measures now, so that several share a sweep.

A process writes the cells that it takes, and those that it measures at the moment, to
`claims-<host>-<pid>-<random>.json`. They are its own as long as it holds the lock of its file of
records (`kvbench/run_folder.py`), so a claim ends with its process. A claim whose process ended
without removing it is a mark: the process was killed while it measured these cells, maybe because
memory ran out. Where the file system has no locks, nothing is claimed.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from kvbench.errors import InputError
from kvbench.files import read_regular, write_atomically
from kvbench.locks import is_held, locked
from kvbench.records import SAMPLE_FILES
from kvbench.run_folder import RUN_FILE, AddedRecords, RunWriter
from kvbench.sweep.plan import Cell

CLAIM_FILES = "claims-*.json"


@dataclass(frozen=True)
class Mark:
    """A group of cells whose process ended while it measured them."""

    cells: frozenset[str]  # fingerprints
    task: str
    bytes: int  # that the group was predicted to take


class Claims:
    """The claims of this process, and what others of the same folder claim and record.

    A context manager: this process's claim is removed at its end, unless it is killed. `recorded`
    holds the fingerprints of all cells that have a record; the sweep adds its own.
    """

    def __init__(self, writer: RunWriter, added: AddedRecords, recorded: set[str]) -> None:
        self.recorded = recorded
        self.marks: dict[Path, Mark] = {}
        self._writer, self._added = writer, added
        self._path = writer.folder / f"claims-{writer.name}.json"
        self._cells: list[str] = []
        self._left: list[frozenset[str]] = []  # of each mark, the cells without a record

    def take(self, batches: list[list[Cell]]) -> tuple[list[Cell], dict[str, bytes]]:
        """Take the cells of the first batch that has any which no other process measures.

        They are removed from `batches`; none are taken if others measure all. Also returns what
        others have recorded since the last call, as lines by fingerprint; these cells are removed
        as well. Raises InputError if the folder cannot be read or written to.
        """
        with self._errors(), locked(self._writer.folder / RUN_FILE):
            busy = self._look_at_others()
            # In this order: a process records its cells before it gives up its claim.
            new = dict(self._added.read(own=self._writer.path))
            self.recorded.update(new)
            self._forget_finished()
            if new:
                left = [[c for c in batch if c.fingerprint not in new] for batch in batches]
                batches[:] = filter(None, left)
            for place, batch in enumerate(batches):
                if free := [cell for cell in batch if cell.fingerprint not in busy]:
                    rest = [cell for cell in batch if cell.fingerprint in busy]
                    batches[place : place + 1] = [rest] if rest else []
                    self._cells = [cell.fingerprint for cell in free]
                    self._write(measuring=[])
                    return free, new
            self._path.unlink(missing_ok=True)
            return [], new

    def measuring(self, group: Sequence[Cell], needed: int) -> None:
        """Leave a mark in case this process ends while it measures a group of `needed` bytes."""
        cells = [cell.fingerprint for cell in group]
        with self._errors():
            self._write(measuring=cells, task=group[0].sample.task, bytes=needed)

    def deaths(self, cell: Cell) -> int:
        """How many processes ended while they measured this cell alone."""
        return sum(mark.cells == {cell.fingerprint} for mark in self.marks.values())

    def has_marked(self, group: Sequence[Cell]) -> bool:
        """Whether the group holds all that was left, at the last `take`, of one with a mark."""
        cells = {cell.fingerprint for cell in group}
        return any(left <= cells for left in self._left)

    def suspects(self) -> list[Mark]:
        """The marks that may be due to a lack of memory.

        Not those of groups with a cell that ended its process alone as well: the cell is the cause.
        """
        alone = [mark.cells for mark in self.marks.values() if len(mark.cells) == 1]
        return [m for m in self.marks.values() if not any(cell <= m.cells for cell in alone)]

    def _look_at_others(self) -> set[str]:
        """The fingerprints that living processes claim; reads the marks of the others."""
        busy: set[str] = set()
        marks = {}
        claims = self._writer.folder.glob(CLAIM_FILES) if self._writer.has_locks else ()
        for path in claims:
            if path == self._path or not path.is_file():  # such as a folder of that name
                continue
            lives = is_held(_records_of(path))
            claimed, mark = _read_claim(path)
            if lives:
                busy |= claimed
            else:
                marks[path] = mark
        self.marks = marks
        return busy

    def _forget_finished(self) -> None:
        """Remove marks whose cells all have records."""
        for path in [path for path, mark in self.marks.items() if mark.cells <= self.recorded]:
            path.unlink(missing_ok=True)
            del self.marks[path]
        self._left = [mark.cells - self.recorded for mark in self.marks.values()]

    def _write(self, **measured: Any) -> None:
        if self._writer.has_locks:
            write_atomically(
                self._path, json.dumps({"cells": self._cells, **measured}) + "\n", durable=False
            )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer.check()
            raise InputError(
                f"cannot read or write {error.filename or self._path}: {error.strerror}; what was "
                "finished before is kept, mend this and give the same command again"
            ) from error

    def __enter__(self) -> "Claims":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._forget_finished()


def _records_of(claim: Path) -> Path:
    """The file of records of the process that has a claim; the process holds its lock."""
    name = claim.name.removeprefix("claims-").removesuffix(".json")
    return claim.with_name(SAMPLE_FILES.replace("*", name))


def _read_claim(path: Path) -> tuple[set[str], Mark]:
    """The cells of a claim, and its mark; both are empty if the claim is gone or damaged."""
    try:
        claim = json.loads(read_regular(path))
        mark = Mark(
            frozenset(claim["measuring"]), str(claim.get("task", "")), int(claim.get("bytes", 0))
        )
        return set(claim["cells"]), mark
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return set(), Mark(frozenset(), "", 0)
