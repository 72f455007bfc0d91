"""What the commands share: options, the panels of their help, and texts turned into values."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer

from kvbench.cli import complete
from kvbench.errors import InputError
from kvbench.machine import use_threads

T = TypeVar("T")

WHAT, HOW_MUCH, MODEL = "What to measure", "How much", "Model"
MEMORY, OUTPUT, TRAINING = "Memory", "Output", "Training"
METHOD_OPTION = "Option of a method, like window=32 or snapkv.window=32; repeatable."
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
    opt(
        MODEL,
        "A name from 'kvbench list models', a folder, or a Hugging Face id.",
        autocompletion=complete.models,
    ),
]
Device = Annotated[str, opt(MODEL, "Where the model runs: auto, cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str, opt(MODEL, "Precision: auto, float32, bfloat16 or float16.")]
JudgeModel = Annotated[
    str | None, opt(MODEL, "Model that judges what no metric scores.", "nothing is judged")
]
JudgeUrl = Annotated[
    str | None, opt(MODEL, "The judge's OpenAI-compatible address, like http://host/v1.", "none")
]
Samples = Annotated[int, opt(HOW_MUCH, "Number of samples of each task.", min=1)]
Seed = Annotated[int, opt(HOW_MUCH, "Seed for drawing the samples.", min=0)]
Metric = Annotated[
    str | None, opt(WHAT, "Metric of task files that name none; see 'list metrics'.", "theirs")
]
MaxNewTokens = Annotated[
    int | None, opt(HOW_MUCH, "Answer limit of task files that say none.", "theirs", min=1)
]
Threshold = Annotated[
    float, opt(OUTPUT, "Share of full attention's score to keep.", min=0.001, max=1)
]


def set_threads(ctx: typer.Context, value: int | None) -> None:
    """Use this many threads, before PyTorch is imported."""
    if value is not None and not ctx.resilient_parsing:
        use_threads(value)


Threads = Annotated[
    int | None,
    opt(
        MODEL,
        "Threads on the CPU.",
        "OMP_NUM_THREADS, or the free cores",
        min=1,
        callback=set_threads,
    ),
]
DryRun = Annotated[
    bool,
    opt(OUTPUT, "Show the plan and its cost; measure nothing.", names=["--dry-run"], metavar=""),
]


def comma_list(text: str, name: str, item: Callable[[str], T]) -> tuple[T, ...]:
    """`a,b,c` as a tuple of items, repeated ones once; InputError for an empty or wrong entry."""
    texts = [part.strip() for part in text.split(",")]
    if not all(texts):
        raise InputError(f"'{text}' has an empty entry; write {name} with commas between")
    return tuple(dict.fromkeys(item(part) for part in texts))


def key_value(texts: Sequence[str] | None, option: str = "--option") -> dict[str, str]:
    """`key=value` texts as a dictionary; the last of equal keys wins."""
    values = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name.strip() or not equals:
            raise InputError(f"{option} '{text}' is not key=value, like window=32")
        values[name.strip()] = value.strip()
    return values


def number(kind: Callable[[str], T], what: str) -> Callable[[str], T]:
    """What turns a text into a `kind`; its InputError says that the text is not `what`."""

    def convert(text: str) -> T:
        try:
            return kind(text)
        except ValueError:
            raise InputError(f"'{text}' is not {what}") from None

    return convert


budget = number(float, "a budget: a share of the cache, like 0.3")
tokens = number(int, "a number of tokens, like 4096")


def sparsity(text: str) -> float:
    """A sparsity, between 0 and 1; InputError otherwise."""
    what = "a sparsity: a share of the heads between 0 and 1"
    if not 0 < (share := number(float, what)(text)) < 1:
        raise InputError(f"'{text}' is not {what}")
    return share


def memory(text: str) -> int:
    """Bytes, from `8GiB`, `500MB` or a plain number; InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([kmgt])(i?b)?|b)?", text.strip().lower())
    number, letter, suffix = found.groups() if found else ("0", None, None)
    size = float(number) * (1000 if suffix == "b" else 1024) ** " kmgt".index(letter or " ")
    if not 1 <= size < 2**63:
        raise InputError(f"'{text}' is not an amount of memory, like 8GiB or 500MB")
    return int(size)
