"""The one exception a user is meant to see, and the hint that goes with a misspelt name."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, and how to mend it.

    The command line prints the message on one line and exits with code 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the known name nearest to `name`, else the known names."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
