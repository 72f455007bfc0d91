"""Runs kvbench as a user does, in another process, or in this one, which takes less time."""

import contextlib
import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from helpers.warm import Program, python
from kvbench.cli.app import main

KVBENCH = [sys.executable, "-m", "kvbench"]


def kvbench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return python("-m", "kvbench", *arguments, folder=folder)


def kvbench_here(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The same without a process of its own, where a process is not the point."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
    ):
        code = main(list(arguments))
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def interruptible() -> None:
    """Make a child process heed SIGINT, which background jobs of a shell ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(arguments: list[str], folder: Path, under_way: Callable[[], bool]) -> str:
    """Run kvbench and press Ctrl-C once it is under way; its stderr, which has no traceback."""
    process = Program("-m", "kvbench", *arguments, folder=folder)
    while process.poll() is None and not under_way():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    return done.stderr


def interrupted_at_import(module: str, arguments: list[str], folder: Path) -> tuple[int, str]:
    """Press Ctrl-C once a module is imported; the exit code, and what was on stderr after it."""
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "kvbench", *arguments],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=interruptible,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("import time:") and line.split()[-1] == module:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    lines = [line for line in errors.splitlines() if not line.startswith("import time:")]
    return process.returncode, "\n".join(lines)
