"""Puts run folders together that machines without a common file system wrote (docs/scale.md)."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvbench.errors import InputError
from kvbench.files import read_regular, write_together
from kvbench.records import SAMPLE_FILES, read_records
from kvbench.run_folder import (
    INVOCATION_FILES,
    RUN_FILE,
    RUN_FORMAT,
    check_common,
    find_run_folders,
    read_settings,
    remove_unused,
    write_once,
)


def merge(names: Sequence[str | Path], out: Path, home: Path) -> tuple[int, int]:
    """Copy the records and invocations of run folders into the run folder `out`, old or new.

    Returns how many cells it holds then, and how many of them have failed. `names` and `home` are
    as in `find_run_folders`. Raises InputError, before anything is written, if a folder is no run,
    cannot be read, or has other settings than the rest; what is damaged is named.
    """
    try:
        target = out.resolve()
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
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
        check_common(folders[0], settings["common"])  # it may have settings that the first lacks
        read_records(folder, common=common)
    if common is None:
        raise InputError("nothing to merge: name run folders")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another --out")
    is_new = check_common(out, common) is None
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    copies: dict[str, bytes] = {}
    for name, contents in (copy for folder in folders for copy in files_of(folder)):
        copies[name] = longer(name, copies.get(name, b""), contents)
    try:
        for path in (out / name for name in copies):
            if os.path.lexists(path):
                copies[path.name] = longer(path.name, read_regular(path), copies[path.name])
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_once(out / RUN_FILE, json.dumps({"format": RUN_FORMAT, "common": common}) + "\n")
        write_together({out / name: contents for name, contents in copies.items()})
    except OSError as error:
        if is_new:
            remove_unused(out, new_folders)
        raise InputError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    records = read_records(out, common=common)
    return len(records), sum(record.error is not None for record in records)


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
        yield INVOCATION_FILES.replace("*", f"merged-{digest}"), text.encode()


def longer(name: str, first: bytes, second: bytes) -> bytes:
    """Of two states of one file, the later one; InputError if neither grew out of the other."""
    if not first.startswith(second) and not second.startswith(first):
        raise InputError(
            f"two files are called {name}, and neither is an earlier state of the other: one was "
            "edited; rename it, or merge the folders into another --out"
        )
    return max(first, second, key=len)
