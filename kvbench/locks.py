"""Locks on files, which end with the process that holds them, however it ends.

A lock belongs to an open file: it ends when the file is closed, and a child that is forked (and
does not start another program) holds it too. Some file systems have no locks; nothing waits there.
Network file systems that have them share them between machines, unless they are mounted so that
locks are local.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


def hold(file: int) -> bool:
    """Lock an open file until it is closed, once nobody else holds it; False without locks."""
    return _lock(file, "LOCK_EX")


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of a file; False if there is no such file."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be a pipe
    except FileNotFoundError:
        return False
    except PermissionError:
        return True  # nobody can tell
    try:
        _lock(file, "LOCK_SH", "LOCK_NB")
    except (BlockingIOError, PermissionError):
        return True
    finally:
        os.close(file)
    return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is there; FileNotFoundError if it is not, or no longer."""
    while True:
        file = _open(path)
        try:
            hold(file)
            if same_file(file, path):  # else it was replaced while this process waited
                yield
                return
        finally:
            os.close(file)


def same_file(file: int, path: Path) -> bool:
    """Whether an open file is still the one at its path; OSError if nothing is there."""
    return os.path.samestat(os.fstat(file), os.stat(path))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR)  # network file systems lock only what can be written
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def _lock(file: int, *flags: str) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, sum(getattr(fcntl, flag) for flag in flags))
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        raise
    return True
