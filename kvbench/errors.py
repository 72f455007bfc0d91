"""The exceptions whose messages are for users, and the hint for a misspelt name."""

import os
from collections.abc import Iterable
from difflib import get_close_matches

BAD_INPUT = 2  # the exit code of a command that could not use a user's input, or not all of it


class InputError(Exception):
    """A user's input cannot be used. The message says what is wrong with it and what to do.

    The command line prints the message on one line and exits with code 2.
    """


class ContractError(Exception):
    """A method or a task gave something that it may not give. The message names it.

    The cells that it concerns fail with this message; the rest of a sweep is measured. `method` is
    the name of the method, "" if it is none.
    """

    def __init__(self, message: str, method: str = "") -> None:
        super().__init__(message)
        self.method = method


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The known name nearest to `name` as "did you mean 'X'?"; all known names if none is near."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"


def debugging() -> bool:
    """Whether the user asked for tracebacks, by KVBENCH_DEBUG=1."""
    return os.environ.get("KVBENCH_DEBUG", "") not in ("", "0")
