"""Runs the cells of a plan in batches, scores them and stores a record as each batch finishes."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby

import torch

from kvbench.engine import Outcome, Row, run_rows
from kvbench.model import LoadedModel
from kvbench.plan import Cell
from kvbench.results import Record, RunWriter
from kvbench.task import Task

PROMPT_TAIL = 240  # characters of the prompt kept in a record
MOST_ROWS = 64  # more rows in a batch gain nothing on any machine seen so far

RunRows = Callable[..., list[Outcome]]


@dataclass(frozen=True)
class Sweep:
    """What a sweep needs beside its cells."""

    model: LoadedModel
    tasks: Mapping[str, Task]
    seed: int
    context: int
    prefill_chunk: int  # tokens; for methods that do not depend on it
    batch_rows: int
    run_rows: RunRows = run_rows

    def run(
        self, cells: Sequence[Cell], writer: RunWriter, progress: Callable[[Cell], None]
    ) -> list[Record]:
        """Measure all cells; return the records of those that failed.

        A batch that raises is measured again cell by cell, so that a failure costs only the cells
        that cause it. KeyboardInterrupt passes through; what was finished is stored.
        """
        failed = []
        for batch in batches(cells, self.batch_rows, self.prefill_chunk):
            records = self._measure(batch)
            writer.append(records)
            failed += [record for record in records if record.error is not None]
            for cell in batch:
                progress(cell)
        return failed

    def _measure(self, batch: Sequence[Cell]) -> list[Record]:
        try:
            outcomes = self._outcomes(batch)
        except Exception as error:
            if len(batch) == 1:
                return [self._record(batch[0], error=_one_line(error))]
        else:
            return [
                self._scored(cell, outcome) for cell, outcome in zip(batch, outcomes, strict=True)
            ]
        return [record for cell in batch for record in self._measure([cell])]

    def _outcomes(self, batch: Sequence[Cell]) -> list[Outcome]:
        rows = [
            Row(cell.prompt, cell.sample.max_new_tokens, cell.spec, cell.budget, cell.seed)
            for cell in batch
        ]
        chunk = _chunk(batch[-1], self.prefill_chunk)
        return self.run_rows(self.model, rows, prefill_chunk=chunk)

    def _scored(self, cell: Cell, outcome: Outcome) -> Record:
        prediction = self.model.tokenizer.decode(outcome.tokens, skip_special_tokens=True)
        try:
            score = float(self.tasks[cell.sample.task].score(prediction, cell.sample))
        except Exception as error:
            return self._record(cell, error=f"scoring failed: {_one_line(error)}")
        if math.isnan(score) or not 0 <= score <= 1:
            return self._record(cell, error=f"the task's score {score} is not in 0..1")
        measured = asdict(outcome)
        del measured["tokens"]
        return self._record(cell, prediction=prediction, score=score, **measured)

    def _record(self, cell: Cell, **measured: object) -> Record:
        return Record(
            fingerprint=cell.fingerprint,
            model=self.model.name,
            task=cell.sample.task,
            subtask=cell.sample.subtask,
            method=cell.spec.name,
            family=cell.spec.family,
            options=cell.spec.options,
            budget=cell.budget,
            prefill_chunk=cell.prefill_chunk,
            sample=cell.sample.index,
            sample_seed=self.seed,
            context=self.context,
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
            prompt_tail=cell.sample.prompt[-PROMPT_TAIL:],
            reference=cell.sample.reference,
            **measured,  # type: ignore[arg-type]
        )


def _chunk(cell: Cell, default: int) -> int:
    return default if cell.prefill_chunk is None else cell.prefill_chunk


def batches(cells: Sequence[Cell], batch_rows: int, prefill_chunk: int) -> Iterator[list[Cell]]:
    """Cut cells into batches of at most `batch_rows`, each of one task and one prefill chunk.

    The cells of a sample stay together where they fit, since they share a prompt. Cells that do not
    depend on the prefill chunk go with those of `prefill_chunk`.
    """
    open_batches: dict[tuple[str, int], list[Cell]] = {}
    for _, same_sample in groupby(cells, key=lambda c: (c.sample.task, c.sample.index)):
        by_kind: dict[tuple[str, int], list[Cell]] = {}
        for cell in same_sample:
            kind = cell.sample.task, _chunk(cell, prefill_chunk)
            by_kind.setdefault(kind, []).append(cell)
        for kind, group in by_kind.items():
            waiting = open_batches.pop(kind, [])
            if waiting and len(waiting) + len(group) > batch_rows:
                yield waiting
                waiting = []
            waiting += group
            while len(waiting) >= batch_rows:
                yield waiting[:batch_rows]
                waiting = waiting[batch_rows:]
            if waiting:
                open_batches[kind] = waiting
    yield from open_batches.values()


def row_bytes(model: LoadedModel, tokens: int) -> int:
    """Bytes of the KV cache of one row of `tokens` tokens when nothing is evicted."""
    shape = model.shape
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize * tokens


def default_batch_rows(model: LoadedModel, tokens: int) -> int:
    """Rows whose whole caches fill at most a quarter of the memory that is free now."""
    free = _free_bytes(model) // 4
    return max(1, min(MOST_ROWS, free // max(1, row_bytes(model, tokens))))


def _free_bytes(model: LoadedModel) -> int:
    if model.device.type == "cuda":
        return int(torch.cuda.mem_get_info(model.device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 4 * 2**30


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:400]
