"""Facts: find what a few sentences say that are hidden in a long story, as in RULER."""

import random

from kvbench.registry import register_task
from kvbench.task import Episode, Turn

from ._synthetic import GeneratedTask, distinct
from ._words import (
    ADJECTIVES,
    CITIES,
    FILLER,
    FIRST_NAMES,
    INSTRUMENTS,
    LAST_NAMES,
    NOUNS,
    SECRETS,
)

# The story: who did what, and when. No phrase has a word that answers are made of.
WHO, DID, WHEN = (
    phrases.split(", ")
    for phrases in (
        "my aunt, our neighbour, the new teacher, a man with a hat, one of the boys, the whole "
        "family, a tall woman, the man next door, her brother, their mother, a student, someone in "
        "the crowd, the owner of the shop, a friend of mine, an old man, the girl from the office, "
        "my cousin, the guest in the next room, everybody on the bus, the person at the desk",
        "opened a letter, waited for the bus, went for a walk, forgot to close the door, told us a "
        "joke, read the newspaper, made some tea, asked what time it was, slept until noon, fixed "
        "the lamp, cleaned the table, bought bread and milk, said nothing at all, looked at the "
        "pictures, called to say sorry, took off both shoes, counted the steps, paid for dinner, "
        "started to laugh, fell asleep in a chair",
        "before breakfast, after the rain had stopped, on the way home, as if nothing had "
        "happened, while the others talked, in the middle of the night, late in the afternoon, "
        "once again, because it was so hot, without a reason, for the third time, at the end of "
        "the month, when the lights went out, as usual, on a Sunday in March, as soon as the doors "
        "opened, during the break, just to be sure, for almost an hour, the day before the party",
    )
)


@register_task("facts")
class Facts(GeneratedTask):
    """Find numbers, facts about a person or words in a generated story.

    For small language models, and the same on every machine. The story is no text of the standard
    library, on which head scores are trained, and has no word that answers are made of. Facts
    stand at uniformly drawn depths. The answer restates the fact, so values are looked up while
    decoding, after any eviction. The score is the share of the values that are found.
    """

    metric = "values_found"
    subtasks = ("key", "pair", "person", "words")
    default = False  # the default model, tiny, was not trained on prose

    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """A unit is a sentence of the story."""
        names = [" ".join(words) for words in distinct(rng, 2, ADJECTIVES, NOUNS)]
        numbers = [str(number) for number in rng.sample(range(1_000, 10_000), 2)]
        facts = [f"The magic number for {n} is {v}." for n, v in zip(names, numbers, strict=True)]
        topic, prefix = "Two magic numbers are", "The magic number for"
        if subtask == "key":
            question = f"What is the magic number for {names[0]}?"
            answer, values = facts[0], numbers[:1]
        elif subtask == "pair":
            question = f"What are the magic numbers for {names[0]} and for {names[1]}?"
            prefix, values = f"1. {prefix}", numbers
            answer = f"1. {facts[0]}\n2. {facts[1]}"
        elif subtask == "person":
            first, last = rng.choice(FIRST_NAMES), rng.choice(LAST_NAMES)
            values = [rng.choice(CITIES), rng.choice(INSTRUMENTS)]
            answer = f"{first} {last} was born in {values[0]} and plays the {values[1]}."
            topic, facts, prefix = "A sentence about a person is", [answer], first
            question = f"Where was {first} {last} born, and what does {first} {last} play?"
        else:
            values = rng.sample(SECRETS, 4)
            answer = f"The secret words are: {', '.join(values)}."
            topic, facts, prefix = "Secret words are", [answer], "The secret words"
            question = "What are the secret words?"
        story = [sentence(rng) for _ in range(units)]
        for fact in facts:
            story.insert(rng.randrange(len(story) + 1), fact)
        return Episode(
            f"{topic} hidden in the text below. Remember.\n\n" + "\n".join(story) + "\n",
            (Turn(f"\nQuestion: {question}\n", prefix, answer.removeprefix(prefix), values),),
        )

    def smallest(self, subtask: str) -> int:
        """One sentence."""
        return 1


def sentence(rng: random.Random) -> str:
    """A sentence of the story."""
    if rng.random() < 0.2:
        return rng.choice(FILLER)
    text = f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHEN)}."
    return text[0].upper() + text[1:]
