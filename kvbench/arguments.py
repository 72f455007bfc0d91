"""Checks of what a user gives from Python: each raises InputError with the argument's name."""

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

from kvbench.errors import InputError

MOST = 2**31 - 1  # of anything that is counted
MOST_SAMPLES = 10**6
LARGEST = 2**63 - 1  # whole number that records and data frames can hold


def check_text(name: str, value: Any) -> None:
    """The value is a text."""
    if not isinstance(value, str) or not value:
        raise InputError(f"{name} must be a text, not {value!r}")


def check_whole(
    name: str, value: Any, least: int = 1, most: int = MOST, what: str = "a whole number"
) -> None:
    """The value is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be {what}, not {value!r}")
    if int(value) < least:
        raise InputError(f"{name} must be at least {least}, not {value}")
    if int(value) > most:
        raise InputError(f"{name} is too large: give at most {most}")


def check_share(name: str, value: Any) -> None:
    """The value is a number above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise InputError(f"{name} must be a number, like 0.3, not {value!r}")
    if not 0 < float(value) <= 1:
        raise InputError(f"{name} must be more than 0 and at most 1, not {float(value):g}")


def check_options(name: str, value: Any) -> None:
    """The value is a dictionary whose keys are names, or None."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f'{name} must be a dictionary, like {{"window": 8}}, not {value!r}')


def check_paths(name: str, values: tuple[Any, ...]) -> None:
    """Each value is a path."""
    for value in values:
        if not isinstance(value, str | os.PathLike) or not str(value).strip():
            raise InputError(
                f"{name} takes folders as single arguments, {name}(FIRST, SECOND), not {value!r}"
            )
