"""The run folder: the settings that its records share, and the files that processes write to.

It holds `run.json` (the settings that all its records share, and one entry for each process that
wrote to it) and `samples-<host>-<pid>-<random>.jsonl`. No two processes share a file of records, so
the store is safe on network file systems and after a kill at any moment. This module needs no
torch. See `docs/records.md`.
"""

import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict

import msgspec

from kvbench.errors import InputError
from kvbench.files import read_regular, write_atomically
from kvbench.records import SAMPLE_FILES, Record, check_depth, to_line

RUN_FILE = "run.json"
RUN_FORMAT = 1
END = "end"  # of the samples that a task reads


class _Experiment(TypedDict, total=False):
    tasks: list[str]


class _Invocation(TypedDict, total=False):
    started: str
    codes: dict[str, str]
    experiment: _Experiment
    skipped: dict[str, list[int]]


class _Settings(TypedDict):  # what `run.json` must hold, of all that is read from it
    common: dict[str, Any]
    invocations: list[_Invocation]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the contents of `run.json`, None if there is none.

    InputError if it is damaged, or was written by a newer kvbench.
    """
    path = folder / RUN_FILE
    try:
        contents = json.loads(read_regular(path))
        number = contents.get("format", RUN_FORMAT) if isinstance(contents, dict) else RUN_FORMAT
        if isinstance(number, int) and number > RUN_FORMAT:
            raise InputError(
                f"{path} is of format {number}, and this kvbench knows formats up to {RUN_FORMAT}; "
                "a newer kvbench wrote it: pip install --upgrade kvbench"
            )
        msgspec.convert(contents, _Settings)
        check_depth([contents])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("`", "")
        raise InputError(
            f"{path} is damaged ({reason}); delete it to continue the run, or choose another --out"
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
        codes = newer_codes(codes, each.get("codes", {}))
    return codes


def newer_codes(codes: Mapping[str, str], newer: Mapping[str, str]) -> dict[str, str]:
    """The codes of `current_codes` after an invocation; it may have asked for fewer samples."""
    merged = {**codes, **newer}
    for name in (name for name in newer if name.startswith("samples ") and name in codes):
        listed = newer[name].split()
        rest = [] if END in listed else codes[name].split()[len(listed) :]
        merged[name] = " ".join([*listed, *rest])
    return merged


def is_run(folder: Path) -> bool:
    """Whether the folder is a run folder that can be read."""
    try:
        return (folder / RUN_FILE).is_file() or any(folder.glob(SAMPLE_FILES))
    except OSError:
        return False


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders directly inside `folder`; the one written to last is at the end.

    Folders that cannot be read are passed over.
    """
    try:
        return sorted((f for f in folder.iterdir() if f.is_dir() and is_run(f)), key=_last_written)
    except OSError:
        return []


def _last_written(folder: Path) -> int:
    written = [0]
    for file in (folder / RUN_FILE, *folder.glob(SAMPLE_FILES)):
        with suppress(OSError):
            written.append(file.stat().st_mtime_ns)
    return max(written)


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
        if not os.path.exists(folder) and os.path.isdir(home / name):
            folder = home / name
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise InputError(f"cannot read {folder}: permission denied")
        if not os.path.isdir(folder):
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
