"""Needle: find one fact hidden in a long natural text, as in RULER."""

import ast
import random
import sysconfig
import textwrap
from functools import cache
from pathlib import Path

from kvbench.errors import InputError
from kvbench.registry import register_task
from kvbench.task import Episode, Turn

from ._synthetic import GeneratedTask
from ._words import ADJECTIVES, NOUNS

PREFIX = "The magic number for"
WIDTH = 96  # characters of a line of prose


@register_task("needle")
class Needle(GeneratedTask):
    """Find one number in natural text: documentation (`prose`) or source code (`code`).

    The text is the docstrings or the sources of the standard library's top-level modules, in an
    order drawn by the sample's seed. It comes from the Python that runs kvbench, so samples differ
    between Python versions. The needle (RULER's single needle) is a number of seven digits for a
    two-word name, at a uniformly drawn depth. The answer restates the name, so the number is looked
    up while decoding, after any eviction. Name and number are drawn by the sample's seed, so head
    scores learnt on the same sources have not seen them.
    """

    metric = "answer_found"
    subtasks = ("prose", "code")
    default = False  # the default model, tiny, was not trained on prose

    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """A unit is a line of the haystack."""
        name = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        number = str(rng.randrange(1_000_000, 10_000_000))
        depth = rng.random()
        lines = haystack(rng, subtask, units)
        needle = f"{PREFIX} {name} is {number}."
        lines.insert(round(depth * units), needle)
        return Episode(
            "A magic number is hidden in the text below. Remember it.\n\n"
            + "\n".join(lines)
            + "\n",
            (
                Turn(
                    f"\nQuestion: What is the magic number for {name}?\n",
                    PREFIX,
                    needle.removeprefix(PREFIX),
                    number,
                ),
            ),
        )

    def smallest(self, subtask: str) -> int:
        """One line, before or after the needle."""
        return 1


def haystack(rng: random.Random, subtask: str, units: int) -> list[str]:
    """The first `units` lines of the modules, in an order drawn by `rng`; InputError if fewer."""
    paths = modules()
    lines: list[str] = []
    for path in rng.sample(paths, len(paths)):
        lines += prose(path) if subtask == "prose" else code(path)
        if len(lines) >= units:
            return lines[:units]
    raise InputError(
        f"the standard library has {len(lines)} lines of {subtask}, too few for a context this "
        "long; choose a shorter --context"
    )


@cache
def modules() -> tuple[Path, ...]:
    """The standard library's top-level modules, sorted by name.

    Modules whose name starts with an underscore are left out, because some differ between machines.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(path for path in sorted(root.glob("*.py")) if not path.name.startswith("_"))


@cache
def prose(path: Path) -> tuple[str, ...]:
    """A module's docstrings, wrapped to lines; paragraphs without a full stop are left out."""
    tree = ast.parse(path.read_text("utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    paragraphs = [part for text in texts if text for part in text.split("\n\n")]
    return tuple(
        line
        for paragraph in paragraphs
        if "." in paragraph
        for line in textwrap.wrap(paragraph, WIDTH)
    )


@cache
def code(path: Path) -> tuple[str, ...]:
    """A module's lines without the blank ones."""
    return tuple(line.rstrip() for line in path.read_text("utf-8").splitlines() if line.strip())
