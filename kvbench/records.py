"""What a record is: one measured cell, a JSON line of a results file.

The sweep writes records, the report reads them; `kvbench/run_folder.py` says where they lie. This
module needs no torch. See `docs/records.md`.
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from kvbench.errors import InputError

BASELINE = "full"  # the method that every other one is measured against
SAMPLE_FILES = "samples-*.jsonl"
COMPRESS = ("prompt", "context")  # what methods evict from: all, or what precedes the question


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
    budget: float
    prefill_chunk: int | None  # tokens; None where the result does not depend on it
    sample: int
    sample_seed: int
    context: int
    finished: str  # UTC, ISO 8601
    prompt_tail: str
    reference: Any
    prediction: str | None = None
    score: float | None = None
    kv_footprint: float | None = None
    kv_peak: float | None = None
    kv_reads: float | None = None
    resident_rows: int | None = None  # the integers whose ratio kv_footprint is
    full_rows: int | None = None
    patch_rows: int | None = None
    replay_rows: int | None = None
    kv_bytes_peak: int | None = None
    device_bytes_peak: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    timeline: list[list[int]] | None = None  # points [rows, entries resident]
    shared_rows: int | None = None  # cells that shared the prefill, this one included
    group_bytes_peak: int | None = None  # keys and values of the whole batch
    kv_held_peak: float | None = None  # as `kv_peak`, at one instant as executed
    read_chunk: int | None = None  # tokens of the prefill chunk in which the prompt was read
    method_code: str = ""  # a hash of the method's source, "" in records from before it was kept
    task_code: str = ""  # the same of the task's
    compress: str = "prompt"  # "context": what a method evicts from ends before the question
    kv_bytes_read: float | None = None  # for a decoded token, on average
    cluster: str | None = None  # samples of one cluster are not independent
    chat: bool | None = None  # whether the prompt was put into the model's chat template
    cut_tokens: int | None = None  # of a prompt that was too long; None: its task makes it fit
    sample_code: str = ""  # a hash of a sample that was read, "" if its task makes it
    source: str = ""  # where its task read it: a path or an address; "" if its task makes it
    error: str | None = None


# The JSON types of each type of a field; a whole number may stand for any number.
_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    str: (str,),
    str | None: (str, NoneType),
    int: (int,),
    int | None: (int, NoneType),
    float: (float, int),
    float | None: (float, int, NoneType),
    bool | None: (bool, NoneType),
    dict[str, Any]: (dict,),
    list[list[int]] | None: (list, NoneType),
}
_NAMES: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
_TYPES = {f.name: _JSON_TYPES[f.type] for f in fields(Record) if f.type is not Any}
_LEAST = {**dict.fromkeys(_TYPES, 0), "prefill_chunk": 1}
_LARGEST = 2**63 - 1  # whole number that a data frame can hold
_SHARES = ("budget", "score")  # from 0 to 1; patched tokens raise peaks a little above 1
_DEFAULTS = {f.name: None if f.default is MISSING else f.default for f in fields(Record)}
_REQUIRED = tuple(f.name for f in fields(Record) if f.default is MISSING)
_MEASURED = ("prediction", "score", "kv_footprint", "kv_peak")


def to_line(record: Record) -> bytes:
    """The record as one line of ASCII JSON, newline included."""
    values = {name: getattr(record, name) for name in _DEFAULTS}
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def from_line(line: bytes) -> Record:
    """Return the record of one line. Unknown keys are ignored; ValueError says what is wrong."""
    return Record(**_values(line))


def _values(line: bytes) -> dict[str, Any]:
    """Return the fields of a line's record, all of them; ValueError says what is wrong."""
    values = json.loads(line, parse_constant=_refuse_constant)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if b"\\u" in line:
        json.dumps(values, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    missing = [name for name in _REQUIRED if name not in values]
    if not missing and values.get("error") is None:
        missing = [name for name in _MEASURED if values.get(name) is None]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    values = {name: values.get(name, default) for name, default in _DEFAULTS.items()}
    _check(values)
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _check(values: dict[str, Any]) -> None:
    """Raise ValueError for a field of another type, or a number outside of what it can be."""
    for name, types in _TYPES.items():
        value = values[name]
        if type(value) not in types:
            raise ValueError(f"{name} is {_shown(value)}; expected {_NAMES[types[0]]}")
        if type(value) in (int, float) and not _LEAST[name] <= value <= _LARGEST:
            raise ValueError(f"{name} is {_shown(value)}; expected {_LEAST[name]} to {_LARGEST}")
    for name in _SHARES:
        if values[name] is not None and values[name] > 1:
            raise ValueError(f"{name} is {_shown(values[name])}; expected 0 to 1")
    for point in values["timeline"] or ():
        if type(point) is not list or [type(number) for number in point] != [int, int]:
            raise ValueError(f"timeline has a point {_shown(point)}; expected [rows, entries]")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def read_records(folder: Path) -> list[Record]:
    """Return all records of a run folder, one per fingerprint, in order of file name.

    A last line without a newline was cut by a kill and is dropped. Where a fingerprint occurs more
    than once, a measured record is preferred to a failed one, otherwise the first is taken. Raises
    InputError if a file cannot be read or a line is damaged, and names it.
    """
    return [Record(**values) for values in read_values(folder)]


def read_values(folder: Path) -> list[dict[str, Any]]:
    """Return the fields of what `read_records` returns, as one dict per record (this is faster)."""
    by_cell: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(SAMPLE_FILES)):
        for number, line in enumerate(_whole_lines(path), start=1):
            try:
                values = _values(line)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, line {number}: not a record of kvbench ({error}); "
                    "delete the line to measure that sample again"
                ) from error
            known = by_cell.get(values["fingerprint"])
            if known is None or (known["error"] is not None and values["error"] is None):
                by_cell[values["fingerprint"]] = values
    return list(by_cell.values())


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file that end with a newline."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
