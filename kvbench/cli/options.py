"""What the options of the command line are made of: lists, budgets, key=value, near names."""

from collections.abc import Callable, Sequence
from typing import Any

import click

from kvbench.errors import did_you_mean


class CommaList(click.ParamType[Any]):
    """`a,b,c` as a tuple of `item`s, repeated ones once; empty lists are refused."""

    def __init__(self, name: str, item: Callable[[str], Any] = str) -> None:
        self.name = name
        self.item = item

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        """The tuple of a string; a tuple is returned as it is."""
        if isinstance(value, tuple):
            return value
        texts = [text.strip() for text in str(value).split(",")]
        if not all(texts):
            self.fail(f"'{value}' has an empty entry; write {self.name} with commas between")
        try:
            return tuple(dict.fromkeys(self.item(text) for text in texts))
        except ValueError as error:
            self.fail(str(error))


def budget(text: str) -> float:
    """A budget, greater than 0 and at most 1; ValueError says so."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1:
        raise ValueError(
            f"'{text}' is not a budget: a share of the cache, more than 0 and at most 1, like 0.3"
        )
    return value


def tokens(text: str) -> int:
    """A number of tokens, at least 1; ValueError says so."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"'{text}' is not a number of tokens of at least 1, like 4096")
    return int(text)


def memory(text: str) -> int:
    """Bytes, from `8GiB`, `500MB` or a plain number; ValueError says what is expected."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number) :].lower()
    try:
        size = float(number) * units[unit]
        if not 1 <= size < 2**63:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f"'{text}' is not an amount of memory, like 8GiB or 500MB") from None
    return int(size)


def share(text: str) -> float:
    """A sparsity, between 0 and 1; ValueError says so."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise ValueError(f"'{text}' is not a sparsity: a share of the heads between 0 and 1")
    return value


def key_value(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """`key=value` texts as a dictionary; the last of equal keys wins."""
    for text in value:
        name, equals, _ = text.partition("=")
        if not name.strip() or not equals:
            raise click.BadParameter(f"'{text}' is not key=value, like window=32")
    return {text.partition("=")[0].strip(): text.partition("=")[2].strip() for text in value}


class Amount(click.ParamType[Any]):
    """One value, converted by `item`, whose ValueError is the message."""

    def __init__(self, name: str, item: Callable[[str], Any]) -> None:
        self.name = name
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value of a string; what is converted is returned as it is."""
        try:
            return self.item(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error))


class Commands(click.Group):
    """A group that names the nearest command for a misspelt one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion in the error."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            hint = did_you_mean(args[0], self.commands)
            raise click.UsageError(f"no command '{args[0]}': {hint}")
        return super().resolve_command(ctx, args)
