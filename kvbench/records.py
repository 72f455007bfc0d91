"""What a record is: one measured cell, a JSON line of a results file.

The sweep writes records, the report reads them; `kvbench/run_folder.py` says where they lie. This
module needs no torch. See `docs/records.md`.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec
from msgspec import Meta

from kvbench.errors import InputError
from kvbench.files import open_regular

BASELINE = "full"  # the method that every other one is measured against
SAMPLE_FILES = "samples-*.jsonl"

# What `msgspec` checks when a line is read.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # what a data frame can hold
Size = Annotated[int, Meta(ge=1, le=2**63 - 1)]
Amount = Annotated[float, Meta(ge=0, le=2**63)]
Share = Annotated[float, Meta(ge=0, le=1)]
Point = Annotated[list[Count], Meta(min_length=2, max_length=2)]
Time = Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")]
Compress = Literal["prompt", "context"]  # what methods evict from: all, or before the question
COMPRESS: tuple[str, ...] = get_args(Compress)


@dataclass(frozen=True)
class Record:
    """One cell (a sample under one method and budget): a line of a results file.

    Footprints, peaks and reads are fractions of full attention's; bytes are bytes; times are
    seconds. The time of work that several cells share is split equally between them, so that the
    times of all cells add up to the time that passed.

    `timeline` says how many entries are resident after each row (prompt tokens, then decoded
    ones), summed over layers and KV heads. It is linear between points; two points with the same
    number of rows are a jump. Patched entries are a jump up and down at the end of their chunk. The
    area under the line is `resident_rows`, less half an entry for every row and KV head (a row's
    own entry counts as a whole one), and less another half for every row that is decoded while a
    window is full (the line is flat there, because the row's entry replaced another).

    In layers that the model itself limits (a sliding window, chunks), a row counts the entries that
    it sees; the part of it under full attention is what `full_rows` counts there. Layers that read
    another layer's keys count nothing.
    """

    fingerprint: str  # hash of everything that could change the result; one per cell
    model: str
    task: str
    subtask: str
    method: str
    family: str
    options: dict[str, Any]
    budget: Share
    prefill_chunk: Size | None  # tokens; None where the result does not depend on it
    sample: Count
    sample_seed: Count
    context: Count
    finished: Time  # UTC, ISO 8601
    prompt_tail: str
    reference: Any
    prediction: str | None = None
    score: Share | None = None
    kv_footprint: Share | None = None
    kv_peak: Amount | None = None
    kv_reads: Share | None = None
    resident_rows: Count | None = None  # the integers whose ratio kv_footprint is
    full_rows: Count | None = None
    patch_rows: Count | None = None
    replay_rows: Count | None = None
    kv_bytes_peak: Count | None = None
    device_bytes_peak: Count | None = None
    prefill_seconds: Amount | None = None
    decode_seconds: Amount | None = None
    prompt_tokens: Count | None = None
    new_tokens: Count | None = None
    timeline: list[Point] | None = None  # points [rows, entries resident]
    shared_rows: Count | None = None  # cells that shared the prefill, this one included
    group_bytes_peak: Count | None = None  # keys and values of the whole batch
    kv_held_peak: Amount | None = None  # as `kv_peak`, at one instant as executed
    read_chunk: Count | None = None  # tokens of the prefill chunk in which the prompt was read
    method_code: str = ""  # a hash of the method's source, "" in records from before it was kept
    task_code: str = ""  # the same of the task's
    compress: Compress = "prompt"  # "context": what a method evicts from ends before the question
    kv_bytes_read: Amount | None = None  # for a decoded token, on average
    cluster: str | None = None  # samples of one cluster are not independent
    chat: bool | None = None  # whether the prompt was put into the model's chat template
    cut_tokens: Count | None = None  # of a prompt that was too long; None: its task makes it fit
    sample_code: str = ""  # a hash of a sample that was read, "" if its task makes it
    source: str = ""  # where its task read it: a path or an address; "" if its task makes it
    sample_id: str | None = None  # what a sample that was read is called in its file
    metric: str = ""  # what the score is, "" in records from before it was kept
    max_new_tokens: Size | None = None  # limit of the answer
    stop: list[str] | None = None  # texts at which the answer ended
    error: str | None = None


_decode = msgspec.json.Decoder(Record).decode
_FIELDS = tuple(field.name for field in fields(Record))
_MEASURED = ("prediction", "score", "kv_footprint", "kv_peak")
# What two measurements of one cell may differ in: when, where and beside what it was measured.
CIRCUMSTANCES = (
    *("finished", "prefill_seconds", "decode_seconds", "shared_rows", "group_bytes_peak"),
    *("device_bytes_peak", "context", "source", "sample_id"),
)
_KEYS = re.compile(rb'"(\w+)"\s*:')
_MOST_NESTED = 50  # lists and objects in each other, in options and the reference
_BOM = b"\xef\xbb\xbf"
NEAR = 1e-9  # what a record says twice may differ by this much
SHOWN = 5  # damaged lines, or files, that a message names


@dataclass(frozen=True)
class Damage:
    """A line of a results file that is no record, or (`line` None) a file that cannot be read."""

    file: Path
    line: int | None
    reason: str

    def __str__(self) -> str:
        if self.line is None:
            return f"cannot read {self.file}: {self.reason}"
        return f"{self.file}, line {self.line}: not a record of kvbench ({self.reason})"


def told(damaged: Iterable[Damage]) -> list[str]:
    """A text for each of the first few damages, and one for the others."""
    damaged = list(damaged)
    more = len(damaged) - SHOWN
    return [*map(str, damaged[:SHOWN]), *([f"and {more} more like this"] if more > 0 else [])]


def to_line(record: Record) -> bytes:
    """The record as one line of ASCII JSON, newline included."""
    values = {name: getattr(record, name) for name in _FIELDS}
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def from_line(line: bytes) -> Record:
    """Return the record of one line. Unknown keys are ignored; ValueError says what is wrong."""
    try:
        record = _decode(line)
    except msgspec.ValidationError as error:
        what, _, where = str(error).replace("`", "").partition(" - at $")
        raise ValueError(f"{where.lstrip('.')}: {what}" if where else what) from None
    except RecursionError:
        raise ValueError("lists in lists without end") from None
    keys = _KEYS.findall(line)
    if len(keys) != len(set(keys)):
        json.loads(line, object_pairs_hook=unique)
    if line.count(b"[") + line.count(b"{") > _MOST_NESTED + len(record.timeline or ()):
        check_depth([record.options, record.reference])
    _check(record)
    return record


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object of these keys and values; ValueError if a key is there twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name in values if sum(key == name for key, _ in pairs) > 1)
        raise ValueError(f"{twice} is there twice")
    return values


def check_depth(values: Any) -> None:
    """Raise ValueError for lists and objects that are nested deeper than a report can show."""
    for _ in range(_MOST_NESTED):
        within = (v.values() if isinstance(v, dict) else v for v in values)
        values = [v for inner in within for v in inner if isinstance(v, dict | list)]
        if not values:
            return
    raise ValueError(f"lists and objects are nested more than {_MOST_NESTED} deep")


def _check(record: Record) -> None:
    """Raise ValueError for a record whose fields contradict each other."""
    if record.error is None:
        missing = [name for name in _MEASURED if getattr(record, name) is None]
        if missing:
            raise ValueError(f"it has no error, and lacks {', '.join(missing)}")
    datetime.fromisoformat(record.finished)
    share, rows, full = record.kv_footprint, record.resident_rows, record.full_rows
    if record.budget == 0:
        raise ValueError("budget is 0; expected more")
    if record.method == BASELINE and record.budget != 1:
        raise ValueError(f"budget of {BASELINE} is {record.budget}; expected 1")
    if (rows is None) != (full is None):
        raise ValueError("it has one of resident_rows and full_rows; expected both or none")
    if (
        share is not None
        and rows is not None
        and full is not None
        and abs(rows - share * full) > NEAR * max(rows, full, 1)
    ):
        raise ValueError(f"kv_footprint is {share}, but {rows} of {full} rows are resident")
    if full == 0:
        raise ValueError("full_rows is 0; expected 1 or more")
    if share is not None and record.kv_reads is not None and record.kv_reads > share + NEAR:
        raise ValueError(f"kv_reads is {record.kv_reads}, more than kv_footprint, {share}")
    # Only patched and replayed tokens are held beside what full attention holds.
    patched = record.context if record.patch_rows is None else record.patch_rows
    most = 1 + patched + (record.replay_rows or 0) + NEAR
    for name in ("kv_peak", "kv_held_peak"):
        if (getattr(record, name) or 0) > most:
            raise ValueError(f"{name} is {getattr(record, name)}; expected at most {most:g}")
    if record.timeline:
        rows_of_points = [point[0] for point in record.timeline]
        if rows_of_points != sorted(rows_of_points):
            raise ValueError("timeline: the rows of its points fall")


def _check_common(record: Record, common: Mapping[str, Any]) -> None:
    """Raise ValueError for a record that was measured with other settings than `run.json` states.

    Samples that are read may have another context (`docs/records.md`), some are in no chat template
    whatever the run's setting is, and a sample that could not be made has neither.
    """
    settings = {"model": record.model, "seed": record.sample_seed}
    if not record.source and not record.sample_code:
        settings["context"] = record.context
    if record.error is None:
        settings["compress"] = record.compress
    if record.chat:
        settings["chat_template"] = record.chat
    for name, value in settings.items():
        stated = common.get(name, value)
        if value != stated and not (isinstance(stated, list) and value in stated):
            raise ValueError(f"{name} is {value}, and {stated} in the settings of this run")


class _Found(NamedTuple):
    """A record, and where it is."""

    record: Record
    file: Path
    line: int


def read_records(
    folder: Path,
    damaged: list[Damage] | None = None,
    common: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
) -> list[Record]:
    """Return all records of a run folder, as `read_folders` does.

    `common` holds the settings that all records share, as `run.json` states them; a record of
    others is damaged.
    """
    return [record for record, _ in read_folders({folder: common or {}}, damaged, notes)]


def read_folders(
    folders: Mapping[Path, Mapping[str, Any]],
    damaged: list[Damage] | None = None,
    notes: list[str] | None = None,
) -> list[tuple[Record, Path]]:
    """Return the records of run folders, one per fingerprint, each with the file that it is from.

    They are in order of folder and file name. `folders` are the settings that all records of each
    share. A last line without a newline was cut by a kill and is dropped. Damaged lines, and files
    that cannot be read, are left out and added to `damaged`; without such a list, the first one
    raises InputError.

    Of several records of one cell, the one that was measured last counts, and a failed one only if
    all failed. If what they say differs, `notes` gets a note. If none of them is the last (see
    `_rivals`), the cell is left out and its lines are damaged.
    """
    cells: dict[str, list[_Found]] = {}
    broken: list[Damage] = []
    for found in (found for folder, common in folders.items() for found in _lines(folder, common)):
        if isinstance(found, Damage):
            broken.append(found)
        else:
            cells.setdefault(found.record.fingerprint, []).append(found)
    counted: list[tuple[Record, Path]] = []
    again: list[list[_Found]] = []
    for of_cell in cells.values():
        latest, others = (of_cell[0], []) if len(of_cell) == 1 else _latest(of_cell)
        if rivals := _rivals(latest, others):
            broken.append(_contradiction(latest, rivals[0]))
            broken += [_contradiction(each, latest) for each in rivals]
        else:
            counted.append((latest.record, latest.file))
            again += [[latest, *others]] if others else []
    if broken and damaged is None:
        hint = "delete the line to measure that cell again"
        if broken[0].line is None:
            hint = "make it readable, or move it away"
        raise InputError(f"{broken[0]}; {hint}")
    if damaged is not None:
        damaged += broken
    if again and notes is not None:
        files = list(dict.fromkeys(str(each.file) for found in again for each in found))
        more = [f"{len(files) - SHOWN} more"] if len(files) > SHOWN else []
        notes.append(
            f"cells measured again with another result: {len(again)}; the latest counts "
            f"({', '.join([*files[:SHOWN], *more])})"
        )
    return counted


def _latest(of_cell: list[_Found]) -> tuple[_Found, list[_Found]]:
    """Which record of a cell counts, and those that say something else."""
    measured = [each for each in of_cell if each.record.error is None]
    latest = max(measured or of_cell, key=lambda each: each.record.finished)
    return latest, [each for each in measured if not _agree(each.record, latest.record)]


def _agree(one: Record, other: Record) -> bool:
    """Whether two records of a cell are one, or two measurements with the same result."""
    return one == other or (
        one.finished != other.finished and not {*_differences(one, other)} - {*CIRCUMSTANCES}
    )


def _differences(one: Record, other: Record) -> list[str]:
    """The names of the fields in which two records differ."""
    return [name for name in _FIELDS if getattr(one, name) != getattr(other, name)]


def _rivals(latest: _Found, others: list[_Found]) -> list[_Found]:
    """Those of the other records of a cell that no later measurement explains.

    A process measures a cell once, and writes to one file.
    """
    return [
        each
        for each in others
        if each.file.name == latest.file.name or each.record.finished == latest.record.finished
    ]


def _contradiction(found: _Found, other: _Found) -> Damage:
    """The damage of a record whose cell another one claims too."""
    different = ", ".join(_differences(found.record, other.record)[:SHOWN])
    return Damage(
        found.file,
        found.line,
        f"{other.file}, line {other.line}, has another {different} of the same cell, and neither "
        "is a later measurement",
    )


def _lines(folder: Path, common: Mapping[str, Any]) -> Iterator[_Found | Damage]:
    """Yield the record or the damage of every line that ends with a newline."""
    for path in sorted(folder.glob(SAMPLE_FILES)):
        try:
            with open_regular(path) as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        continue
                    try:
                        record = from_line(line.removeprefix(_BOM) if number == 1 else line)
                        _check_common(record, common)
                        yield _Found(record, path, number)
                    except ValueError as error:
                        yield Damage(path, number, str(error))
        except OSError as error:
            yield Damage(path, None, error.strerror or str(error))
