"""What the commands share: options, the panels of their help, and texts turned into values."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperOption

from kvbench.cli import complete
from kvbench.errors import InputError
from kvbench.machine import use_threads

T = TypeVar("T")

WHAT, HOW_MUCH, MODEL = "What to measure", "How much", "Model"
MEMORY, OUTPUT, TRAINING = "Memory", "Output", "Training"
SCALE = "Several processes"
METHOD_OPTION = "Option of a method, like window=32 or snapkv.window=32; repeatable."
SWEPT_OPTION = "Option of a method, like snapkv.window=32, or window=8,32 to try both; repeatable."
WHOLE = re.compile(r"\s*[+-]?[0-9]+\s*")
NO_NUMBER = re.compile(r"\s*[+-]?(nan|inf|infinity)\s*", re.IGNORECASE)
LIST, FOLDER = "A,B,...", "FOLDER"  # placeholders of values


class Command(TyperCommand):
    """A command that refuses what would be accepted in silence.

    An option that is given twice, an empty text, and what is a number for Python alone: nan, inf,
    and whole numbers like 1_0 and 2.0.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line; InputError for what is refused."""
        given: dict[str, Any] = {}
        if not ctx.resilient_parsing:
            given, _, order = self.make_parser(ctx).parse_args(list(args))
            for param, times in Counter(order).items():
                single = isinstance(param, TyperOption) and not (param.multiple or param.is_flag)
                if single and times > 1:
                    raise InputError(f"{param.opts[0]} is given {times} times; give it once")
            for param in self.params:
                values = given.get(param.name)
                for value in values if isinstance(values, list | tuple) else [values]:
                    if isinstance(value, str) and not value.strip():
                        name = param.opts[0] if isinstance(param, TyperOption) else param.metavar
                        raise InputError(f"{name} is empty; give a value, or leave it out")
        try:
            rest = super().parse_args(ctx, args)
        except typer.BadParameter as error:
            name = "" if error.param is None else error.param.name
            if error.param is not None and NO_NUMBER.fullmatch(str(given.get(name))):
                said = f"{error.param.opts[0]} must be a number, not {given[name]}"
                raise InputError(said) from None
            if name in given or name not in (ctx.default_map or {}):
                raise
            raise InputError(f"{ctx.params['config']}: {error.format_message()}") from None
        for param in self.params:
            value, text = ctx.params.get(param.name), given.get(param.name)
            where = ""
            if text is None and param.name in (ctx.default_map or {}):
                where, text = f"{ctx.params['config']}: ", ctx.default_map[param.name]
            if isinstance(value, float) and (not math.isfinite(value) or "_" in str(text)):
                raise InputError(f"{where}{param.opts[0]} must be a number, not {text}")
            if type(value) is int and isinstance(text, str) and not WHOLE.fullmatch(text):
                name = param.opts[0]
                raise InputError(f"{where}{name} must be a whole number, like {value}, not {text}")
        return rest


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
SEEDS = "Seed for drawing the samples; several are pooled in the report."
Seeds = Annotated[str, opt(HOW_MUCH, SEEDS, metavar=LIST)]
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
Workers = Annotated[
    int, opt(SCALE, "Processes that share the work: one a GPU, or of a CPU's cores.", min=1)
]
GpusPerWorker = Annotated[
    int, opt(SCALE, "GPUs of each worker, over which the model is split.", min=1)
]
RayAddress = Annotated[
    str | None,
    opt(SCALE, "Ray cluster that measures; 'local' starts one.", "none", metavar="ADDRESS"),
]
DryRun = Annotated[
    bool,
    opt(OUTPUT, "Show the plan and its cost; measure nothing.", names=["--dry-run"], metavar=""),
]


def comma_list(text: str, name: str, item: Callable[[str], T]) -> tuple[T, ...]:
    r"""`a,b,c` as a tuple of items, repeated ones once; InputError for an empty or wrong entry.

    A comma that belongs to an item is written with a backslash before it.
    """
    texts = [part.strip().replace(r"\,", ",") for part in re.split(r"(?<!\\),", text)]
    if not all(texts):
        raise InputError(f"'{text}' has an empty entry; write {name} with commas between")
    return tuple(dict.fromkeys(item(part) for part in texts))


def key_value(texts: Sequence[str] | None, option: str = "--option") -> dict[str, str]:
    """`key=value` texts as a dictionary; InputError for other texts and for a repeated key."""
    values: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise InputError(f"{option} '{text}' is not key=value, like window=32")
        if name in values:
            raise InputError(
                f"{option} {name} is given twice, as {values[name]} and as {value}; give it once"
            )
        values[name] = value
    return values


def swept(options: Mapping[str, str]) -> dict[str, str | tuple[str, ...]]:
    """Options of methods, with a tuple where there are several values, as in `window=8,32`."""
    found: dict[str, str | tuple[str, ...]] = {}
    for name, text in options.items():
        values = comma_list(text, f"values of {name}", str) if text else (text,)
        found[name] = values if len(values) > 1 else values[0]
    return found


def shard(text: str) -> tuple[int, int]:
    """`I/N` as two numbers; InputError for anything else."""
    parts = text.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) for part in parts):
        raise InputError(f"'{text}' is not a shard; write it like 2/8, for the second of eight")
    return int(parts[0]), int(parts[1])


def number(kind: Callable[[str], T], what: str) -> Callable[[str], T]:
    """What turns a text into a `kind`; its InputError says that the text is not `what`."""

    def convert(text: str) -> T:
        try:
            if "_" in text or not text.isascii():  # Python reads 1_0 as ten
                raise ValueError
            return kind(text)
        except ValueError:
            raise InputError(f"'{text}' is not {what}") from None

    return convert


def whole(text: str) -> int:
    """A whole number in plain digits; ValueError for anything else."""
    if not WHOLE.fullmatch(text):
        raise ValueError
    return int(text)


budget = number(float, "a budget: a share of the cache, like 0.3")
tokens = number(whole, "a number of tokens, like 4096")
seed = number(whole, "a seed: a whole number, like 0")


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
