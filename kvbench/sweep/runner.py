"""Measures the cells of a plan in batches, scores them, and stores records after each batch."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
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
from kvbench.records import BASELINE, Record, from_line
from kvbench.run_folder import AddedRecords, RunWriter
from kvbench.spec import parse_method
from kvbench.sweep.claims import Claims, Mark
from kvbench.sweep.cost import cost_of
from kvbench.sweep.plan import PROMPT_TAIL, Cell, StoredPrompt, one_line
from kvbench.sweep.units import longest_first, tokens_of
from kvbench.task import Task

MEMORY_SHARE = 0.75  # of the free memory, that a sweep takes by default
POLL_SECONDS = 1.0  # between looks at what other processes do, if they measure all that is left
MOST_DEATHS = 2  # processes that one cell may end before it counts as failed
ENDED = f"{MOST_DEATHS} processes ended without a word while they measured it (out of memory?)"
MOST_ROWS = 64  # rows of several samples; more in a batch gain nothing on any machine seen so far

RunRows = Callable[..., list[Outcome]]
C = TypeVar("C", bound=Cell)


@dataclass
class Sweep:
    """Everything that measuring a cell needs beside the cell."""

    model: LoadedModel
    tasks: Mapping[str, Task]
    context: int
    prefill_chunk: int  # tokens; for methods that do not depend on it
    memory_limit: int  # bytes beside the weights
    batch_rows: int | None = None  # at most; None: as many as memory allows
    run_rows: RunRows = run_rows
    by_workers: bool = False  # of one command: others are expected, the longest groups come first
    recorded: set[str] = field(default_factory=set)  # fingerprints of cells that have a record
    added: AddedRecords | None = None  # what others record; None: from the start of `run` on
    failed: list[Record] = field(default_factory=list, init=False)
    measured: int = field(default=0, init=False)  # cells, without those that failed
    elsewhere: int = field(default=0, init=False)  # cells that other processes recorded meanwhile
    too_much: float = field(default=math.inf, init=False)  # bytes of the smallest batch that failed
    fitted: int = field(default=0, init=False)  # bytes of the largest batch that did not
    _noted: set[Mark] = field(default_factory=set, init=False)  # marks that were told of

    def run(
        self,
        cells: Sequence[Cell],
        writer: RunWriter,
        finished: Callable[[Cell], None],
        starting: Callable[[Sequence[Cell]], None] = lambda batch: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> list[Record]:
        """Measure all cells; return `failed`, the records of those that failed.

        `starting` is called with every batch before it is measured, `finished` with every cell
        once its record is stored. If a batch fails for any reason, it is split in two and retried:
        a failure costs only the cells that cause it, and a lack of memory only time. Cells with an
        `error` are not measured. KeyboardInterrupt passes through; finished cells are stored.

        Other processes may measure cells of the same folder meanwhile (`claims.py`). Each takes
        cells that no other has; what another records is finished here too, and what it leaves when
        it is killed is taken over, in smaller batches. `note` is told of the latter.
        """
        waiting = {cell.fingerprint: cell for cell in cells}
        batches = [[cell for cell in cells if cell.error], *self.batches(cells)]
        batches = [batch for batch in batches if batch]
        if self.by_workers:
            batches = longest_first(batches, tokens_of)
        waits = False
        if not writer.has_locks:
            note(f"{writer.folder} is on a file system without locks; start no other run there")
        with Claims(writer, self.added or AddedRecords(writer.folder), self.recorded) as claims:
            while batches:
                batch, new = claims.take(batches)
                for name in new.keys() & waiting.keys():
                    self._count_elsewhere(new[name])
                    finished(waiting.pop(name))
                self._heed(claims, waiting.keys(), note)
                if batch:
                    starting(batch)
                    for part, records in self._measured(batch, claims):
                        writer.append(records)
                        for cell, record in zip(part, records, strict=True):
                            self._count(record)
                            finished(waiting.pop(cell.fingerprint))
                elif batches:
                    if not waits and not self.by_workers:
                        note(f"waiting for {cells_text(len(waiting))} that other processes measure")
                    waits = True
                    time.sleep(POLL_SECONDS)
        return self.failed

    def _count(self, record: Record) -> None:
        """Count a cell that this process has recorded."""
        self.recorded.add(record.fingerprint)
        if record.error is None:
            self.measured += 1
        else:
            self.failed.append(record)

    def _count_elsewhere(self, line: bytes) -> None:
        """Count a cell whose record, a line, another process wrote."""
        self.elsewhere += 1
        with suppress(ValueError):
            record = from_line(line)
            if record.error is not None:
                self.failed.append(record)

    def _heed(self, claims: Claims, waiting: Set[str], note: Callable[[str], None]) -> None:
        """Measure no batch as large as one that ended its process, unless such a one did fit."""
        suspects = claims.suspects()
        for mark in claims.marks.values():
            if not mark.cells & waiting:
                continue
            if mark not in self._noted:
                note(what_happened(mark))
            self._noted.add(mark)
            if mark in suspects and mark.bytes > self.fitted:
                self.too_much = min(self.too_much, mark.bytes)

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

    def _measured(
        self, batch: Sequence[Cell], claims: Claims
    ) -> Iterator[tuple[Sequence[Cell], list[Record]]]:
        if batch[0].error:
            yield batch, [self._record(cell, error=cell.error) for cell in batch]
            return
        needed = self.bytes(batch)
        if len(batch) == 1 and needed > self.memory_limit:
            error = f"needs {gib(needed)} beside the model, the memory limit is "
            error += f"{gib(self.memory_limit)} (--memory-limit)"
            yield batch, [self._record(batch[0], error=error)]
            return
        if len(batch) == 1 and claims.deaths(batch[0]) >= MOST_DEATHS:
            yield batch, [self._record(batch[0], error=ENDED)]
            return
        failure, guilty = None, ""
        if len(batch) == 1 or (needed < self.too_much and not claims.has_marked(batch)):
            claims.measuring(batch, needed)
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
                self.fitted = max(self.fitted, needed)
                pairs = zip(batch, outcomes, strict=True)
                yield batch, [self._scored(cell, outcome) for cell, outcome in pairs]
                return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            yield batch, [self._record(batch[0], error=failure)]
            return
        for part in _parts(batch, guilty):
            yield from self._measured(part, claims)

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
            # The answer is kept: a judge that could not be asked must not cost the reader it.
            failure = f"scoring failed: {one_line(error)}"
            return self._record(cell, prediction=prediction, error=failure)
        if math.isnan(score) or not 0 <= score <= 1:
            failure = f"the task's score {score} is not in 0..1"
            return self._record(cell, prediction=prediction, error=failure)
        measured = asdict(outcome)
        del measured["tokens"], measured["kept"], measured["failure"]
        return self._record(cell, prediction=prediction, score=score, **measured)

    def metric_of(self, cell: Cell) -> str:
        """What the task says its scores are, for samples that say nothing."""
        return str(getattr(self.tasks.get(cell.sample.task), "metric", ""))

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
            sample_seed=cell.sample_seed,
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
            source=cell.source,
            sample_id=cell.sample_id,
            metric=cell.sample.metric or self.metric_of(cell),
            max_new_tokens=cell.sample.max_new_tokens or None,
            stop=list(cell.sample.stop),
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
    for _, same_prompt in groupby(cells, key=lambda c: (c.sample.task, c.sample.index, c.prompt)):
        by_kind: dict[tuple[str, int], list[C]] = {}
        for cell in same_prompt:
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
    """Bytes that a sweep may take by default: three quarters of the free memory.

    Of a model that is split over several GPUs, of the one with the least.
    """
    if model.device.type == "cuda":
        free = min(int(torch.cuda.mem_get_info(device)[0]) for device in model.devices)
    else:
        free = free_memory()
    return int(free * MEMORY_SHARE)


def what_happened(mark: Mark) -> str:
    """A note on a mark that another process left."""
    many = len(mark.cells) > 1
    return (
        f"a process ended without a word while it measured {cells_text(len(mark.cells))} of "
        f"{mark.task} that {'need' if many else 'needs'} {gib(mark.bytes)}; "
        + ("they are measured in smaller groups" if many else "it is measured alone")
    )


def cells_text(count: int) -> str:
    """A number of cells in words."""
    return "1 cell" if count == 1 else f"{count} cells"


def gib(size: float) -> str:
    """Bytes as people say them: 812 MiB, 3.1 GiB."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; the CPU's allocator raises a bare RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
