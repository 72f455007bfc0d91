"""Metrics give the values that HELMET's and LongProc's own evaluators give."""

import json
import math
import random
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.errors import InputError
from kvbench.metrics import metrics, register_metric

# Predictions with the value of the benchmark's own evaluator; they lie beside the repository.
CASES = Path(__file__).parents[2] / "shared" / "cases" / "scoring.jsonl"

PLAN = {"ground_truth_cities": "Rome**Oslo**Bonn", "ground_truth_durations": "3**2**4"}
RIGHT_PLAN = """<Plan>
**Day 1-3:** Arriving in Rome and visit Rome for 3 days.
**Day 3:** Fly from Rome to Oslo.
**Day 3-4:** Visit Oslo for 2 days.
**Day 4:** Fly from Oslo to Bonn.
**Day 4-7:** Visit Bonn for 4 days.
</Plan>"""
LONG = "9" * 5000  # digits, more than int() takes
TABLE = "no\tname\tprice\n1\tRed Fox\t$45\n2\tOld Owl\t$5\n3\tThe Elk\t1,000"
HEADER, *ROWS = TABLE.split("\n")


def value(name: str, prediction: str, reference: Any) -> float:
    found = metrics.get(name)(prediction, reference)
    assert type(found) is float
    return found


def lines(*rows: str) -> str:
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("It was Port Vale.", "Port Vale", 1),
        ("it was PORT\n  vale", ["Port Vale"], 1),
        ("PortVale", ["Port Vale"], 0),
        ("Por", ["Port Vale"], 0),
        ("", ["Port Vale"], 0),
        ("Oslo, I think", ["Rome", "Oslo"], 1),
        ("Oslo, I think", [["Rome"], ["Oslo"]], 1),
        ("played the flute", ["lute"], 1),  # inside a word
        ("Beatles", ["The Beatles"], 1),
        ("C", ["C#"], 1),  # punctuation is dropped
        ("ab12cd", ["ab-12-cd"], 1),
        ("“Zoë”", ["Zoë"], 1),
        ("Zoë\u2019s", ["Zoë\u2019s"], 1),
        ("Zoë\u2019s", ["Zoë's"], 0),  # only ASCII punctuation is dropped
        (unicodedata.normalize("NFKD", "Zoë"), [unicodedata.normalize("NFC", "Zoë")], 0),
        ("", ["the"], 1),  # nothing is left of the answer, so it is everywhere
    ],
)
def test_substring_exact_match(prediction: str, reference: Any, expected: float) -> None:
    assert value("substring_exact_match", prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the Red door!", "red door", 1),
        ("a red door opens", "red door", 0),
        ("Answer: red door\nQuestion: next", "red door", 1),
        ("I say: answer: Answer: red door", "red door", 1),  # the prefix may come twice
        ("red door\nand more", "red door", 1),
        ("\nred door", "red door", 1),  # the whole text equals it
        ("\nred door\nmore", "red door", 0),  # the first line is empty
        ("blue", ["red", "blue"], 1),
        ("", "red", 0),
    ],
)
def test_exact_match(prediction: str, reference: Any, expected: float) -> None:
    assert value("exact_match", prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("label: 17\n\nlabel: 3", 1),
        ("label: label: 17", 1),
        ("Label:17", 1),
        ("17\nlabel", 1),
        ("label:\n17", 0),
        ("label: 171", 0),
        ("label: 17 or 3", 0),
        ("", 0),
    ],
)
def test_label_exact_match(prediction: str, expected: float) -> None:
    assert value("label_exact_match", prediction, "17") == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("B", 1),
        ("(b).", 1),
        ("Answer: B\n", 1),
        ("b. red door", 1),
        ("It is B. Red Door, clearly", 1),
        ("B red door", 1),  # equals the second, without punctuation
        ("It is B", 0),
        ("the red door", 0),
        ("C", 0),
        ("", 0),
    ],
)
def test_choice_exact_match(prediction: str, expected: float) -> None:
    assert value("choice_exact_match", prediction, ["B", "B. Red door"]) == expected


def test_the_letter_a_is_an_article() -> None:
    assert value("choice_exact_match", "", ["A", "A. Red door"]) == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("it is LAMP and cup", ["lamp", "cup", "jar"], 2 / 3),
        ("91234567", ["1234567"], 1),
        ("1,234,567", ["1234567"], 0),  # punctuation stays
        ("lamp", "lamp", 1),
        ("", ["lamp"], 0),
    ],
)
def test_share_found(prediction: str, reference: Any, expected: float) -> None:
    assert value("share_found", prediction, reference) == pytest.approx(expected)


# By hand, the relevance as gain: 3 / log2(2) + 2 / log2(3) + 1 / log2(4).
BEST = 3 + 2 / math.log2(3) + 1 / 2
ONLY_FIRST = 3 / BEST
RELEVANCE = {"11": 3, "22": 2, "33": 1, "44": 0}


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("ID11 > ID22 > ID33 > ID44", 1),
        ("[ID: 11] > [ID: 22] > [ID: 33]", 1),
        ("[ID11] > [ID22] > [ID33]", 1),
        ("id11>id22 >id33", 1),
        ("11 > 22 > 33", 1),
        ("11 > 22\n> 33", 1),
        ("ID11 > ID11 > ID11 > ID22 > ID11 > ID33", 1),  # a repeated id counts once
        ("ID44 is useless. Ranking: ID11 > ID22 > ID33.", 1),
        ("ID11 > ID22 > ID33\n\nQuery: tea\nRanking: ID7 > ID8", 1),
        ("ID22 > ID11", (2 + 3 / math.log2(3)) / BEST),
        ("ID99 > ID11", 3 / math.log2(3) / BEST),  # an id that does not exist takes a place
        ("ID11, ID22, ID33", ONLY_FIRST),  # commas make no chain
        ("ID11\nID22\nID33", ONLY_FIRST),
        ("a guide [ID11] > a hint [ID22]", ONLY_FIRST),  # words break a chain
        ("In the 1990s: 11", 0),  # 1990 is longer
        ("no idea", 0),
        ("", 0),
        (" > ".join(f"ID{n}" for n in range(50, 60)) + " > ID11", 0),  # eleventh
    ],
)
def test_ndcg_at_10(prediction: str, expected: float) -> None:
    assert value("ndcg@10", prediction, RELEVANCE) == round(expected, 5)
    with_prefix = {f"ID{number}": grade for number, grade in RELEVANCE.items()}
    assert value("ndcg@10", prediction, with_prefix) == round(expected, 5)


def f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (TABLE, 1),
        (lines(HEADER, *reversed(ROWS)), 1),
        (lines(HEADER, ROWS[0]), f1(1, 1 / 3)),
        (lines(HEADER, *ROWS, *ROWS, *ROWS), 1),  # right rows may be repeated
        (lines(HEADER, *ROWS, "9\tx\ty", "9\tx\ty", "9\tx\ty"), f1(3 / 6, 1)),
        (TABLE.upper(), 1),
        (TABLE.replace("$45", "4.5"), 1),  # punctuation in cells is dropped
        (TABLE.replace("Red Fox", "RedFox"), 1),
        (TABLE.replace("The Elk", "Elk"), 1),
        (TABLE.replace("Red Fox", "Red Foxes"), 2 / 3),
        ("x\ty\tz\n" + lines(*ROWS), 1),  # the names in the header do not count
        ("x\tx\tz\n" + lines(*ROWS), 0),  # but two of one name cannot be read
        (lines(*ROWS), f1(1, 2 / 3)),  # the first line is the header, whatever it says
        (f"```tsv\n{TABLE}\n```", 1),
        (f"Here it is:\n```tsv\n{TABLE}\n```\nDone.", 1),
        (f"Here it is:\n```tsv\n{TABLE}", 1),  # the limit came before the closing fence
        (f"```tsv\n{TABLE}\n```\nOr:\n```tsv\n{TABLE}\n```", f1(6 / 10, 1)),  # to the last fence
        (f"```\n{TABLE}\n```", 0),  # another fence is a header of one column
        (f"{TABLE}\n1\tRed", 1),  # a cut last row is dropped
        (f"{TABLE}\n\nThat is all.", f1(3 / 4, 1)),  # the blank line counts as a row
        (lines(HEADER, ROWS[0], "", ROWS[1], ROWS[2]), f1(3 / 4, 1)),
        (lines(HEADER, ROWS[0] + "\tx", *ROWS[1:]), f1(2 / 3, 2 / 3)),
        ("\t\n".join([HEADER, *ROWS]) + "\t", 0),  # one column too many
        (lines(HEADER, *(row + "\t" for row in ROWS)), f1(1 / 3, 1 / 3)),  # but in the last row
        (TABLE.replace("\n", "\r\n"), 1),
        (lines(HEADER, *('"' + row.replace("\t", '"\t"') + '"' for row in ROWS)), 1),
        (lines(HEADER, '1\tRed "Fox"\t$45', *ROWS[1:]), 1),
        (TABLE.replace("\t", "  "), 0),
        (HEADER, 0),
        ("There is no table.", 0),
        ("", 0),
        ("1\t2\n3\t4", 0),  # of another width
        ("no\tname\tprice\n1\ra\t2\t3", 0),  # csv cannot read it
    ],
)
def test_row_f1(prediction: str, expected: float) -> None:
    assert value("row_f1", prediction, TABLE) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (RIGHT_PLAN, 1),
        (f"Let me think. Day 1-9 in Nice?\n{RIGHT_PLAN}\nEnjoy!", 1),
        (RIGHT_PLAN.replace("<Plan>", ""), 0),
        (RIGHT_PLAN.replace("</Plan>", ""), 0),
        (RIGHT_PLAN.replace("Day 4:", "Day 5:"), 0),  # a day too long in Oslo
        (RIGHT_PLAN.replace("from Oslo to Bonn", "from Oslo to Nice"), 0),
        (RIGHT_PLAN.replace("4-7", "4-8"), 0),
        (RIGHT_PLAN.replace("Visit Oslo", "Visit Nice"), 1),  # cities come from the flights
        (RIGHT_PLAN.replace("Fly", "Go"), 1),
        (RIGHT_PLAN.replace("Day 3:", "day 3:"), 0),
        (RIGHT_PLAN.replace("</Plan>", "Day 7: Fly from Bonn to Nice.\nDay 7-8\n</Plan>"), 1),
        *(
            (RIGHT_PLAN.replace(day, day.replace(day[-1], LONG)), 0)
            for day in ("Day 4", "Day 3", "4-7")
        ),
        (
            RIGHT_PLAN.replace("<Plan>", f"<Plan>\n{LONG} European cities for {LONG} days, {LONG}"),
            1,
        ),
        ("<Plan></Plan>", 0),
        ("</Plan><Plan>", 0),
        ("", 0),
    ],
)
def test_plan_accuracy(prediction: str, expected: float) -> None:
    assert value("plan_accuracy", prediction, PLAN) == expected


def test_a_second_plan_behind_the_announced_days_is_not_read() -> None:
    announced = "<Plan>\nA trip to 3 European cities for 7 days:\n"
    twice = RIGHT_PLAN.replace("<Plan>\n", announced).replace("</Plan>", "Day 1-9: Nice\n</Plan>")
    assert value("plan_accuracy", twice, PLAN) == 1
    assert value("plan_accuracy", twice.replace("for 7 days:", "for 9 days:"), PLAN) == 0


def test_rouge_l_f1() -> None:
    pytest.importorskip("rouge_score")
    assert value("rouge_l_f1", "the cat sat", "the cat ran") == pytest.approx(2 / 3)
    assert value("rouge_l_f1", "cat the", "the cat") == pytest.approx(1 / 2)  # in order
    assert value("rouge_l_f1", "she was running", ["he is", "She was runs"]) == 1  # word stems
    assert value("rouge_l_f1", "Well. Answer: the cat\nmore", "the cat") == 1
    assert value("rouge_l_f1", "", "the cat") == 0


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    with pytest.raises(InputError, match="needs the package pytrec-eval-terrier"):
        metrics.get("ndcg@10")("ID1", {"1": 1})


@pytest.mark.skipif(not CASES.is_file(), reason="the shared cases are not here")
def test_every_shared_case_has_the_evaluators_value() -> None:
    cases = [json.loads(line) for line in CASES.read_text("utf-8").splitlines()]
    assert len(cases) == 142
    for case in cases:
        found = value(case["metric"], case["prediction"], case["reference"])
        assert found == pytest.approx(case["value"], abs=5.1e-7), case["kind"]  # six places


# An example of a reference for each metric, with a prediction that is right.
EXAMPLES: dict[str, tuple[str, Any]] = {
    "substring_exact_match": ("Oslo", ["Oslo"]),
    "exact_match": ("Oslo", ["Oslo"]),
    "label_exact_match": ("17", "17"),
    "choice_exact_match": ("B", ["B", "B. red door"]),
    "share_found": ("lamp cup", ["lamp", "cup"]),
    "ndcg@10": ("ID11 > ID22 > ID33", RELEVANCE),
    "row_f1": (TABLE, TABLE),
    "rouge_l_f1": ("the cat", ["the cat"]),
    "plan_accuracy": (RIGHT_PLAN, PLAN),
    "answer_found": ("Oslo", ["Oslo"]),
    "values_found": ("lamp cup", ["lamp", "cup"]),
    "ndcg@10_mentions": ("ID11 and ID22 and ID33", RELEVANCE),
    "table_f1": (lines(*ROWS), [row.split("\t") for row in ROWS]),
}
READY = [name for name in EXAMPLES if name != "rouge_l_f1"]
PIECES = st.sampled_from(
    [*TABLE, *RIGHT_PLAN.split(" "), "ID11", " > ", "B", "Oslo", "```tsv", "'"]
)
TEXTS = st.text(max_size=60) | st.lists(PIECES, max_size=30).map("".join)


def test_every_metric_says_what_it_is_and_knows_perfect_from_empty() -> None:
    assert set(EXAMPLES) == set(metrics.names()) - {"judged"}  # tests/test_judge.py
    for name in READY:
        prediction, reference = EXAMPLES[name]
        assert value(name, prediction, reference) == 1
        assert value(name, "", reference) == 0
        assert "`reference` " in (metrics.get(name).__doc__ or "")


@given(TEXTS, st.sampled_from(READY))
def test_scores_lie_between_0_and_1(prediction: str, name: str) -> None:
    assert 0 <= value(name, prediction, EXAMPLES[name][1]) <= 1


WORDS = st.text("abcxyz0189", min_size=1, max_size=6)


@given(st.lists(WORDS, min_size=1, max_size=6), TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_answers_does_not_matter(
    answers: list[str], prediction: str, rng: random.Random
) -> None:
    other = rng.sample(answers, len(answers))
    for name in ("substring_exact_match", "exact_match", "answer_found"):
        assert value(name, prediction, answers) == value(name, prediction, other)
    for name in ("share_found", "values_found"):
        same = value(name, prediction, other)
        assert value(name, prediction, answers) == pytest.approx(same)


CELL = st.sampled_from(["a", "", "the owl", "Owl", "$4", "4", "4.0", "é", "—", "N/A", "na", "b c"])


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, list[list[str]], list[list[str]]]:
    """A width, the rows of a table, and rows of a prediction, some of another width."""
    width = draw(st.integers(2, 3))
    row = st.lists(CELL, min_size=width, max_size=width)
    truth = draw(st.lists(row, min_size=1, max_size=5))
    row |= st.sampled_from(truth) | st.sampled_from(truth).map(lambda cells: [*cells, "x"])
    return width, truth, draw(st.lists(row, min_size=1, max_size=8))


def as_text(width: int, rows: list[list[str]]) -> str:
    # An end mark that is no row keeps the cells at the end from being stripped.
    names = [f"column {n}" for n in range(width)]
    return lines(*("\t".join(row) for row in [names, *rows]), "end")


@given(tables())
def test_row_f1_equals_a_slow_count(table: tuple[int, list[list[str]], list[list[str]]]) -> None:
    width, truth, predicted = table

    def plain(cell: str) -> str:
        kept = "".join(c for c in cell.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        return "".join(word for word in kept.split() if word not in ("a", "an", "the"))

    def equal(one: list[str], other: list[str]) -> bool:
        return all(plain(a) == plain(b) for a, b in zip(one, other, strict=True))

    readable = [row if len(row) == width else ["n/a"] * width for row in predicted]
    right = sum(any(equal(row, true) for true in truth) for row in readable)
    found = sum(any(equal(true, row) for row in readable) for true in truth)
    precision, recall = right / len(readable), found / len(truth)
    expected = f1(precision, recall) if right else 0
    got = value("row_f1", as_text(width, predicted), as_text(width, truth))
    assert got == pytest.approx(expected)


@given(tables(), st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(
    table: tuple[int, list[list[str]], list[list[str]]], rng: random.Random
) -> None:
    width, truth, predicted = table
    other = rng.sample(predicted, len(predicted))
    reference = as_text(width, truth)
    for left, right in ((predicted, other), (truth, rng.sample(truth, len(truth)))):
        found = value("row_f1", as_text(width, left), reference)
        assert found == value("row_f1", as_text(width, right), reference)
    assert value("row_f1", as_text(width, truth), reference) == 1


@given(
    st.dictionaries(st.integers(1, 60), st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(1, 60), min_size=1, max_size=30),
)
def test_ndcg_equals_the_formula(relevance: dict[int, int], ranked: list[int]) -> None:
    places: list[int] = []
    for document in ranked:
        if document not in places:
            places.append(document)

    def gain(grades: list[int]) -> float:
        return sum(grade / math.log2(place + 2) for place, grade in enumerate(grades[:10]))

    best = gain(sorted(relevance.values(), reverse=True))
    expected = gain([relevance.get(document, 0) for document in places]) / best if best else 0
    text = " > ".join(f"ID{document}" for document in ranked)
    truth = {str(document): grade for document, grade in relevance.items()}
    assert value("ndcg@10", text, truth) == pytest.approx(expected, abs=5.1e-6)  # five places
    assert value("ndcg@10_mentions", text, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("substring_exact_match", []),
        ("exact_match", 5),
        ("label_exact_match", None),
        ("choice_exact_match", "B"),
        ("share_found", ["lamp", 5]),
        ("ndcg@10", {}),
        ("ndcg@10", ["1"]),
        ("ndcg@10", {"1": "3"}),
        ("row_f1", [["1", "2"]]),
        ("plan_accuracy", "Rome**Oslo"),
        ("plan_accuracy", {"ground_truth_cities": "Rome"}),
        ("plan_accuracy", PLAN | {"ground_truth_durations": "3**2"}),
        ("plan_accuracy", PLAN | {"ground_truth_durations": "3**two**4"}),
        ("values_found", {"a": 1}),
        ("table_f1", TABLE),
        ("table_f1", []),
    ],
)
def test_a_reference_of_another_shape_is_refused(name: str, reference: Any) -> None:
    with pytest.raises(InputError, match="a reference must be"):
        metrics.get(name)("any", reference)


def test_metrics_are_found_by_name() -> None:
    with pytest.raises(InputError, match="unknown metric 'row_f2': did you mean 'row_f1'"):
        metrics.get("row_f2")
    with pytest.raises(ValueError, match="two metrics are called 'row_f1'"):

        @register_metric("row_f1")
        def mine(prediction: str, reference: Any) -> float:
            return 0.0
