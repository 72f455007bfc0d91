"""Measures the cells of a plan in batches, scores them, and stores records after each batch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import TypeVar

import torch

from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.engine.stop import cut
from kvbench.machine import free_memory
from kvbench.models.load import LoadedModel
from kvbench.records import BASELINE, Record
from kvbench.run_folder import RunWriter
from kvbench.spec import parse_method
from kvbench.sweep.cost import cost_of
from kvbench.sweep.plan import PROMPT_TAIL, Cell, StoredPrompt, one_line
from kvbench.task import Task

MEMORY_SHARE = 0.75  # of the free memory, that a sweep takes by default
MOST_ROWS = 64  # rows of several samples; more in a batch gain nothing on any machine seen so far

RunRows = Callable[..., list[Outcome]]
C = TypeVar("C", bound=Cell)


@dataclass
class Sweep:
    """Everything that measuring a cell needs beside the cell."""

    model: LoadedModel
    tasks: Mapping[str, Task]
    seed: int
    context: int
    prefill_chunk: int  # tokens; for methods that do not depend on it
    memory_limit: int  # bytes beside the weights
    batch_rows: int | None = None  # at most; None: as many as memory allows
    run_rows: RunRows = run_rows
    failed: list[Record] = field(default_factory=list, init=False)
    too_much: float = field(default=math.inf, init=False)  # bytes of the smallest batch that failed

    def run(
        self,
        cells: Sequence[Cell],
        writer: RunWriter,
        finished: Callable[[Cell], None],
        starting: Callable[[Sequence[Cell]], None] = lambda batch: None,
    ) -> list[Record]:
        """Measure all cells; return `failed`, the records of those that failed.

        `starting` is called with every batch before it is measured, `finished` with every cell
        once its record is stored. If a batch fails for any reason, it is split in two and retried:
        a failure costs only the cells that cause it, and a lack of memory only time. Cells with an
        `error` are not measured. KeyboardInterrupt passes through; finished cells are stored.
        """

        def store(part: Sequence[Cell], records: list[Record]) -> None:
            writer.append(records)
            self.failed += [record for record in records if record.error is not None]
            for cell in part:
                finished(cell)

        broken = [cell for cell in cells if cell.error]
        store(broken, [self._record(cell, error=cell.error) for cell in broken])
        for batch in self.batches(cells):
            starting(batch)
            for part, records in self._measured(batch):
                store(part, records)
        return self.failed

    def batches(self, cells: Sequence[C]) -> list[list[C]]:
        """The cells in the groups in which they are measured together; none with an `error`."""
        sound = [cell for cell in cells if not cell.error]
        return list(
            batches(sound, self.prefill_chunk, self.bytes, self.memory_limit, self.batch_rows)
        )

    def bytes(self, batch: Sequence[C]) -> int:
        """Peak bytes of a batch, beside the weights."""
        return cost_of(self.model, rows_of(batch), self.chunk(batch)).bytes

    def chunk(self, batch: Sequence[C]) -> int:
        """The prefill chunk of a batch, in tokens."""
        return _chunk(batch[-1], self.prefill_chunk)

    def _measured(self, batch: Sequence[C]) -> Iterator[tuple[Sequence[C], list[Record]]]:
        needed = self.bytes(batch)
        if len(batch) == 1 and needed > self.memory_limit:
            error = f"needs {gib(needed)} beside the model, the memory limit is "
            error += f"{gib(self.memory_limit)} (--memory-limit)"
            yield batch, [self._record(batch[0], error=error)]
            return
        failure, guilty = None, ""
        if len(batch) == 1 or needed < self.too_much:
            try:
                outcomes = self.run_rows(
                    self.model, with_prompts(rows_of(batch)), prefill_chunk=self.chunk(batch)
                )
            except (Exception, SystemExit) as error:
                # Only the text is kept: the error itself keeps the memory of its frames alive.
                failure = one_line(error)
                guilty = getattr(error, "method", "")
                if len(batch) > 1 and is_out_of_memory(error):
                    self.too_much = min(self.too_much, needed)
            else:
                pairs = zip(batch, outcomes, strict=True)
                yield batch, [self._scored(cell, outcome) for cell, outcome in pairs]
                return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            yield batch, [self._record(batch[0], error=failure)]
            return
        for part in _parts(batch, guilty):
            yield from self._measured(part)

    def _scored(self, cell: Cell, outcome: Outcome) -> Record:
        if outcome.failure is not None:
            return self._record(cell, error=outcome.failure)
        answer = self.model.tokenizer.decode(outcome.tokens, skip_special_tokens=True)
        prediction = cut(answer, cell.sample.stop)
        try:
            # A copy: what `score` does to the reference must not reach other cells.
            sample = deepcopy(cell.sample)
            score = float(self.tasks[cell.sample.task].score(prediction, sample))
        except (Exception, SystemExit) as error:
            return self._record(cell, error=f"scoring failed: {one_line(error)}")
        if math.isnan(score) or not 0 <= score <= 1:
            return self._record(cell, error=f"the task's score {score} is not in 0..1")
        measured = asdict(outcome)
        del measured["tokens"], measured["kept"], measured["failure"]
        return self._record(cell, prediction=prediction, score=score, **measured)

    def _record(self, cell: Cell, **measured: object) -> Record:
        return Record(
            fingerprint=cell.fingerprint,
            model=self.model.name,
            task=cell.sample.task,
            subtask=cell.sample.subtask,
            method=cell.spec.name,
            family=cell.spec.family,
            options=cell.options,
            budget=cell.budget,
            prefill_chunk=cell.prefill_chunk,
            read_chunk=_chunk(cell, self.prefill_chunk),
            sample=cell.sample.index,
            sample_seed=self.seed,
            context=cell.most or self.context,
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
            prompt_tail=cell.sample.prompt[-PROMPT_TAIL:],
            reference=cell.sample.reference,
            method_code=cell.method_code,
            task_code=cell.task_code,
            cluster=cell.sample.cluster,
            compress="prompt" if cell.context is None else "context",
            chat=cell.sample.chat,
            cut_tokens=cell.cut_tokens,
            sample_code=cell.sample_code,
            **measured,  # type: ignore[arg-type]
        )


def _parts(batch: Sequence[C], guilty: str) -> list[Sequence[C]]:
    """The two parts in which a failed batch is retried: by the guilty method if it is known."""
    part = [cell for cell in batch if cell.spec.name == guilty]
    if 0 < len(part) < len(batch):
        return [[cell for cell in batch if cell.spec.name != guilty], part]
    half = (len(batch) + 1) // 2
    return [batch[:half], batch[half:]]


def _chunk(cell: Cell, default: int) -> int:
    return default if cell.prefill_chunk is None else cell.prefill_chunk


def warm_up(model: LoadedModel) -> None:
    """Run a short row, so that compilation and other set-up do not count in a record's seconds."""
    row = Row([0] * 8, 8, parse_method(BASELINE, {}), 1.0)
    run_rows(model, [row], prefill_chunk=4)


def with_prompts(rows: Sequence[Row]) -> list[Row]:
    """The rows with the token ids of prompts that a plan does not hold; each is read once."""
    stored = [row.prompt for row in rows if isinstance(row.prompt, StoredPrompt)]
    read = {prompt: prompt.read() for prompt in dict.fromkeys(stored)}
    return [
        replace(row, prompt=read[row.prompt]) if isinstance(row.prompt, StoredPrompt) else row
        for row in rows
    ]


def rows_of(batch: Sequence[C]) -> list[Row]:
    """The engine's rows of some cells; of a stored prompt, only its length is known."""
    return [
        Row(
            prompt=c.prompt,
            max_new_tokens=c.sample.max_new_tokens,
            spec=c.spec,
            budget=c.budget,
            seed=c.seed,
            context=c.context,
            stop=c.sample.stop,
        )
        for c in batch
    ]


def batches(
    cells: Sequence[C],
    prefill_chunk: int,
    bytes_of: Callable[[Sequence[C]], int],
    memory_limit: int,
    batch_rows: int | None,
) -> Iterator[list[C]]:
    """Cut cells into batches that fit into memory, each of one task and one prefill chunk.

    The cells of a sample share a prompt, so they stay together if they fit. Samples are added up to
    `batch_rows` cells (None: MOST_ROWS). Cells that do not depend on the prefill chunk join those
    of `prefill_chunk`. A cell that does not fit is a batch by itself.
    """
    open_batches: dict[tuple[str, int], list[C]] = {}
    for _, same_sample in groupby(cells, key=lambda c: (c.sample.task, c.sample.index)):
        by_kind: dict[tuple[str, int], list[C]] = {}
        for cell in same_sample:
            kind = cell.sample.task, _chunk(cell, prefill_chunk)
            by_kind.setdefault(kind, []).append(cell)
        for kind, group in by_kind.items():
            # Cells that share the whole prefill come first, so that a cut leaves them together.
            group.sort(key=lambda cell: cell.spec.depends_on_chunk)
            waiting = open_batches.pop(kind, [])
            joined = waiting + group
            if waiting and (
                len(joined) > (batch_rows or MOST_ROWS) or bytes_of(joined) > memory_limit
            ):
                yield waiting
                joined = group
            *full, rest = _fitting(joined, bytes_of, memory_limit, batch_rows or len(joined))
            yield from full
            open_batches[kind] = rest
    yield from open_batches.values()


def _fitting(
    cells: list[C], bytes_of: Callable[[Sequence[C]], int], memory_limit: int, most: int
) -> Iterator[list[C]]:
    """Cells in order, in pieces of at most `most` cells and `memory_limit` bytes."""
    if len(cells) == 1 or (len(cells) <= most and bytes_of(cells) <= memory_limit):
        yield cells
        return
    half = most if len(cells) > most else (len(cells) + 1) // 2
    yield from _fitting(cells[:half], bytes_of, memory_limit, most)
    yield from _fitting(cells[half:], bytes_of, memory_limit, most)


def free_bytes(model: LoadedModel) -> int:
    """Bytes that a sweep may take by default: three quarters of the free memory."""
    if model.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(model.device)[0])
    else:
        free = free_memory()
    return int(free * MEMORY_SHARE)


def gib(size: float) -> str:
    """Bytes as people say them: 812 MiB, 3.1 GiB."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; the CPU's allocator raises a bare RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
