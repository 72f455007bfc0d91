"""What the commands share: options, the panels of their help, and texts turned into values."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from kvbench.cli import complete
from kvbench.errors import InputError

T = TypeVar("T")

WHAT, HOW_MUCH, MODEL = "What to measure", "How much", "Model"
MEMORY, OUTPUT, TRAINING = "Memory", "Output", "Training"
LIST, FOLDER = "A,B,...", "FOLDER"  # placeholders of values


def opt(panel: str, help: str, default: str | bool = True, **how: Any) -> Any:
    """An option in a panel of the help; `default` says what happens without it."""
    names = how.pop("names", ())
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=default, **how)


def examples(*lines: str) -> str:
    """The end of a command's help; rich markup, so no square brackets in the lines."""
    return "\n".join(["[bold]Examples[/]", *(f"$ {line}" for line in lines)])


Model = Annotated[
    str,
    opt(MODEL, "A name ('list models'), folder or hub id.", autocompletion=complete.models),
]
Device = Annotated[str, opt(MODEL, "auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, opt(MODEL, "auto, float32, bfloat16 or float16.")]
Samples = Annotated[int, opt(HOW_MUCH, "Samples of each task.", min=1)]
Seed = Annotated[int, opt(HOW_MUCH, "Seed of the samples.", min=0)]
Threshold = Annotated[float, opt(OUTPUT, "Share of the baseline's score.", min=0.001, max=1)]
DryRun = Annotated[
    bool, opt(OUTPUT, "Show the plan and its cost only.", names=["--dry-run"], metavar="")
]


def comma_list(text: str, name: str, item: Callable[[str], T]) -> tuple[T, ...]:
    """`a,b,c` as a tuple of items, repeated ones once; InputError for an empty or wrong entry."""
    texts = [part.strip() for part in text.split(",")]
    if not all(texts):
        raise InputError(f"'{text}' has an empty entry; write {name} with commas between")
    return tuple(dict.fromkeys(item(part) for part in texts))


def key_value(texts: Sequence[str] | None) -> dict[str, str]:
    """`key=value` texts as a dictionary; the last of equal keys wins."""
    values = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name.strip() or not equals:
            raise InputError(f"--option '{text}' is not key=value, like window=32")
        values[name.strip()] = value.strip()
    return values


def budget(text: str) -> float:
    """A budget, more than 0 and at most 1; InputError otherwise."""
    if not 0 < _number(text) <= 1:
        raise InputError(
            f"'{text}' is not a budget: a share of the cache, more than 0 and at most 1, like 0.3"
        )
    return float(text)


def sparsity(text: str) -> float:
    """A sparsity, between 0 and 1; InputError otherwise."""
    if not 0 < _number(text) < 1:
        raise InputError(f"'{text}' is not a sparsity: a share of the heads between 0 and 1")
    return float(text)


def tokens(text: str) -> int:
    """A number of tokens, at least 1; InputError otherwise."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise InputError(f"'{text}' is not a number of tokens of at least 1, like 4096")
    return int(text)


def memory(text: str) -> int:
    """Bytes, from `8GiB`, `500MB` or a plain number; InputError for anything else."""
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units |= {letter: 1024**power, f"{letter}ib": 1024**power, f"{letter}b": 1000**power}
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    size = _number(number) * units.get(text.strip()[len(number) :].lower(), -1)
    if not 1 <= size < 2**63:
        raise InputError(f"'{text}' is not an amount of memory, like 8GiB or 500MB")
    return int(size)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
