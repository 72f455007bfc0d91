"""Files that are written whole or not at all, and read only if they are files."""

import errno
import os
import secrets
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path

from kvbench.errors import InputError


def write_atomically(path: Path, contents: str | bytes, *, durable: bool = True) -> None:
    """Write a file so that a reader sees all of it or nothing; raises OSError.

    Without `durable` it may be lost if the machine stops, which is faster.
    """
    write_together({path: contents}, durable=durable)


def write_together(files: Mapping[Path, str | bytes], *, durable: bool = True) -> None:
    """Write files, each whole; all of them or, if there is no room, none; raises OSError."""
    drafts = {path: path.with_name(f".kvbench-{secrets.token_hex(8)}") for path in files}
    try:
        for path, contents in files.items():
            with drafts[path].open("wb") as file:
                file.write(as_bytes(contents))
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        for path, draft in drafts.items():
            os.replace(draft, path)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """InputError if no folder can be made or used at a path: it is a file, or its name too long."""
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(
            f"cannot write to {path}: {error.strerror}; choose another --out"
        ) from None
    if not is_folder:
        raise InputError(f"{path} is a file; name a folder")


def as_bytes(contents: str | bytes) -> bytes:
    """A file's contents; half of a surrogate pair, which UTF-8 does not have, as an escape."""
    return contents if isinstance(contents, bytes) else contents.encode("utf-8", "backslashreplace")


def open_regular(path: Path) -> BufferedReader:
    """Open a file for reading; OSError if it is a folder, a pipe or a device, which may hang."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path) -> bytes:
    """The contents of a regular file; raises OSError."""
    with open_regular(path) as file:
        return file.read()
