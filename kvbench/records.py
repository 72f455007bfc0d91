"""The results store: one JSON line per measured cell, one file per writing process.

A run directory holds `run.json` (what every record in it has in common, and each invocation that
wrote to it) and `samples-<host>-<pid>-<random>.jsonl`. No two processes share a file, so the store
is safe on network file systems and after a kill at any moment. This module needs no torch.
"""

import json
import os
import re
import secrets
import socket
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from kvbench.errors import InputError

BASELINE = "full"  # the method that every other one is measured against
RUN_FILE = "run.json"
SAMPLE_FILES = "samples-*.jsonl"
RUN_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """One sample under one method and budget: a line of a results file.

    Footprints, peaks and reads are fractions of full attention's; bytes are bytes; times are
    seconds, of what cells share an equal part each, so that they add up to the time that passed.

    `timeline` is the course of what is resident as the rows go by (prompt tokens, then decoded
    ones), entries summed over layers and KV heads, patched ones left out. It goes in straight lines
    between its corners, and straight up or down where two have the same number of rows. The area
    under it is `resident_rows`, less half an entry for every row and KV head (a row's own entry is
    counted whole), and less one half more for every row that a full window decodes (its line is
    flat, the row's entry having replaced another).

    In layers that the model itself limits (a sliding window, chunks), a row counts the entries that
    it sees; the part of it under full attention is what `full_rows` counts there. Layers that read
    another layer's keys count nothing.

    A cell that failed has `error` set and None for everything that was not measured.
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
    kv_bytes_peak: int | None = None
    device_bytes_peak: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    timeline: list[list[int]] | None = None  # corners [rows, entries] of what is resident
    shared_rows: int | None = None  # cells that shared the prefill, this one included
    group_bytes_peak: int | None = None  # keys and values of all that ran with it
    method_code: str = ""  # short hash of the method's source; "" in records older than it
    error: str | None = None


_NAMES = tuple(f.name for f in fields(Record))
_REQUIRED = tuple(f.name for f in fields(Record) if f.default is MISSING)
_MEASURED = ("prediction", "score", "kv_footprint", "kv_peak")


def to_line(record: Record) -> bytes:
    """The record as one line of ASCII JSON, newline included."""
    values = {name: getattr(record, name) for name in _NAMES}
    return json.dumps(values, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def from_line(line: bytes) -> Record:
    """The record of one line; ValueError, with the reason, if it is none. Extra keys are let be."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    missing = [name for name in _REQUIRED if name not in values]
    if not missing and values.get("error") is None:
        missing = [name for name in _MEASURED if values.get(name) is None]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return Record(**{name: values[name] for name in _NAMES if name in values})


def read_records(folder: Path) -> list[Record]:
    """All records of a run directory, in order of file name, one per fingerprint.

    A last line without its newline was torn by a kill and is dropped. Where a fingerprint occurs
    more than once, a measured record is preferred to a failed one, else the first is taken. Raises
    InputError on an unreadable file or a damaged line, naming it.
    """
    by_cell: dict[str, Record] = {}
    for path in sorted(folder.glob(SAMPLE_FILES)):
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = from_line(line)
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}: not a record of kvbench ({error}); "
                    "delete the line to measure that sample again"
                ) from error
            known = by_cell.get(record.fingerprint)
            if known is None or (known.error is not None and record.error is None):
                by_cell[record.fingerprint] = record
    return list(by_cell.values())


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The contents of `run.json`, None if there is none; InputError if it is damaged."""
    path = folder / RUN_FILE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(contents["common"], dict) or not isinstance(
            contents["invocations"], list
        ):
            raise TypeError
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged; delete it to continue the run, or choose another --out"
        ) from error
    return dict(contents)


def is_run(folder: Path) -> bool:
    """Whether the folder is a run directory."""
    return (folder / RUN_FILE).is_file() or any(folder.glob(SAMPLE_FILES))


def find_runs(folder: Path) -> list[Path]:
    """The run directories directly inside `folder`, the one written to last at the end."""
    if not folder.is_dir():
        return []
    return sorted((f for f in folder.iterdir() if f.is_dir() and is_run(f)), key=_last_written)


def _last_written(folder: Path) -> int:
    files = [folder / RUN_FILE, *folder.glob(SAMPLE_FILES)]
    return max(file.stat().st_mtime_ns for file in files if file.exists())


class RunWriter:
    """Opens a run directory for this process; `append` makes records durable before it returns.

    `common` is what all records of a run must agree in (model, context, seed, ...); a directory
    whose `run.json` says otherwise is refused. `invocation` describes this process (settings,
    versions, hardware) and is added to `run.json`. A context manager: if nothing was appended to a
    directory that was new, nothing is left of it.
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
        """Write records and wait until they are on disk; InputError if the disk takes no more."""
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
                "make room and give the same command again"
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
        # By the file itself: an interrupt may come after a write and before it is counted.
        empty = os.fstat(self._file).st_size == 0
        os.close(self._file)
        if empty:
            self.path.unlink(missing_ok=True)
            self._remove_what_is_new()

    def _remove_what_is_new(self) -> None:
        """Take back `run.json` and the folders made for it, unless somebody uses them."""
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
            raise InputError(
                f"{folder} holds a run with other settings ({changes}); choose another --out"
            )
    return contents


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing of it; OSError as it comes."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
