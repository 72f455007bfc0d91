"""Metrics of the generated tasks.

They differ from HELMET's and LongProc's (`kvbench/metrics.py`), which must cope with free answers
and real web pages. A generated context is known exactly: a value is one word, code or number, so a
value inside another word is another value, and a table has each row once. Each docstring says what
differs and why.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Any

from kvbench.metrics import (
    bad_reference,
    checks_references,
    ranked_ndcg,
    register_metric,
    texts_of,
)


@register_metric("answer_found")
def answer_found(prediction: str, reference: Any) -> float:
    """1 if the prediction contains an answer as whole words.

    `reference` is a text, or a list of texts of which one is enough. Unlike HELMET's substring
    match, "lute" is not found in "flute", nor 1234567 in 91234567: these are wrong answers. Case
    and articles are ignored (but not in an answer that is an article). Punctuation is left out or
    read as a space, whichever finds the answer. 1,234,567 is 1234567, and 3.5 is not 35.
    """
    return float(any(_found(texts_of(reference), prediction)))


@register_metric("values_found")
def values_found(prediction: str, reference: Any) -> float:
    """The share of the values that the prediction contains as whole words.

    `reference` is a list of texts, found as in `answer_found`. RULER's recall would also find them
    inside other words.
    """
    found = list(_found(texts_of(reference), prediction))
    return sum(found) / len(found)


def _found(values: Iterable[str], text: str) -> Iterable[bool]:
    """Whether each of the values stands in the text as whole words."""
    for value in values:
        dropped = ARTICLES if any(_readings(value, ARTICLES)) else frozenset()  # "A" is an answer
        yield any(
            f" {wanted} " in f" {given} "
            for wanted, given in zip(
                _readings(value, dropped), _readings(text, dropped), strict=True
            )
            if wanted
        )


@checks_references("answer_found", "values_found")
def _check_values(reference: Any) -> None:
    if not all(any(_readings(value, frozenset())) for value in texts_of(reference)):
        raise bad_reference("values with a letter or a digit", reference)


ARTICLES = frozenset({"a", "an", "the"})
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)|(?<![\d.,])\d{1,3}(?:\.\d{3})+(?!\d)")


def _readings(text: str, dropped: frozenset[str]) -> tuple[str, str]:
    """The words of a text, with punctuation left out and with punctuation read as a space.

    Points and commas that group thousands are left out in both. Any other point between two digits
    belongs to the number, so that 3.5 is not 35, and any other comma parts two numbers.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = THOUSANDS.sub(lambda number: re.sub("[.,]", "", number[0]), text)
    text = re.sub(r"(?<=\d)\.(?=\d)", "point", re.sub(r"(?<=\d),(?=\d)", " ", text))
    readings = re.sub(r"[^\w\s]", "", text), re.sub(r"[\W_]", " ", text)
    one, other = (" ".join(w for w in each.split() if w not in dropped) for each in readings)
    return one, other


@register_metric("ndcg@10_mentions")
def ndcg_at_10_of_mentions(prediction: str, reference: Any) -> float:
    """NDCG@10 of the ids in the order in which the prediction first mentions them.

    `reference` maps ids ("ID3") to relevance, an integer. Ids may be written "ID3", "id3",
    "[ID: 3]", or "3" between two ">"; where no "ID" is written, all numbers are ids. The task asks
    for a ranking in words, "a guide to tea [ID3] > an introduction to tea [ID1]". HELMET reads one
    chain of ids without words, and so would find a single document in a perfect answer.
    """
    named = r"(?:ID|\b[Ii][Dd])[\s:#(-]*(\d+)"
    if not re.search(named, prediction):
        return ranked_ndcg(re.findall(r"\d+", prediction), reference)
    bare = r">\s*(\d+)(?=\s*(?:>|$))"
    found = re.findall(f"{named}|{bare}", prediction, re.MULTILINE)
    return ranked_ndcg([one or other for one, other in found], reference)


@register_metric("table_f1")
def table_f1(prediction: str, reference: Any) -> float:
    """F1 of the rows of tab-separated values, each matched with one row of the table, in any order.

    `reference` is a list of rows, each a list of cells, without the header. Unlike LongProc's row
    F1, a row written again is a wrong row, so a model that loops loses precision, and "4.5" is not
    "$45": the page has each row once and each cell to the character. Case, space around cells and
    quotes around them, empty cells at the end of a row, blank lines and code fences are ignored.
    """
    if not isinstance(reference, list) or not reference:
        raise bad_reference("a list of rows", reference)
    expected = Counter(_row(row) for row in reference)
    lines = [line for line in prediction.splitlines() if not line.strip().startswith("```")]
    predicted = Counter(_row(line.split("\t")) for line in lines)
    del predicted[()]
    matched = sum((expected & predicted).values())
    return 2 * matched / (sum(expected.values()) + sum(predicted.values()))


@checks_references("table_f1")
def _check_rows(reference: list[Any]) -> None:
    for row in reference:
        texts = isinstance(row, list) and all(isinstance(cell, str) for cell in row)
        if (
            not texts
            or not any(_row(row))
            or any("\t" in c or len(c.splitlines()) > 1 for c in row)
        ):
            raise bad_reference("a list of rows, each a list of cells, not all empty", reference)


def _row(cells: list[str]) -> tuple[str, ...]:
    """The cells of a row as they are compared; empty for a blank line."""
    row = [" ".join(cell.strip(' "').split()) for cell in cells]
    while row and not row[-1]:
        row.pop()
    return tuple(unicodedata.normalize("NFKC", cell).lower() for cell in row)
