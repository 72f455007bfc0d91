"""The task `facts`: a few facts in a generated story, at any length."""

import random
from typing import Any

import pytest

from kvbench.errors import InputError
from kvbench.learning.examples import episodic_subtasks
from kvbench.models.card import EMBEDDED
from kvbench.registry import tasks
from kvbench.sweep.command import default_tasks
from kvbench.task import Sample, Tokenizer
from kvbench.tasks import _words, facts
from kvbench.tasks.facts import Facts


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(EMBEDDED["tiny"])


def samples(tokenizer: Tokenizer, context: int, seed: int = 1) -> list[Sample]:
    return list(Facts().samples(8, seed=seed, context=context, tokenizer=tokenizer))


@pytest.mark.parametrize("context", [512, 3000])
def test_samples_fill_the_context_and_never_more(tokenizer: Tokenizer, context: int) -> None:
    for made in samples(tokenizer, context):
        length = len(tokenizer.encode(made.prompt)) + made.max_new_tokens
        assert 0.9 * context < length <= context
        assert made.prompt.endswith(made.metadata["answer_prefix"])
        assert made.subtask == Facts.subtasks[made.index % len(Facts.subtasks)]


def test_each_value_is_in_the_text_once_and_the_question_gives_none_away(
    tokenizer: Tokenizer,
) -> None:
    for made in samples(tokenizer, 2000):
        text, _, question = made.prompt.partition("\nQuestion:")
        for value in made.reference:
            assert text.count(value) == 1
            assert Facts().score(question, Sample("facts", "any", 0, "", [value], 1)) == 0.0


def test_no_sentence_of_the_story_has_a_word_that_answers_are_made_of() -> None:
    story = " ".join([*facts.WHO, *facts.DID, *facts.WHEN, *_words.FILLER])
    words = set(story.lower().replace(".", "").replace(",", "").split())
    for answers in (_words.CITIES, _words.INSTRUMENTS, _words.SECRETS):
        assert not words & {answer.lower() for answer in answers}
    assert not any(character.isdigit() for character in story)


def test_facts_lie_at_every_depth() -> None:
    depths = []
    for index in range(200):
        lines = Facts().episode_for(random.Random(index), "pair", 98, 0).context.split("\n")
        depths += [i - 2 for i, line in enumerate(lines) if line.startswith("The magic")]
    assert len(depths) == 400
    assert min(depths) < 5
    assert max(depths) > 95
    assert sum(depth < 50 for depth in depths) == pytest.approx(200, abs=45)


def test_samples_depend_on_seed_and_index_alone(tokenizer: Tokenizer) -> None:
    first = samples(tokenizer, 700)
    again = [Facts().sample(i, seed=1, context=700, tokenizer=tokenizer) for i in range(7, -1, -1)]
    assert first == again[::-1]
    assert not {made.prompt for made in first} & {m.prompt for m in samples(tokenizer, 700, 2)}


def test_the_reference_answer_scores_1_half_of_it_a_half_and_silence_0() -> None:
    for subtask in Facts.subtasks:
        turn = Facts().episode_for(random.Random(7), subtask, 20, 0).turns[0]
        made = Sample("facts", subtask, 0, "", turn.reference, 1)
        assert Facts().score(turn.answer, made) == 1.0
        assert Facts().score("", made) == 0.0
        assert Facts().score(turn.reference[0], made) == 1 / len(turn.reference)


def test_a_context_too_short_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="too short"):
        Facts().sample(0, seed=0, context=40, tokenizer=tokenizer)


def test_it_runs_only_if_named_and_the_embedded_model_is_not_trained_on_it() -> None:
    assert "facts" in tasks.names()
    assert "facts" not in default_tasks()
    assert not [name for name in episodic_subtasks() if name.startswith("facts")]
