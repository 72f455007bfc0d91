"""A disk that is full."""

import errno
import os

import pytest


def full_after(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full once so many files have been made durable."""
    left = iter(range(written))
    sync = os.fsync

    def full(file: int) -> None:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
