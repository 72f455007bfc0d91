"""What the commands share: options, the panels of their help, and texts turned into values."""

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import typer

from kvbench.cli import complete
from kvbench.errors import InputError

T = TypeVar("T")

WHAT, HOW_MUCH, MODEL = "What to measure", "How much", "Model"
MEMORY, OUTPUT, TRAINING = "Memory", "Output", "Training"


def examples(*lines: str) -> str:
    """The end of a command's help; rich markup, so no square brackets in the lines."""
    return "\n".join(["[bold]Examples[/]", *(f"$ {line}" for line in lines)])


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


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


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
    unit = text.strip()[len(number) :].lower()
    size = _number(number) * units.get(unit, -1)
    if not 1 <= size < 2**63:
        raise InputError(f"'{text}' is not an amount of memory, like 8GiB or 500MB")
    return int(size)


def fraction(text: str | float) -> float:
    """For typer: a number more than 0 and at most 1."""
    if not 0 < _number(str(text)) <= 1:
        raise typer.BadParameter(f"'{text}' is not a number more than 0 and at most 1, like 0.9")
    return float(text)


def positive(text: str | float) -> float:
    """For typer: a number more than 0."""
    if not 0 < _number(str(text)) < float("inf"):
        raise typer.BadParameter(f"'{text}' is not a number more than 0")
    return float(text)


Model = Annotated[
    str,
    typer.Option(
        help="A model's name ('kvbench list models'), a folder, or a name on the Hugging Face hub.",
        rich_help_panel=MODEL,
        autocompletion=complete.models,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda, cuda:1, ...",
        rich_help_panel=MODEL,
        autocompletion=lambda: ["auto", "cpu", "cuda"],
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16.",
        rich_help_panel=MODEL,
        autocompletion=lambda: ["auto", "float32", "bfloat16", "float16"],
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="An option of a method, like window=32, or snapkv.window=32 for one method; "
        "repeatable. 'kvbench list methods' shows them.",
        rich_help_panel=WHAT,
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, help="Samples of each task.", rich_help_panel=HOW_MUCH)
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the samples.", rich_help_panel=HOW_MUCH)]
Threshold = Annotated[
    float,
    typer.Option(
        parser=fraction,
        metavar="SHARE",
        help="Share of full attention's score to keep.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Show what would be measured and what it would cost; measure nothing.",
        rich_help_panel=OUTPUT,
    ),
]
