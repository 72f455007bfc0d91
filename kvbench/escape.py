"""Text from outside, as each medium shows it: as it is written, and never as a command.

Names of models, tasks, methods, files and folders, error messages, prompts and predictions come
from outside. Control characters (with them the escapes that steer a terminal), characters that turn
the direction of writing, and halves of surrogate pairs are shown as Python writes them, such as
`\\x1b`. Each function here stands for one medium; `kvbench/report/page.py` escapes HTML by its
template.
"""

import hashlib
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame
    from rich.console import Console
    from rich.text import Text

WIDTH_OF_A_FILE = 120  # columns, if the output is no terminal
LONGEST_ENTRY, LONGEST_LINE = 80, 90  # characters in a legend, and of a line in a picture
LONGEST_NAME = 100  # of a file, without its suffix
_JOINERS = "\u200c\u200d"  # parts of emoji and of some scripts
_FORMULA = re.compile(r"[=+\-@\t\r]")  # begins what a spreadsheet would compute


def plain(text: str) -> str:
    """The text in one line, with every character visible."""
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    kind = unicodedata.category(character)
    if character.isprintable() or kind == "Zs" or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")


def console(*, stderr: bool = False, soft_wrap: bool = False) -> "Console":
    """Rich's console for text that is no markup; as wide as the terminal, or `WIDTH_OF_A_FILE`."""
    from rich.console import Console

    class Plain(Console):
        def render_str(self, text: str, **how: Any) -> "Text":
            return super().render_str(plain(text), **how)

    known = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Plain(
        stderr=stderr,
        soft_wrap=soft_wrap,
        width=None if known else WIDTH_OF_A_FILE,
        markup=False,
        emoji=False,
        highlight=False,
    )


def markdown(text: str) -> str:
    """Markdown that shows the text as it is, in a table too."""
    text = plain(text).replace("<=", "≤").replace(">=", "≥")
    # An underscore within a word has no meaning.
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text.translate(_MARKDOWN))


_MARKDOWN = str.maketrans(
    {"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {sign: f"\\{sign}" for sign in "\\`*~|[]$#"}
)


def latex(text: str) -> str:
    """LaTeX that shows the text, with a leading `<=` as one sign."""
    text = plain(text)
    at_most = text.startswith("<=")
    return r"$\leq$" * at_most + text[2 * at_most :].translate(_LATEX)


_LATEX = str.maketrans(
    {
        **{character: "\\" + character for character in "_%&#${}"},
        **{character: f"{{{character}}}" for character in "[]*"},  # after \\ they are an argument
        "\\": r"\textbackslash{}",
        "~": r"$\approx$",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
    }
)


def csv(frame: "DataFrame") -> str:
    """A frame as CSV, the same on every system.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    texts = [name for name in frame if frame[name].dtype.kind not in "bif"]
    shown = frame.assign(**{str(name): frame[name].map(_cell) for name in texts})
    return shown.to_csv(index=False, lineterminator="\n")


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return plain(f"'{value}" if _FORMULA.match(value) else value)


@contextmanager
def drawing(figure: "Figure") -> Iterator[None]:
    """While a figure is drawn, its texts are as they are written, in lines of bounded length.

    A `$` starts no formula. Letters that the font lacks are boxes, without a warning.
    """
    from matplotlib.text import Text

    entries = {text for legend in figure.legends for text in legend.get_texts()}
    for text in figure.findobj(Text):
        if isinstance(text, Text):
            most = LONGEST_ENTRY if text in entries else LONGEST_LINE
            text.set_parse_math(False)
            text.set_text("\n".join(_short(line, most) for line in text.get_text().split("\n")))
    with warnings.catch_warnings():
        for message in ("Glyph .* missing", "Matplotlib currently does not support"):
            warnings.filterwarnings("ignore", message)
        yield


def _short(line: str, most: int) -> str:
    line = plain(line)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def file_name(text: str) -> str:
    """A name for a file, on any file system, without its suffix; different texts may share it."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name or "picture"
