"""The results store: one JSON line per measured cell, one file per writing process.

The sweep writes records here; the report reads them. A run folder holds `run.json` (the settings
that all its records share, and one entry for each process that wrote to it) and
`samples-<host>-<pid>-<random>.jsonl`. No two processes share a file, so the store is safe on
network file systems and after a kill at any moment. This module needs no torch. See
`docs/records.md`.
"""

import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

from kvbench.errors import InputError

BASELINE = "full"  # the method that every other one is measured against
RUN_FILE = "run.json"
SAMPLE_FILES = "samples-*.jsonl"
RUN_FORMAT = 1
END = "end"  # of the samples that a task reads
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


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the contents of `run.json`, None if there is none; InputError if it is damaged."""
    path = folder / RUN_FILE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        each = [contents["common"], *contents["invocations"]]
        each += [one.get("codes", {}) for one in contents["invocations"]]
        if not all(isinstance(one, dict) for one in each):
            raise TypeError
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged; delete it to continue the run, or choose another --out"
        ) from error
    return dict(contents)


def current_codes(runs: Iterable[Mapping[str, Any] | None]) -> dict[str, str]:
    """The code of every method and task when it was last asked for, by `method NAME`, `task NAME`.

    By `samples NAME`, the codes of the samples that a task read, in order with spaces between, and
    `END` if there are no more. `runs` are the contents of `run.json` files. Records of other codes
    are older, whenever they were measured: an edit may have been taken back.
    """
    invocations = [each for run in runs if run is not None for each in run["invocations"]]
    codes: dict[str, str] = {}
    for each in sorted(invocations, key=lambda each: str(each.get("started", ""))):
        codes |= each.get("codes", {})
    return codes


def is_run(folder: Path) -> bool:
    """Whether the folder is a run folder."""
    return (folder / RUN_FILE).is_file() or any(folder.glob(SAMPLE_FILES))


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders directly inside `folder`; the one written to last is at the end."""
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if f.is_dir() and is_run(f)), key=_last_written)


def _last_written(folder: Path) -> int:
    files = [folder / RUN_FILE, *folder.glob(SAMPLE_FILES)]
    return max(file.stat().st_mtime_ns for file in files if file.exists())


def find_run_folders(names: Iterable[str | Path], home: Path) -> list[Path]:
    """Return the run folders that a user names; without names, the one in `home` written to last.

    A name is a run folder, a folder of run folders, or the name of either inside `home`. Raises
    InputError if there is no run.
    """
    names = list(names)
    if not names:
        runs = find_runs(home)
        if not runs:
            raise InputError(f"no run in {home}; make one with 'kvbench run', or name one")
        return runs[-1:]
    folders: list[Path] = []
    for name in names:
        folder = Path(name)
        if not folder.exists() and (home / name).is_dir():
            folder = home / name
        if not folder.is_dir():
            known = ", ".join(run.name for run in find_runs(home)[-3:])
            raise InputError(
                f"no run directory '{name}'" + (f"; in {home} are: {known}" if known else "")
            )
        inside = [folder] if is_run(folder) else find_runs(folder)
        if not inside:
            raise InputError(f"{folder} holds no results of kvbench run")
        folders += inside
    return list(dict.fromkeys(folders))


class RunWriter:
    """Opens a run folder for this process; `append` makes records durable before it returns.

    `common` holds the settings that all records of a run share (model, context, seed, ...); a
    folder whose `run.json` has other values is refused with InputError. `invocation` describes this
    process (settings, versions, hardware) and is added to `run.json`. It is a context manager: a
    new folder to which nothing was appended is removed at the end.
    """

    def __init__(self, folder: Path, common: dict[str, Any], invocation: dict[str, Any]) -> None:
        self.folder = folder
        known = check_common(folder, common)
        invocations = [] if known is None else known["invocations"]
        self._created = known is None
        self._new_folders = [f for f in (folder, *folder.parents) if not f.exists()]
        name = re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname()) or "host"
        self.path = folder / f"samples-{name}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings = {
                "format": RUN_FORMAT,
                "common": common,
                "invocations": [*invocations, invocation],
            }
            write_atomically(folder / RUN_FILE, json.dumps(settings, indent=2) + "\n")
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            self._remove_what_is_new()
            raise InputError(
                f"cannot write to {folder}: {error.strerror}; choose another --out"
            ) from error
        self._length = 0

    def append(self, records: Iterable[Record]) -> None:
        """Write records and wait until they are on disk; InputError if the disk is full."""
        data = b"".join(to_line(record) for record in records)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._length)
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; what was finished before is kept, "
                "free some space and give the same command again"
            ) from error
        self._length += len(data)

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ask the file itself: an interrupt may come between a write and the count of it.
        empty = os.fstat(self._file).st_size == 0
        os.close(self._file)
        if empty:
            self.path.unlink(missing_ok=True)
            self._remove_what_is_new()

    def _remove_what_is_new(self) -> None:
        """Remove `run.json` and the folders made for it, unless another process uses them."""
        if self._created and not any(self.folder.glob(SAMPLE_FILES)):
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            for folder in self._new_folders:
                try:
                    folder.rmdir()
                except OSError:
                    return


def check_common(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of `run.json` if there is one; InputError if its records differ in `wanted`."""
    contents = read_settings(folder)
    if contents is not None:
        known = contents["common"]
        different = [key for key in wanted if known.get(key) != wanted[key]]
        if different:
            changes = "; ".join(f"{k} was {known.get(k)}, now {wanted[k]}" for k in different)
            what = "with other settings"
            if different == ["kvbench"]:
                what = "that other code of kvbench measured"
            raise InputError(f"{folder} holds a run {what} ({changes}); choose another --out")
    return contents


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file so that a reader sees all of it or nothing; raises OSError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        draft.write_bytes(contents if isinstance(contents, bytes) else contents.encode("utf-8"))
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
