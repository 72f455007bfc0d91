"""Needle: one fact hidden in a long natural text has to be found."""

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

    The text is the Python standard library's own, on every machine that runs this: the docstrings
    or the sources of its top-level modules, which the sample's seed puts in order. It is that of
    the running Python, so samples differ between Python versions. The needle (RULER's single one)
    is a number of seven digits under a two-word name, at a depth drawn evenly; the answer restates
    the name, so the number is looked up while decoding, after any eviction. Both are drawn from the
    sample's seed: no other text has the needle, whatever head scores were learnt on.
    """

    metric = "answer_found"
    subtasks = ("prose", "code")
    default = False  # the embedded model, which a run measures if told nothing, reads no prose

    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """One unit is one line of the haystack."""
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
        """A line before the needle or behind it."""
        return 1


def haystack(rng: random.Random, subtask: str, units: int) -> list[str]:
    """The first `units` lines of the modules, in an order of `rng`'s."""
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
    """The standard library's top-level modules, in order of name.

    Those with an underscore are left out: some of them a Python writes for its own machine.
    """
    root = Path(sysconfig.get_path("stdlib"))
    return tuple(path for path in sorted(root.glob("*.py")) if not path.name.startswith("_"))


@cache
def prose(path: Path) -> tuple[str, ...]:
    """A module's docstrings, filled to lines; paragraphs without a sentence are left out."""
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
    """A module's lines that are not blank."""
    return tuple(line.rstrip() for line in path.read_text("utf-8").splitlines() if line.strip())
