"""The run folder: the settings that its records share, and the files that processes write to.

It holds `run.json` (the settings that all its records share, written once) and for each process
`samples-<host>-<pid>-<random>.jsonl` and `invocation-<host>-<pid>-<random>.json`. No two processes
write to one file, so the store is safe on network file systems and after a kill at any moment.
Which cells a process measures at the moment is in `kvbench/sweep/claims.py`. This module needs no
torch. See `docs/records.md`.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, TypedDict

import msgspec

from kvbench.arguments import MOST_SAMPLES
from kvbench.errors import InputError
from kvbench.files import open_regular, read_regular, write_atomically
from kvbench.locks import hold, locked, same_file
from kvbench.records import SAMPLE_FILES, SHOWN, Record, check_depth, to_line, unique

RUN_FILE = "run.json"
RUN_FORMAT = 2  # in format 1, the invocations are in `run.json` too
INVOCATION_FILES = "invocation-*.json"
MERGED = "merged-"  # begins the name of an invocation that was in `run.json`
ATTEMPTS = 10  # to enter a folder that other processes make and remove at the same time
END = "end"  # of the samples that a task reads


# What `run.json` and the files of invocations must hold, of all that is read from them.
class _Experiment(TypedDict, total=False):
    tasks: list[str]
    sources: dict[str, str]


_Number = Annotated[int, msgspec.Meta(ge=0, le=MOST_SAMPLES)]


class _Choices(TypedDict, total=False):
    samples: _Number
    seed: int | list[int]
    shard: tuple[_Number, _Number] | None


class _Invocation(TypedDict, total=False):
    started: str
    common_hash: str
    settings: _Choices
    codes: dict[str, str]
    experiment: _Experiment
    skipped: dict[str, list[int]]


class _Common(TypedDict):
    common: dict[str, Any]


class _Settings(_Common, total=False):
    invocations: list[_Invocation]  # in format 1


def read_settings(folder: Path) -> dict[str, Any] | None:
    """Return what a run folder says of its run, None if it has no `run.json`.

    The contents of `run.json`, and by `invocations` what each process that wrote to the folder says
    of itself, in the order in which they started. InputError if a file is damaged, was written by a
    newer kvbench, or is of a process with other settings than `run.json` states.
    """
    run = _read_object(folder / RUN_FILE, _Settings)
    if run is None:
        return None
    # Before the invocations: a process writes its own first.
    samples = [path for path in folder.glob(SAMPLE_FILES) if _size(path)]
    files = sorted(folder.glob(INVOCATION_FILES))
    found = {path: _read_object(path, _Invocation) for path in files}
    known = {path: one for path, one in found.items() if one is not None}
    _check_origin(folder, run, known, samples)
    invocations = [*run.get("invocations", []), *known.values()]
    invocations.sort(key=lambda each: str(each.get("started", "")))
    return {**run, "invocations": invocations}


def read_common(folder: Path) -> dict[str, Any]:
    """The settings that all records of a run folder share; none if it has no `run.json`.

    Raises InputError as `read_settings`.
    """
    return dict((read_settings(folder) or {"common": {}})["common"])


def hash_of(common: Mapping[str, Any]) -> str:
    """A hash of the settings that the records of a folder share; null is as good as none."""
    given = {name: value for name, value in common.items() if value is not None}
    return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]


def _check_origin(
    folder: Path,
    run: Mapping[str, Any],
    invocations: Mapping[Path, Mapping[str, Any]],
    samples: Iterable[Path],
) -> None:
    """InputError if a file is of a process with other settings than `run.json` states.

    A process says in its invocation which ones its records share. Invocations of before this was
    kept say nothing, and those of format 1 were in `run.json` and do not name their files.
    """
    common = hash_of(run["common"])
    for path, one in invocations.items():
        if one.get("common_hash", common) != common:
            raise InputError(
                f"{path} is of a process with other settings than {folder / RUN_FILE} states; put "
                f"back the {RUN_FILE} that was there, or move this file and its samples away"
            )
    names = {path.stem.partition("-")[2] for path in invocations}
    kept = any("common_hash" in one for one in invocations.values())
    if kept and not run.get("invocations") and not any(n.startswith(MERGED) for n in names):
        for path in samples:
            name = path.stem.partition("-")[2]
            if name not in names:
                raise InputError(
                    f"{path} has no invocation-{name}.json, which says with which settings it was "
                    "measured; put it back, or move the file away"
                )


def _size(path: Path) -> int:
    """The bytes of a file, 0 if it is gone."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _read_object(path: Path, schema: Any) -> dict[str, Any] | None:
    """The JSON object of a file, which must be as the schema says; None if there is no file."""
    try:
        contents = json.loads(read_regular(path), object_pairs_hook=unique)
        number = contents.get("format", RUN_FORMAT) if isinstance(contents, dict) else RUN_FORMAT
        if type(number) is not int or number < 1:
            raise ValueError(f"its format is {number!r}; expected a whole number like {RUN_FORMAT}")
        if number > RUN_FORMAT:
            raise InputError(
                f"{path} is of format {number}, and this kvbench knows formats up to {RUN_FORMAT}; "
                "a newer kvbench wrote it: pip install --upgrade kvbench"
            )
        msgspec.convert(contents, schema)
        check_depth([contents])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}; make it readable, or move it away"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("`", "")
        raise InputError(
            f"{path} is damaged ({reason}); put back what it was, or use another folder"
        ) from error
    return dict(contents)


def unfinished(
    invocations: Sequence[Mapping[str, Any]],
    there: Set[tuple[str, int, int]],
    shown: Mapping[tuple[str, str], str] | None = None,
) -> list[str]:
    """Notes on samples that processes were asked for and that have no record of full attention.

    `there` are those that have one, as task, seed and index. `shown` is as in `current_codes`.
    """
    wanted: dict[str, set[tuple[str, int, int]]] = {}
    shards: dict[int, set[int]] = {}
    for each in invocations:
        settings, sources = each.get("settings", {}), _sources(each)
        seeds = settings.get("seed", [])
        if part := settings.get("shard"):
            shards.setdefault(part[1], set()).add(part[0])
        for task in each.get("experiment", {}).get("tasks", []):
            listed = each.get("codes", {}).get(f"samples {task}", "").split()
            asked = settings.get("samples", 0)
            count = min(asked, len(listed) - 1) if END in listed else asked
            indices = set(range(count)) - set(each.get("skipped", {}).get(task, []))
            name = (shown or {}).get((task, sources.get(task, "")), task)
            for seed in seeds if isinstance(seeds, list) else [seeds]:
                wanted.setdefault(name, set()).update((name, seed, index) for index in indices)
    notes = [
        f"{task}: unfinished, {len(samples & there)} of {len(samples)} samples are there"
        for task, samples in wanted.items()
        if not samples <= there
    ]
    if notes:
        for count, parts in sorted(shards.items()):
            missing = [f"{n}/{count}" for n in range(1, count + 1) if n not in parts]
            more = [f"{len(missing) - SHOWN} more"] if len(missing) > SHOWN else []
            if missing:
                notes.append(f"shards that are missing: {', '.join([*missing[:SHOWN], *more])}")
    return notes


def current_codes(
    runs: Iterable[Mapping[str, Any] | None], shown: Mapping[tuple[str, str], str] | None = None
) -> dict[str, str]:
    """The code of every method and task when it was last asked for, by `method NAME`, `task NAME`.

    By `samples NAME`, the codes of the samples that a task read, in order with spaces between, and
    `END` if there are no more. `runs` are the contents of `run.json` files. Records of other codes
    are older, whenever they were measured: an edit may have been taken back. `shown` are other
    names of tasks, by task and source (`kvbench.report.sources`).
    """
    invocations = [each for run in runs if run is not None for each in run["invocations"]]
    codes: dict[str, str] = {}
    for each in sorted(invocations, key=lambda each: str(each.get("started", ""))):
        sources, renamed = _sources(each), {}
        for name, code in each.get("codes", {}).items():
            kind, _, what = name.partition(" ")
            if kind != "method":
                what = (shown or {}).get((what, sources.get(what, "")), what)
            renamed[f"{kind} {what}"] = code
        codes = newer_codes(codes, renamed)
    return codes


def newer_codes(codes: Mapping[str, str], newer: Mapping[str, str]) -> dict[str, str]:
    """The codes of `current_codes` after an invocation; it may have asked for fewer samples."""
    merged = {**codes, **newer}
    for name in (name for name in newer if name.startswith("samples ") and name in codes):
        listed = newer[name].split()
        rest = [] if END in listed else codes[name].split()[len(listed) :]
        merged[name] = " ".join([*listed, *rest])
    return merged


def samples_by_source(
    invocations: Iterable[Mapping[str, Any]],
) -> dict[str, dict[str, list[set[str]]]]:
    """By task and source, the codes that each of its samples has had, in order.

    The source is "" and without samples if the task makes them.
    """
    found: dict[str, dict[str, list[set[str]]]] = {}
    for each in invocations:
        sources, codes = _sources(each), each.get("codes", {})
        for task in each.get("experiment", {}).get("tasks", []):
            samples = found.setdefault(task, {}).setdefault(sources.get(task, ""), [])
            listed = codes.get(f"samples {task}", "").split()
            samples += [set() for _ in listed[len(samples) :]]
            for known, code in zip(samples, listed, strict=False):
                known.add(code)
    return found


def same_data(one: list[set[str]], other: list[set[str]]) -> bool:
    """Whether two sources, as `samples_by_source` gives them, are one: all samples of both agree.

    So a file that was moved or copied is the same data, also if it was edited before or after.
    """
    both = [(a, b) for a, b in zip(one, other, strict=False) if a and b]
    return bool(both) and all(a & b for a, b in both)


def _sources(invocation: Mapping[str, Any]) -> dict[str, str]:
    return dict(invocation.get("experiment", {}).get("sources", {}))


def check_sources(folder: Path, invocation: Mapping[str, Any]) -> None:
    """InputError if a task's samples are from elsewhere than those of its name in the folder."""
    settings = read_settings(folder)
    if settings is None:
        return
    sources = _sources(invocation)
    found = samples_by_source([*settings["invocations"], invocation])
    for task in invocation.get("experiment", {}).get("tasks", []):
        own = sources.get(task, "")
        for other, samples in found[task].items():
            if other != own and not same_data(samples, found[task][own]):
                here, there = (each or "kvbench itself" for each in (own, other))
                raise InputError(
                    f"{folder} holds other samples of a task '{task}', from {there}; those from "
                    f"{here} need another --out, or another name"
                )


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
    files = [folder / RUN_FILE, *folder.glob(INVOCATION_FILES), *folder.glob(SAMPLE_FILES)]
    for file in files:
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
    process (settings, versions, hardware). While the process lives it holds the lock of its file of
    records, by which others see that it lives; `has_locks` says whether the file system has locks.
    It is a context manager: a new folder to which nothing was appended is removed at the end.
    """

    def __init__(self, folder: Path, common: dict[str, Any], invocation: dict[str, Any]) -> None:
        self.folder = folder
        host = re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname()) or "host"
        self.name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = folder / f"samples-{self.name}.jsonl"
        self.has_locks = False
        self._invocation = folder / f"invocation-{self.name}.json"
        self._length = 0
        self._is_new = check_common(folder, common) is None
        self._new_folders = [f for f in (folder, *folder.parents) if not f.exists()]
        try:
            self._file = self._open(common, invocation)
        except InputError:  # another process was faster, with other settings
            self._invocation.unlink(missing_ok=True)
            raise
        except OSError as error:
            with suppress(OSError):
                self._invocation.unlink(missing_ok=True)
            self._remove_if_unused()
            raise InputError(
                f"cannot write to {folder}: {error.strerror}; choose another --out"
            ) from error

    def _open(self, common: dict[str, Any], invocation: dict[str, Any]) -> int:
        """Make what is missing of the folder, and the files of this process.

        Until this process has a file of records, the process that made the folder may remove it;
        then all is made again.
        """
        run = self.folder / RUN_FILE
        settings = json.dumps({"format": RUN_FORMAT, "common": common}, indent=2) + "\n"
        about = {**invocation, "common_hash": hash_of(common)}
        removed: OSError | None = None
        for _ in range(ATTEMPTS):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_once(run, settings)
                with locked(run):
                    check_common(self.folder, common)  # before others could read the invocation
                    write_atomically(self._invocation, json.dumps(about, indent=2) + "\n")
                    self._run_file = os.stat(run)
                    check_sources(self.folder, invocation)
                    file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                    self.has_locks = hold(file)
                    return file
            except FileNotFoundError as error:
                removed = error
        assert removed is not None
        raise removed

    def append(self, records: Iterable[Record]) -> None:
        """Write records and wait until they are on disk.

        InputError if they are not: the disk is full, or the folder is no longer at its path.
        """
        self.check()
        data = b"".join(to_line(record) for record in records)
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._length)
            raise InputError(
                f"cannot write to {self.path}: {error.strerror}; what was finished before is kept, "
                "free some space and give the same command again"
            ) from error
        self._length += len(data)
        self.check()

    def check(self) -> None:
        """InputError if what this process wrote is no longer at its path."""
        gone = ""
        if not self._in_place() or os.fstat(self._file).st_size < self._length:
            gone = self.path.name
        with suppress(OSError):
            if not os.path.samestat(self._run_file, os.stat(self.folder / RUN_FILE)):
                gone = RUN_FILE
        if gone:
            raise InputError(
                f"{self.folder} has changed under the run: {gone} was deleted, moved, "
                "replaced or unmounted; put it back if it is elsewhere, and give the same command "
                "again"
            )

    def check_stored(self, fingerprints: Set[str]) -> None:
        """InputError unless the folder has a record of every cell of these fingerprints."""
        self.check()
        missing = len(fingerprints - {cell for cell, _ in read_fingerprints(self.folder)})
        if missing:
            raise InputError(
                f"{missing} of {len(fingerprints)} finished cells cannot be read back from "
                f"{self.folder}: something else deleted or changed files there; give the same "
                "command again to measure them"
            )

    def _in_place(self) -> bool:
        try:
            return same_file(self._file, self.path)
        except OSError:
            return False

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Ask the file itself: an interrupt may come between a write and the count of it.
        unused = os.fstat(self._file).st_size == 0 and self._in_place()
        os.close(self._file)
        if unused:
            self.path.unlink(missing_ok=True)
            self._remove_if_unused()

    def _remove_if_unused(self) -> None:
        if self._is_new:
            remove_unused(self.folder, self._new_folders)


def remove_unused(folder: Path, new: Iterable[Path]) -> None:
    """Remove a run folder unless a process has a file of records there.

    `new` are the folders to remove if they are empty then, the innermost one first.
    """
    run = folder / RUN_FILE
    with suppress(OSError):
        with suppress(FileNotFoundError), locked(run):
            if any(folder.glob(SAMPLE_FILES)):
                return
            for path in (*folder.glob(INVOCATION_FILES), run):
                path.unlink(missing_ok=True)
        for each in new:
            with suppress(FileNotFoundError):
                each.rmdir()


def write_once(path: Path, contents: str) -> bool:
    """Write a file unless it is there; whether this process wrote it. Raises OSError.

    A reader sees all of it or nothing, and of several processes one alone writes it.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        write_atomically(draft, contents)
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        # A file system without links: two processes that start at one instant may both write.
        if path.exists():
            return False
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return True


def read_fingerprints(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The fingerprint of each record that a run folder has now, with its line."""
    return AddedRecords(folder, since_now=False).read()


class AddedRecords:
    """The records that are added to a run folder after this object is made, as they are written.

    Without `since_now`, those that are there already are read too. A line that another process has
    not finished is left for the next time, and one that is no record is passed over.
    """

    def __init__(self, folder: Path, *, since_now: bool = True) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}  # bytes of each file
        if since_now:
            for path in folder.glob(SAMPLE_FILES):
                self._read[path] = sum(map(len, _whole_lines(path, 0)))

    def read(self, own: Path | None = None) -> Iterator[tuple[str, bytes]]:
        """Each new record's fingerprint and line, without those of the file `own`."""
        for path in sorted(self._folder.glob(SAMPLE_FILES)):
            if path == own:
                continue
            for line in _whole_lines(path, self._read.get(path, 0)):
                self._read[path] = self._read.get(path, 0) + len(line)
                try:
                    yield str(json.loads(line)["fingerprint"]), line
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue


def _whole_lines(path: Path, start: int) -> Iterator[bytes]:
    """The lines of a file from byte `start` on, as far as they end with a newline."""
    with suppress(OSError), open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > start:
            file.seek(start)
            yield from (line for line in file if line.endswith(b"\n"))


def check_common(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of `run.json` if there is one; InputError if its records have others."""
    contents = read_settings(folder)
    if contents is None and any(os.path.getsize(path) for path in folder.glob(SAMPLE_FILES)):
        contents = read_settings(folder)  # another process may have made both since the first look
        if contents is None:
            raise InputError(
                f"{folder} holds records but no {RUN_FILE}, which says how they were measured; put "
                "it back, or choose another --out"
            )
    if contents is not None:
        known = contents["common"]
        different = [key for key in {**known, **wanted} if known.get(key) != wanted.get(key)]
        if different:
            changes = "; ".join(f"{k} was {known.get(k)}, now {wanted.get(k)}" for k in different)
            what = "with other settings"
            if different == ["kvbench"]:
                what = "that other code of kvbench measured"
            raise InputError(f"{folder} holds a run {what} ({changes}); choose another --out")
    return contents
