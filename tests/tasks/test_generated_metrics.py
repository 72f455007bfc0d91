"""The generated tasks' own metrics: what is right in a context that is known exactly."""

from typing import Any

import pytest

from kvbench.metrics import metrics
from kvbench.registry import tasks
from kvbench.task import Sample

TABLE = [["1", "Red Fox", "$45", "Oslo", "00ab"], ["2", "Old Owl", "$50", "York", "12cd"]]
TEXT = "\n".join("\t".join(row) for row in TABLE)
GRADED = {"ID11": 3, "ID22": 2, "ID33": 1}


def score(task: str, prediction: str, reference: Any) -> float:
    return tasks.get(task)().score(prediction, Sample(task, "any", 0, "", reference, 1))


def test_every_built_in_task_names_a_registered_metric() -> None:
    for name in ("html_to_tsv", "needle", "rag", "recall", "rerank"):
        assert tasks.get(name).metric in metrics.names()


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("The magic number is 1234567.", 1),
        ("is 1,234,567.", 1),
        ("it is **1234567**, I think", 1),
        ("1234567.The", 1),
        ("(1234567)", 1),
        ("91234567", 0),
        ("12345678", 0),
        ("1234567.5", 0),
        ("1234.567", 0),
        ("1.234.567", 1),
        ("7,1234567,9", 1),
        ("x1234567", 0),
        ("123 4567", 0),
        ("", 0),
    ],
)
def test_a_number_inside_another_is_another(prediction: str, expected: float) -> None:
    assert score("needle", prediction, "1234567") == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("played the Lute.", 1),
        ("played a lute,flute", 1),
        ("“lute”", 1),
        ("_lute_", 1),
        ("played the flute.", 0),
        ("lutes", 0),
        ("LUTE", 1),
    ],
)
def test_a_word_inside_another_is_another(prediction: str, expected: float) -> None:
    assert score("rag", prediction, ["lute"]) == expected
    assert score("recall", prediction, ["lute", "harp"]) == expected / 2


def test_codes_are_found_whole() -> None:
    assert score("recall", '"red fox": "c8a7-d471"', ["c8a7-d471"]) == 1
    assert score("recall", '"red fox": "c8a7-d471e"', ["c8a7-d471"]) == 0
    assert score("recall", '"red fox": "1c8a7-d471"', ["c8a7-d471"]) == 0
    assert score("recall", '"red fox":"c8a7-d471","old owl":"00"', ["c8a7-d471", "00"]) == 1


@pytest.mark.parametrize(
    "prediction",
    [
        " a complete guide to tea [ID11] > a short introduction to tea [ID22] > a remark [ID33]",
        "[ID: 11] > [ID: 22] > [ID: 33]",
        "id11, id22, id33",
        "ID 11 > ID 22 > ID 33",
        "11 > 22 > 33",
        "ID11 > 22 > 33",
        "1. ID11\n2. ID22\n3. ID33",
        "a guide aID11] > an introduction (ID: 22) > 3 remarks [ID33]",
        "ID11 > ID22 > 33\n\nPage 5",
        "ID11 ID11 ID22 ID11 ID33",
    ],
)
def test_ids_are_read_in_every_spelling(prediction: str) -> None:
    assert score("rerank", prediction, GRADED) == 1


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (TEXT, 1),
        (f"no\tname\tprice\tcity\tref\n{TEXT}", 1),
        (TEXT.replace("\n", "\t\n") + "\t", 1),
        (TEXT.replace("\n", "\r\n\r\n"), 1),
        (TEXT.upper().replace("\t", " \t "), 1),
        (f"```tsv\n{TEXT}\n```", 1),
        (TEXT.replace("$45", '"$45"'), 1),
        ("\n".join([TEXT] * 3), 2 * 2 / (2 + 6)),  # a model that loops
        (f"{TEXT}\n3\tno\tsuch\trow\t0\n3\tno\tsuch\trow\t0", 2 * 2 / (2 + 4)),
        (f"{TEXT}\n1\tRed", 2 * 2 / (2 + 3)),
        (TEXT.replace("$45", "4.5"), 1 / 2),
        (TEXT.replace("$45", "45"), 1 / 2),
        (TEXT.replace("Red Fox", ""), 1 / 2),
        (TEXT.replace("\t", " "), 0),
        ("", 0),
    ],
)
def test_each_row_counts_once(prediction: str, expected: float) -> None:
    assert score("html_to_tsv", prediction, TABLE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("It is 3.5.", "35", 0),
        ("It is 3.5.", "3.5", 1),
        ("A", "A", 1),  # an answer may be an article
        ("The answer is A.", "A", 1),
        ("Strasse", "Straße", 1),
    ],
)
def test_answers_of_few_letters(prediction: str, reference: str, expected: float) -> None:
    assert score("rag", prediction, [reference]) == expected
