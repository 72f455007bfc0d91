"""Metrics by name: how good a predicted text is, in 0..1.

A metric is a plain function of the prediction and a reference, which is what a task's sample or a
line of a task file holds. The metrics in this module are those of HELMET (arXiv 2410.02694) and
LongProc (arXiv 2501.05414). They give the value that the benchmark's own evaluator gives, its
oddities included, so that a score can be set beside a published one. Tasks and plug-ins add others
with `register_metric`.

Where a benchmark writes the start of the answer ("Answer:", "label:") into the prompt, HELMET puts
it before the output again and scores both together. Whoever calls a metric does the same.
"""

import csv
import importlib
import re
import string
from collections.abc import Callable
from functools import cache
from typing import Any

from kvbench.errors import InputError
from kvbench.judge import JUDGED, current_judge
from kvbench.registry import Registry

Metric = Callable[[str, Any], float]

metrics: Registry[Metric] = Registry("metric")
register_metric = metrics.register

# By the name of a metric, what raises InputError for a reference that no answer equals.
checks: dict[str, Callable[[Any], None]] = {}

# By the name of a metric, the start of an answer that it looks for, in any case.
ANSWER, LABEL = "Answer:", "label:"
STARTS = {
    "exact_match": ANSWER,
    "choice_exact_match": ANSWER,
    "rouge_l_f1": ANSWER,
    "label_exact_match": LABEL,
}
SHARES = ("share_found", "values_found")  # where each of several values counts


def checks_references(*names: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Decorator of what raises InputError for a reference that no answer to a metric equals."""

    def add(check: Callable[[Any], None]) -> Callable[[Any], None]:
        checks.update(dict.fromkeys(names, check))
        return check

    return add


def check_reference(name: str, reference: Any, prefix: str = "") -> None:
    """Raise InputError for a reference that all answers equal, or none, by the metric `name`.

    All answers start with `prefix`. A metric may also raise what a wrong reference makes it raise.
    """
    metric = metrics.get(name)
    worth = metric("", reference)
    if name in checks:
        checks[name](reference)
    if name == JUDGED:
        return
    if name == "choice_exact_match":  # the letter "A" is an article, and so is no answer
        worth = float(texts_of(reference)[1].lower() in prefix.lower())
    elif prefix:
        worth = max(worth, metric(whole_answer(name, prefix, ""), reference))
    if worth >= 1 or (worth > 0 and name in SHARES):
        what = f"its answer_prefix {prefix!a}" if prefix else "any text"
        raise InputError(f"{what} is right already by its reference, which must say more")


def whole_answer(metric: str, prefix: str, prediction: str) -> str:
    """The answer as a metric reads it: behind the start that belongs to the prompt.

    A metric that looks for a start of its own gets that, where the prompt ends with another one.
    """
    start = STARTS.get(metric, "")
    known = prefix.rstrip().lower().endswith(start.lower())
    return (prefix if known or not prefix else start) + prediction


MOST_RELEVANCE = 2**31 - 1  # of trec_eval
PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, with single spaces (SQuAD).

    Unicode forms, accents and curly quotes stay as they are.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def answer_line(prediction: str, prefix: str) -> str:
    """The line that answers: what follows the first `prefix` on its line, else the first line.

    Case does not matter in the prefix. One repetition of the prefix is dropped.
    """
    start = re.compile(re.escape(prefix), re.IGNORECASE)
    found = start.search(prediction)
    line = prediction[found.end() if found else 0 :].partition("\n")[0].strip()
    again = start.match(line)
    return line[again.end() if again else 0 :].strip()


@register_metric("substring_exact_match")
def substring_exact_match(prediction: str, reference: Any) -> float:
    """1 if the prediction contains an answer, inside a word too; HELMET's recall and rag.

    `reference` is a text, or a list of texts of which one is enough. Both sides are compared as
    `normalised`, so an answer of articles and punctuation alone is in every prediction.
    """
    text = normalised(prediction)
    return float(any(normalised(answer) in text for answer in texts_of(reference)))


@register_metric("exact_match")
def exact_match(prediction: str, reference: Any) -> float:
    """1 if the prediction, or its line after "Answer:", equals an answer (HELMET).

    `reference` is a text, or a list of texts of which one is enough. Both sides are compared as
    `normalised`.
    """
    return _equals_one(_readings(prediction), texts_of(reference))


@register_metric("label_exact_match")
def label_exact_match(prediction: str, reference: Any) -> float:
    """1 if the line after "label:", else the first line, equals the label; HELMET's icl.

    `reference` is the label as a text, or a list of labels of which one is enough. Both sides are
    compared as `normalised`.
    """
    return _equals_one([answer_line(prediction, LABEL)], texts_of(reference))


@register_metric("choice_exact_match")
def choice_exact_match(prediction: str, reference: Any) -> float:
    """1 if the prediction is the letter of the right choice, or contains its line of the list.

    `reference` is [letter, line], for example ["B", "B. a red door"]. The prediction counts if it
    or its line after "Answer:" equals one of the two as `normalised`, or if it contains the second
    in any case (HELMET's infbench_choice). The letter "A" is an article: normalised, it equals an
    empty answer, as in HELMET.
    """
    answers = texts_of(reference)
    if len(answers) != 2:
        raise bad_reference("[letter, line]", reference)
    inside = answers[1].lower() in prediction.lower()
    return float(inside or _equals_one(_readings(prediction), answers))


@checks_references("choice_exact_match")
def _check_choice(reference: Any) -> None:
    letter, line = map(str.strip, texts_of(reference))
    if not letter or len(letter.strip("().")) > 2 or len(line) <= len(letter):
        raise bad_reference("[letter, line]", reference)


@register_metric("share_found")
def share_found(prediction: str, reference: Any) -> float:
    """The share of the values that the prediction contains, in any case; RULER's recall.

    `reference` is a list of texts, or one text. A value inside a word or a longer number counts.
    """
    values, text = texts_of(reference), prediction.lower()
    return sum(value.lower() in text for value in values) / len(values)


@checks_references("share_found")
def _check_values(reference: Any) -> None:
    if not all(map(str.strip, texts_of(reference))):
        raise bad_reference("values that are not blank", reference)


@register_metric("ndcg@10")
def ndcg_at_10(prediction: str, reference: Any) -> float:
    """NDCG@10 of the ids in the prediction's longest chain "ID3 > ID1 > ID2"; HELMET's rerank.

    `reference` maps each document's id, a number as a text ("3" or "ID3"), to its relevance, an
    integer. Ids may be written "ID3", "id3", "[ID: 3]" or "3". Only one chain counts: the longest
    in characters, the first of equals. A repeated id counts where it comes first. The gain is the
    relevance; trec_eval computes the value, which is rounded to five places as in HELMET.
    """
    text = re.sub(r"[\[\]:]", "", prediction).lower().replace("id", "")
    chains = [chain[0] for chain in re.finditer(r"\d+(?:\s*>\s*\d+)*", text)]
    ids = re.findall(r"\d+", max(chains, key=len, default=""))
    return round(ranked_ndcg(ids, reference), 5)


def ranked_ndcg(ids: list[str], relevance: dict[str, int]) -> float:
    """NDCG@10 by trec_eval of ids, the best first; a repeated id counts where it comes first.

    The ids of `relevance` may start with "ID", those of `ids` do not. Raises InputError if
    `relevance` is not a mapping from texts to integers, or is empty.
    """
    if not _is_map(relevance, int):
        raise bad_reference("a map from ids to relevance (integers)", relevance)
    if not ids:
        return 0.0
    order = list(dict.fromkeys(ids))
    run = {document: float(len(order) - place) for place, document in enumerate(order)}
    truth = {document.removeprefix("ID"): grade for document, grade in relevance.items()}
    trec = _library("pytrec_eval", "pytrec-eval-terrier")
    evaluator = trec.RelevanceEvaluator({"q": truth}, {"ndcg_cut.10"})
    return float(evaluator.evaluate({"q": run})["q"]["ndcg_cut_10"])


@checks_references("ndcg@10", "ndcg@10_mentions")
def _check_relevance(relevance: dict[str, int]) -> None:
    ids = [document.removeprefix("ID") for document in relevance]
    if len(set(ids)) < len(ids) or not all(re.fullmatch("0|[1-9][0-9]*", each) for each in ids):
        raise bad_reference('a map from ids ("ID3" or "3", each once) to relevance', relevance)
    if max(relevance.values()) < 1 or max(map(abs, relevance.values())) > MOST_RELEVANCE:
        raise bad_reference(
            f"a map from ids to relevance, the largest from 1 to {MOST_RELEVANCE}", relevance
        )


@register_metric("row_f1")
def row_f1(prediction: str, reference: Any) -> float:
    """F1 of the rows of a table as tab-separated values, in any order; LongProc's html_to_tsv.

    `reference` is the table as a text, its header first. The prediction's table is what stands in
    a ```tsv fence, else what follows an opened fence, else everything; its first line is its
    header. Precision is the share of predicted rows that the table has, recall the share of the
    table's rows that were predicted: a right row written twice costs nothing, a wrong one counts
    each time. Cells are compared in lower case without punctuation, articles and spaces, so "4.5"
    equals "$45". A last row of another width than the header is dropped; any other such row is
    wrong. A table without rows, of another width, or with two columns of one name scores 0.
    """
    if not isinstance(reference, str):
        raise bad_reference("a table as text", reference)
    expected, predicted = _table(reference), _table(_fenced(prediction))
    if not expected or not predicted or len(expected[0]) != len(predicted[0]):
        return 0.0
    right = set(expected) & set(predicted)
    precision = sum(row in right for row in predicted) / len(predicted)
    recall = sum(row in right for row in expected) / len(expected)
    return 2 * precision * recall / (precision + recall) if precision else 0.0


def _fenced(prediction: str) -> str:
    """The text from the first ```tsv to the last ``` behind it; all of it without a fence."""
    _, opened, rest = prediction.partition("```tsv")
    inside, closed, _ = rest.rpartition("```")
    return (inside if closed else rest) if opened else prediction


def _table(text: str) -> list[tuple[str, ...]]:
    """The rows of tab-separated values, without the header, cells as they are compared.

    Empty if the text is not a table. All rows are as wide as the header.
    """
    try:
        header, *rows = csv.reader(text.strip().split("\n"), delimiter="\t")
    except csv.Error:
        return []
    if len(set(header)) != len(header):
        return []
    if rows and len(rows[-1]) != len(header):
        rows.pop()
    missing = ["N/A"] * len(header)
    rows = [row if len(row) == len(header) else missing for row in rows]
    return [tuple(normalised(cell).replace(" ", "") for cell in row) for row in rows]


@checks_references("row_f1")
def _check_table(reference: str) -> None:
    try:
        header, *rows = csv.reader(reference.strip().split("\n"), delimiter="\t")
    except csv.Error as error:
        raise bad_reference(f"a table of tab-separated values ({error})", reference) from None
    if len(set(header)) < len(header):
        raise bad_reference("a table whose columns have names of their own", reference)
    if not rows:
        raise bad_reference("a table with a row below its header", reference)
    if any(len(row) != len(header) for row in rows):
        raise bad_reference("a table whose rows are as wide as its header", reference)


@register_metric("rouge_l_f1")
def rouge_l_f1(prediction: str, reference: Any) -> float:
    """ROUGE-L F1 with stemming by the package rouge-score; HELMET's infbench_qa.

    `reference` is a text, or a list of texts of which the nearest counts. The value is the better
    of the prediction and its line after "Answer:".
    """
    scorer, answers = _rouge(), texts_of(reference)
    return max(
        float(scorer.score(target=answer, prediction=reading)["rougeL"].fmeasure)
        for reading in _readings(prediction)
        for answer in answers
    )


@checks_references("rouge_l_f1")
def _check_words(reference: Any) -> None:
    if not all(re.search("[a-z0-9]", text.lower()) for text in texts_of(reference)):
        raise bad_reference("texts of Latin letters or digits, which alone count here", reference)


@cache
def _rouge() -> Any:
    scorer = _library("rouge_score.rouge_scorer", "rouge-score")
    return scorer.RougeScorer(["rougeL"], use_stemmer=True)


@register_metric("plan_accuracy")
def plan_accuracy(prediction: str, reference: Any) -> float:
    """1 if the plan visits the right cities for the right number of days; LongProc's travel plans.

    `reference` is {"ground_truth_cities": "Rome**Oslo", "ground_truth_durations": "5**6"}, the
    fields of LongProc's items. The plan is what stands between <Plan> and </Plan>; without both
    the score is 0. Cities come from its flights ("Day 5: Fly from Rome to Oslo"), days from the
    days of the flights and the end of the last stay ("Day 5-10"). Stays after the right ones do
    not count.
    """
    names = ("ground_truth_cities", "ground_truth_durations")
    if not _is_map(reference, str) or not set(names) <= set(reference):
        raise bad_reference(f"a map with {' and '.join(names)}", reference)
    cities, days = ([part for part in reference[name].split("**") if part] for name in names)
    if not cities or len(cities) != len(days) or not all(day.isdecimal() for day in days):
        raise bad_reference('as many cities as durations ("Rome**Oslo", "5**6")', reference)
    start, end = prediction.find("<Plan>"), prediction.find("</Plan>")
    if start < 0 or end < 0:
        return 0.0
    stays = _stays(prediction[start + len("<Plan>") : end])
    right = list(zip(cities, map(int, days), strict=True))
    return float(stays[: len(right)] == right)


@checks_references("plan_accuracy")
def _check_plan(reference: dict[str, str]) -> None:
    cities = [part for part in reference["ground_truth_cities"].split("**") if part]
    if not all(re.fullmatch(r"\w+", city) for city in cities):
        raise bad_reference("cities of one word each", reference)


@register_metric(JUDGED)
def judged(prediction: str, reference: Any) -> float:
    """What the judge that `--judge` names thinks of the prediction, 0..1 (`kvbench.judge`).

    `reference` is a text, a list of texts of which one is enough, or {"question": a text,
    "answer": one of these}.
    """
    return current_judge().score(prediction, reference)


def _stays(plan: str) -> list[tuple[str, int]]:
    """The cities of a plan with the days spent in each; none if no stay or no flight is found."""
    number = r"(\d{1,4300})"  # as many digits as int() takes
    total = last = None
    flights: list[tuple[int, str, str]] = []
    for line in plan.split("\n"):
        if found := re.search(rf"European cities for {number} days", line):
            total = int(found[1])
        if found := re.search(rf"\d+-{number}", line):
            last = int(found[1])
            if last == total:  # another plan may follow
                break
        if found := re.search(rf".*Day {number}.*from (\w+) to (\w+)", line):
            flights.append((int(found[1]), found[2], found[3]))
    if last is None or not flights:
        return []
    cities = [flights[0][1]] + [to for _, _, to in flights]
    arrivals = [1] + [day for day, _, _ in flights]
    departures = [day for day, _, _ in flights] + [last]
    return [
        (city, departure - arrival + 1)
        for city, arrival, departure in zip(cities, arrivals, departures, strict=True)
    ]


def _readings(prediction: str) -> list[str]:
    """The prediction as a whole, and its line that answers."""
    return [prediction, answer_line(prediction, ANSWER)]


def _equals_one(readings: list[str], answers: list[str]) -> float:
    found = {normalised(reading) for reading in readings}
    return float(any(normalised(answer) in found for answer in answers))


def texts_of(reference: Any) -> list[str]:
    """A reference as a list of texts; lists in the list are joined."""
    given = reference if isinstance(reference, list | tuple) else [reference]
    texts = [text for part in given for text in (part if isinstance(part, list) else [part])]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise bad_reference("a text or a list of texts", reference)
    return texts


def _is_map(reference: Any, kind: type) -> bool:
    """Whether the reference is a mapping from texts to values of a kind, and not empty."""
    return (
        isinstance(reference, dict)
        and bool(reference)
        and all(isinstance(k, str) and isinstance(v, kind) for k, v in reference.items())
    )


def bad_reference(expected: str, reference: Any) -> InputError:
    shown = ascii(reference)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InputError(f"a reference must be {expected}, not {shown}")


def _library(module: str, package: str) -> Any:
    """A module that a metric needs; InputError with the package to install if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"this metric needs the package {package} ({error}); pip install {package}"
        ) from error
