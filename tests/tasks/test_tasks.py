"""The synthetic tasks: samples fit, are repeatable, and are scored as their metrics define."""

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED
from kvbench.registry import tasks
from kvbench.task import EpisodicTask, Sample, Task, Tokenizer

NAMES = ("html_to_tsv", "rag", "recall", "rerank", "yaml_to_tsv")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED["tiny"])


def task(name: str) -> Task:
    return tasks.get(name)()


def sample(name: str, reference: object) -> Sample:
    return Sample(name, "any", 0, "", reference, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("context", [512, 1024, 3000])
def test_samples_fill_the_context_and_never_more(
    name: str, context: int, tokenizer: Tokenizer
) -> None:
    for made in task(name).samples(8, seed=1, context=context, tokenizer=tokenizer):
        length = len(tokenizer.encode(made.prompt)) + made.max_new_tokens
        assert 0.85 * context < length <= context
        assert made.prompt.endswith(made.metadata["answer_prefix"])
        assert made.subtask == task(name).subtasks[made.index % len(task(name).subtasks)]


@pytest.mark.parametrize("name", NAMES)
def test_samples_depend_on_seed_and_index_alone(name: str, tokenizer: Tokenizer) -> None:
    first = task(name).samples(4, seed=1, context=700, tokenizer=tokenizer)
    again = [task(name).sample(i, seed=1, context=700, tokenizer=tokenizer) for i in (3, 2, 1, 0)]
    assert list(first) == again[::-1]
    other = task(name).samples(4, seed=2, context=700, tokenizer=tokenizer)
    assert not {made.prompt for made in first} & {made.prompt for made in other}


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_answer_scores_1_and_silence_0(name: str, tokenizer: Tokenizer) -> None:
    made = task(name)
    assert isinstance(made, EpisodicTask)
    for subtask in made.subtasks:
        episode = made.episode(random.Random(7), subtask, 20, 5)
        assert episode.turns
        for turn in episode.turns:
            assert task(name).score(turn.answer, sample(name, turn.reference)) == 1.0
            assert task(name).score("", sample(name, turn.reference)) == 0.0
            # the question must not give the answer away
            question = turn.question + turn.answer_prefix
            assert task(name).score(question, sample(name, turn.reference)) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_a_context_too_short_is_refused(name: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="too short"):
        task(name).sample(0, seed=0, context=60, tokenizer=tokenizer)


def test_recall_counts_the_values_found() -> None:
    assert (
        task("recall").score("it is Lamp, or cup", sample("recall", ["lamp", "cup", "b"])) == 2 / 3
    )


def test_rag_ignores_case_articles_and_punctuation() -> None:
    score = task("rag").score
    assert score("It was THE Grand-Hotel!", sample("rag", ["a grandhotel"])) == 1.0
    assert score("Oslo", sample("rag", ["Paris", "oslo"])) == 1.0
    assert score("Oslo", sample("rag", ["Paris"])) == 0.0


def test_rerank_is_ndcg_at_10() -> None:
    score = task("rerank").score
    graded = sample("rerank", {"ID1": 3, "ID2": 2, "ID3": 1, "ID4": 0})
    # by hand, with the grade as gain: 3 / log2(2) + 2 / log2(3) + 1 / log2(4)
    best = 3 + 2 / 1.5849625 + 0.5
    assert score("ID1 > ID2 > ID3", graded) == pytest.approx(1.0)
    assert score("ID2 > ID1", graded) == pytest.approx((2 + 3 / 1.5849625) / best)
    assert score("ID4 > ID1 ID1", graded) == pytest.approx(3 / 1.5849625 / best)
    assert score("none of them", graded) == 0.0
    ten_wrong = " > ".join(f"ID{n}" for n in range(50, 60))
    assert score(f"{ten_wrong} > ID1", graded) == 0.0


def test_html_rows_count_whole_and_in_any_order() -> None:
    reference = sample(
        "html_to_tsv",
        [["1", "Red Lamp", "$12", "Oslo", "0a"], ["2", "Old Cup", "$5", "Rome", "ff"]],
    )
    score = task("html_to_tsv").score
    assert score("2\told cup\t$5\tROME\tff\n1\tRed Lamp\t$12\tOslo\t0a\n", reference) == 1.0
    assert score("1\tRed Lamp\t$12\tOslo\t0a", reference) == pytest.approx(2 / 3)
    assert score(
        "no\tname\tprice\tcity\tref\n1\tRed Lamp\t$12\tOslo\t0a", reference
    ) == pytest.approx(2 / 3)
    assert score("1\tRed Lamp\t$12\tOslo\n2\tOld Cup\t$5\tRome\tfe", reference) == 0.0


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80))
def test_the_embedded_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    text = re.sub("[\ud800-\udfff]", "", text)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_words_codes_and_numbers_are_few_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("The access code for d82c-629f is c8a7-d471.\n")) == 19
    assert len(tokenizer.encode(" Bruno Warner was born in Lisbon.")) == 7


def test_the_answers_of_yaml_to_tsv_are_long(tokenizer: Tokenizer) -> None:
    made = task("yaml_to_tsv").sample(0, seed=1, context=1024, tokenizer=tokenizer)
    assert 300 <= made.max_new_tokens <= 600
    assert len(made.reference) == made.metadata["units"]
    assert all(f"\n{name}: {value}\n" in made.prompt for name, value in made.reference)
