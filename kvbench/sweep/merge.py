"""Puts run folders together that machines without a common file system wrote (docs/scale.md)."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from kvbench.errors import InputError
from kvbench.files import check_folder, read_regular, write_together
from kvbench.locks import is_held, locked
from kvbench.records import BASELINE, SAMPLE_FILES, Record, read_folders, read_records
from kvbench.run_folder import (
    INVOCATION_FILES,
    MERGED,
    RUN_FILE,
    RUN_FORMAT,
    check_common,
    find_run_folders,
    read_settings,
    remove_unused,
    unfinished,
    write_once,
)


def merge(
    names: Sequence[str | Path],
    out: Path,
    home: Path,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[int, int]:
    """Copy the records and invocations of run folders into the run folder `out`, old or new.

    Returns how many cells it holds then, and how many of them have failed; `note` is told what a
    report of the folders notes, too. `names` and `home` are as in `find_run_folders`. Raises
    InputError, before anything is written, if a folder is no run, cannot be read, or has other
    settings than the rest, if none has a record, or if a process writes to `out`; what is damaged
    is named.
    """
    check_folder(out)
    target = out.resolve()
    # A folder of run folders may hold `out` itself, from an earlier merge.
    folders = [f for f in find_run_folders(names, home) if f.resolve() != target]
    if not folders:
        raise InputError(f"{out} is the only folder to merge; choose another --out")
    common = None
    for folder in folders:
        settings = read_settings(folder)
        if settings is None:
            raise InputError(f"{folder} has no {RUN_FILE}, so its settings are not known")
        common = settings["common"] if common is None else common
        check_common(folder, common)
    if common is None:
        raise InputError("nothing to merge: name run folders")
    is_new = check_common(out, common) is None
    notes: list[str] = []
    if not read_folders(dict.fromkeys([*folders, out], common), notes=notes):
        raise InputError(f"nothing to merge: {', '.join(map(str, folders))} hold no record yet")
    copies: dict[str, bytes] = {}
    for name, contents in (copy for folder in folders for copy in files_of(folder)):
        copies[name] = longer(name, copies.get(name, b""), contents)
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_once(out / RUN_FILE, json.dumps({"format": RUN_FORMAT, "common": common}) + "\n")
        with locked(out / RUN_FILE):  # so that no process starts to write meanwhile
            write_together(changes(out, copies))
    except (OSError, InputError) as error:
        if is_new:
            remove_unused(out, new_folders)
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    records = read_records(out, common=common)
    for text in (*notes, *notes_on_the_rest(out, records)):
        note(text)
    return len(records), sum(record.error is not None for record in records)


def changes(out: Path, copies: Mapping[str, bytes]) -> dict[Path, str | bytes]:
    """The files that `out` lacks, or has in an earlier state; InputError if a process writes there.

    The caller holds the lock of its `run.json`.
    """
    for path in out.glob(SAMPLE_FILES):
        if is_held(path):
            raise InputError(
                f"a process measures into {out} ({path.name}); wait for its end, or choose another "
                "--out"
            )
    changed: dict[Path, str | bytes] = {}
    for name, contents in copies.items():
        path = out / name
        there = read_regular(path) if os.path.lexists(path) else None
        if there is None or there != (merged := longer(name, there, contents)):
            changed[path] = contents if there is None else merged
    return changed


def notes_on_the_rest(out: Path, records: Sequence[Record]) -> list[str]:
    """What is missing of what was asked for, as a report says it."""
    baseline = [record for record in records if record.method == BASELINE]
    there = {(record.task, record.sample_seed, record.sample) for record in baseline}
    return unfinished((read_settings(out) or {"invocations": []})["invocations"], there)


def files_of(folder: Path) -> Iterator[tuple[str, bytes]]:
    """The files of a run folder that a merged one needs, by name, with their contents.

    Invocations of the older format, which are in `run.json`, become files.
    """
    try:
        for pattern in (INVOCATION_FILES, SAMPLE_FILES):
            for path in sorted(folder.glob(pattern)):
                yield path.name, read_regular(path)
        run = json.loads(read_regular(folder / RUN_FILE))
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}") from None
    for invocation in run.get("invocations", []):
        text = json.dumps(invocation, indent=2) + "\n"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        yield INVOCATION_FILES.replace("*", f"{MERGED}{digest}"), text.encode()


def longer(name: str, first: bytes, second: bytes) -> bytes:
    """Of two states of one file, the later one; InputError if neither grew out of the other."""
    if not first.startswith(second) and not second.startswith(first):
        raise InputError(
            f"two files are called {name}, and neither is an earlier state of the other: one was "
            "edited; rename it, or merge the folders into another --out"
        )
    return max(first, second, key=len)
