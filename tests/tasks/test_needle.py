"""The task `needle`: one fact in natural text, at any length."""

import random
from typing import Any

import pytest

from kvbench.errors import InputError
from kvbench.learning.examples import episodic_subtasks
from kvbench.models.card import EMBEDDED
from kvbench.registry import tasks
from kvbench.sweep.command import default_tasks
from kvbench.task import Sample, Tokenizer
from kvbench.tasks.needle import Needle


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED["tiny"])


@pytest.fixture
def needle() -> Needle:
    return Needle()


def samples(needle: Needle, tokenizer: Tokenizer, context: int, seed: int = 1) -> list[Sample]:
    return list(needle.samples(8, seed=seed, context=context, tokenizer=tokenizer))


@pytest.mark.parametrize("context", [512, 3000])
def test_samples_fill_the_context_and_never_more(
    needle: Needle, tokenizer: Tokenizer, context: int
) -> None:
    for made in samples(needle, tokenizer, context):
        length = len(tokenizer.encode(made.prompt)) + made.max_new_tokens
        assert 0.8 * context < length <= context
        assert made.prompt.endswith(made.metadata["answer_prefix"])


def test_the_number_is_in_the_text_once_and_the_question_does_not_give_it_away(
    needle: Needle, tokenizer: Tokenizer
) -> None:
    for made in samples(needle, tokenizer, 2000):
        assert made.prompt.count(made.reference) == 1
        assert made.reference not in made.prompt.partition("\nQuestion:")[2]


def test_the_needle_lies_at_every_depth(needle: Needle) -> None:
    depths = []
    for index in range(200):
        lines = needle.episode_for(random.Random(index), "code", 100, 0).context.split("\n")
        depths.append(next(i for i, line in enumerate(lines) if line.startswith("The magic")))
    first, last = 2, 102  # after the two lines of the instruction; after the whole haystack
    assert min(depths) < first + 5
    assert max(depths) > last - 5
    assert sum(depth < 52 for depth in depths) == pytest.approx(100, abs=30)


def test_samples_depend_on_seed_and_index_alone(needle: Needle, tokenizer: Tokenizer) -> None:
    first = samples(needle, tokenizer, 700)
    again = [needle.sample(i, seed=1, context=700, tokenizer=tokenizer) for i in range(7, -1, -1)]
    assert first == again[::-1]
    other = samples(needle, tokenizer, 700, seed=2)
    assert not {made.reference for made in first} & {made.reference for made in other}


def test_the_reference_answer_scores_1_and_silence_0(needle: Needle) -> None:
    for subtask in needle.subtasks:
        turn = needle.episode_for(random.Random(7), subtask, 20, 0).turns[0]
        made = Sample("needle", subtask, 0, "", turn.reference, 1)
        assert needle.score(turn.answer, made) == 1.0
        assert needle.score("", made) == 0.0
        assert needle.score(turn.question + turn.answer_prefix, made) == 0.0


@pytest.mark.parametrize(("context", "reason"), [(30, "too short"), (10**8, "too few")])
def test_a_context_that_cannot_be_made_is_refused(
    needle: Needle, context: int, reason: str
) -> None:
    class Words:
        """A tokenizer fast enough for the whole standard library."""

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [0] * (text.count(" ") + text.count("\n"))

    with pytest.raises(InputError, match=reason):
        needle.sample(0, seed=0, context=context, tokenizer=Words())


def test_it_runs_only_if_named_and_the_embedded_model_is_not_trained_on_it() -> None:
    assert "needle" in tasks.names()
    assert default_tasks() == ["html_to_tsv", "rag", "recall", "rerank"]
    assert not [name for name in episodic_subtasks() if name.startswith("needle")]
