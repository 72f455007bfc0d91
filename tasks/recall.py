"""Recall: find one record among many similar ones by its key, as in RULER and HELMET."""

import random
from collections.abc import Callable

from kvbench.registry import register_task
from kvbench.task import Episode, Turn

from ._synthetic import SyntheticTask, code, distinct
from ._words import ADJECTIVES, NOUNS, SECRETS

ORDINALS = ("first", "second", "third")


@register_task("recall")
class Recall(SyntheticTask):
    """Find values by key: JSON records, needles among needles, several values of one key.

    Answers restate the key, so the values are looked up while decoding, after any eviction.
    """

    metric = "values_found"
    subtasks = ("json_kv", "mk_2", "mk_3", "mv")

    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A unit is a record; in `mv` each key has three records."""
        build: dict[str, Callable[[random.Random, int, int], Episode]] = {
            "json_kv": json_episode,
            "mk_2": word_episode,
            "mk_3": code_episode,
            "mv": multi_value_episode,
        }
        return build[subtask](rng, units, turns)

    def smallest(self, subtask: str) -> int:
        """One record; three for `mv`, one key's."""
        return len(ORDINALS) if subtask == "mv" else 1


def json_episode(rng: random.Random, units: int, turns: int) -> Episode:
    """A JSON object that maps two-word names to codes."""
    names = [" ".join(words) for words in distinct(rng, units, ADJECTIVES, NOUNS)]
    values = [code(rng) for _ in names]
    records = ",\n".join(f'"{n}": "{v}"' for n, v in zip(names, values, strict=True))
    return Episode(
        "The JSON object below maps names to codes. Read it, then answer with the code of the name "
        f"that is asked for.\n\n{{{records}}}\n",
        tuple(
            Turn(
                f'\nQuestion: Which code belongs to "{names[i]}"?\n',
                "Answer:",
                f' "{names[i]}": "{values[i]}"',
                [values[i]],
            )
            for i in rng.sample(range(units), min(turns, units))
        ),
    )


def word_episode(rng: random.Random, units: int, turns: int) -> Episode:
    """Needles among needles: a secret word for each two-word name (RULER's mk_2)."""
    names = [" ".join(words) for words in distinct(rng, units, ADJECTIVES, NOUNS)]
    values = [rng.choice(SECRETS) for _ in names]
    facts = [f"The secret word for {n} is {v}." for n, v in zip(names, values, strict=True)]
    return needles(
        facts,
        [
            Turn(
                f"\nQuestion: What is the secret word for {name}?\n",
                "Answer:",
                f" The secret word for {name} is {value}.",
                [value],
            )
            for name, value in zip(names, values, strict=True)
        ],
        rng,
        turns,
    )


def code_episode(rng: random.Random, units: int, turns: int) -> Episode:
    """Needles among needles with UUID-like keys and values (RULER's mk_3)."""
    keys = list(dict.fromkeys(code(rng) for _ in range(units)))
    values = [code(rng) for _ in keys]
    facts = [f"The access code for {k} is {v}." for k, v in zip(keys, values, strict=True)]
    return needles(
        facts,
        [
            Turn(
                f"\nQuestion: What is the access code for {key}?\n",
                "Answer:",
                f" The access code for {key} is {value}.",
                [value],
            )
            for key, value in zip(keys, values, strict=True)
        ],
        rng,
        turns,
    )


def multi_value_episode(rng: random.Random, units: int, turns: int) -> Episode:
    """Three values for each key, scattered; a turn asks for all values of a key (RULER's mv)."""
    names = [" ".join(w) for w in distinct(rng, units // len(ORDINALS), ADJECTIVES, NOUNS)]
    values = [rng.sample(SECRETS, len(ORDINALS)) for _ in names]
    facts = [
        f"The {ordinal} secret word for {name} is {value}."
        for name, words in zip(names, values, strict=True)
        for ordinal, value in zip(ORDINALS, words, strict=True)
    ]
    rng.shuffle(facts)
    questions = []
    for name, words in zip(names, values, strict=True):
        answers = [
            f"The {ordinal} secret word for {name} is {value}."
            for ordinal, value in zip(ORDINALS, words, strict=True)
        ]
        questions.append(
            Turn(
                f"\nQuestion: What are the first, second and third secret words for {name}?\n",
                "Answer:",
                "".join(f" {answer}" for answer in answers),
                words,
            )
        )
    return needles(facts, questions, rng, turns)


def needles(facts: list[str], questions: list[Turn], rng: random.Random, turns: int) -> Episode:
    """A context of `facts`, one per line, with up to `turns` of the questions about it."""
    return Episode(
        "Each line below states one fact. Remember them all, then answer the question at the end "
        "in the words of the text.\n\n" + "\n".join(facts) + "\n",
        tuple(rng.sample(questions, min(turns, len(questions)))),
    )
