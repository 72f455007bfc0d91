"""The program `kvbench`, which is also `python -m kvbench`.

It heeds Ctrl-C from its first line on, so all else is imported later.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


def main() -> int:
    """Run this process's command line and return its exit code."""
    open_streams()
    try:
        os.getcwd()
    except OSError:  # libraries end with messages of their own
        os.write(2, b"kvbench: the current directory no longer exists; change to another: cd ~\n")
        return 2
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, interrupt)
        sys.unraisablehook = end_if_interrupted
    try:
        from kvbench.cli.app import main as run

        code = run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
        return code
    except KeyboardInterrupt:
        leave()


def open_streams() -> None:
    """Open what is closed of the standard streams, so that no other file takes their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(number, mode))


def interrupt(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; end at once during an import, which might pass over it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def end_if_interrupted(error: Any) -> None:
    """End at once where Python would show a KeyboardInterrupt and go on, as in `__del__`."""
    if isinstance(error.exc_value, KeyboardInterrupt):
        leave()
    sys.__unraisablehook__(error)


def leave() -> NoReturn:
    """End now, as after Ctrl-C. A run folder is whole at every moment."""
    os.write(2, b"kvbench: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
