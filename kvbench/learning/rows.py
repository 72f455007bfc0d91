"""The sequences that head scores are learnt on; row (step, index) is the same on every process."""

import hashlib
import random
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvbench.errors import InputError
from kvbench.learning.corpus import documents
from kvbench.learning.examples import ExampleMaker, TrainingRow
from kvbench.learning.recipe import HeadRecipe

TASKS = "tasks"  # the name of the data made from the tasks, for the embedded model
FILLER_TOKENS = 1_000_000

Tokens = npt.NDArray[np.int64]


class Rows(Protocol):
    """Rows by step and by index in the step's whole batch."""

    @property
    def data_hash(self) -> str:
        """A hash of the data that rows are made of; "" if tasks make them."""
        ...

    def row(self, step: int, index: int) -> TrainingRow:
        """The row; equal arguments give equal rows."""
        ...


def make_rows(recipe: HeadRecipe, tokenizer: Any) -> Rows:
    """The rows of a training; InputError if the data has too few tokens for one row."""
    length, seed = recipe.length, recipe.seed
    if recipe.method != "duoattention":
        if recipe.data == TASKS:
            if recipe.rows:
                raise InputError(f"rows is for text; the data '{TASKS}' never ends: leave it out")
            return TaskRows(tokenizer, length, seed)
        needed = recipe.steps * recipe.batch
        wanted = length * min(needed, recipe.rows or needed)
        tokens = read_tokens(recipe.data, tokenizer, wanted, seed, least=length)
        return PackedRows(tokens, length, recipe.batch)
    if recipe.data == TASKS:
        filler = task_filler(tokenizer, 64 * length, seed)
    else:
        filler = read_tokens(recipe.data, tokenizer, FILLER_TOKENS, seed, least=length)
    assert recipe.passkeys is not None
    assert recipe.passkey_words is not None
    return PasskeyRows(filler, tokenizer, length, recipe.passkeys, recipe.passkey_words, seed)


@dataclass(frozen=True)
class PackedRows:
    """A stream of tokens cut to rows of `length`; every token is predicted.

    Rows come in the order of the stream. When it is used up, it starts again.
    """

    tokens: Tokens
    length: int
    batch: int

    @property
    def data_hash(self) -> str:
        """A hash of the stream."""
        return hash_of(self.tokens)

    @property
    def count(self) -> int:
        """How many different rows there are."""
        return len(self.tokens) // self.length

    def row(self, step: int, index: int) -> TrainingRow:
        """The row at `step * batch + index` of the stream."""
        start = (step * self.batch + index) % self.count * self.length
        ids = self.tokens[start : start + self.length].tolist()
        return TrainingRow(ids, [0] + [1] * (len(ids) - 1))


class TaskRows:
    """Episodes of the synthetic tasks; the answers are predicted, as in the model's training.

    Their seeds differ from those of the embedded model's training and of evaluation samples.
    """

    def __init__(self, tokenizer: Any, length: int, seed: int) -> None:
        self.maker = ExampleMaker(tokenizer, tokenizer.eos_token_id)
        self.length, self.seed = length, seed

    @property
    def data_hash(self) -> str:
        """Nothing: there is no data."""
        return ""

    def row(self, step: int, index: int) -> TrainingRow:
        """An episode of a random subtask, at most `length` tokens."""
        rng = random.Random(f"heads/{self.seed}/{step}/{index}")
        return self.maker.make(rng.choice(self.maker.subtasks), rng, self.length)


class PasskeyRows:
    """Filler with hidden passkeys; the row ends by asking for all of them.

    Source: DuoAttention, 2410.10819, section 3.2. All rows of a step have about the same length,
    drawn between a quarter of `length` (or 1,024 tokens, if that is less) and `length`. A row has
    fewer than `passkeys` passkeys if they would fill more than half of it. A passkey is `words`
    words of the filler.
    """

    def __init__(
        self, filler: Tokens, tokenizer: Any, length: int, passkeys: int, words: int, seed: int
    ) -> None:
        self.filler, self.tokenizer, self.length = filler, tokenizer, length
        self.passkeys, self.words, self.seed = passkeys, words, seed
        text = tokenizer.decode(filler[:20_000].tolist())
        self.vocabulary = sorted({w for w in text.split() if w.isalpha() and w.islower()})
        if len(self.vocabulary) < 2:
            raise InputError(
                "the data has fewer than two words of lower-case letters, of which passkeys are "
                "made; choose other --data"
            )

    @property
    def data_hash(self) -> str:
        """A hash of the filler."""
        return hash_of(self.filler)

    def row(self, step: int, index: int) -> TrainingRow:
        """Filler with passkeys at random depths, then the questions; the passkeys are predicted."""
        whole = random.Random(f"passkey/{self.seed}/{step}")
        length = whole.randint(min(1024, self.length // 4), self.length)
        rng = random.Random(f"passkey/{self.seed}/{step}/{index}")
        needles: list[list[int]] = []
        asked: list[TrainingRow] = []
        space = length // 2
        for number in range(1, self.passkeys + 1):
            key = " ".join(rng.choices(self.vocabulary, k=self.words))
            needle = self.encode(f"\nThe passkey number {number} is {key}.\n")
            question = self.encode(f"\nThe passkey number {number} is")
            answer = self.encode(f" {key}.")
            space -= 2 * len(needle)
            if space < 0 and asked:
                break
            needles.append(needle)
            asked.append(TrainingRow(question + answer, [0] * len(question) + [1] * len(answer)))
        tail = rng.sample(asked, len(asked))
        fill = max(0, length - sum(len(part.ids) for part in tail) - sum(map(len, needles)))
        start = rng.randrange(max(1, len(self.filler) - fill))
        text = self.filler[start : start + fill].tolist()
        for place, needle in zip(
            sorted((rng.randrange(len(text) + 1) for _ in needles), reverse=True),
            rng.sample(needles, len(needles)),
            strict=True,
        ):
            text[place:place] = needle
        return TrainingRow(
            [*text, *chain.from_iterable(part.ids for part in tail)],
            [*[0] * len(text), *chain.from_iterable(part.answers for part in tail)],
        )

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def hash_of(tokens: Tokens) -> str:
    """A hash of tokens, 20 hexadecimal digits."""
    return hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest()[:20]


def read_tokens(data: str, tokenizer: Any, wanted: int, seed: int, *, least: int) -> Tokens:
    """The first `wanted` tokens of the data's documents, with an end token after each document.

    InputError if the data has fewer than `least` tokens.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts, found = [np.empty(0, dtype=np.int64)], 0
    for document in documents(data, seed):
        ids = [*tokenizer.encode(document, add_special_tokens=False), *end]
        parts.append(np.asarray(ids, dtype=np.int64))
        found += len(ids)
        if found >= wanted:
            break
    if found < least:
        raise InputError(
            f"the data '{data}' has {found} tokens, less than one sequence of {least}: "
            "give more data or a smaller --length"
        )
    return np.concatenate(parts)[:wanted]


def task_filler(tokenizer: Any, count: int, seed: int) -> Tokens:
    """A stream of `count` tokens: contexts of the tasks' episodes, for the embedded model."""
    maker = ExampleMaker(tokenizer, tokenizer.eos_token_id)
    tokens: list[int] = []
    number = 0
    while len(tokens) < count:
        rng = random.Random(f"filler/{seed}/{number}")
        example = maker.make(maker.subtasks[number % len(maker.subtasks)], rng, 1024)
        tokens += example.ids[: example.answers.index(1)]
        number += 1
    return np.asarray(tokens[:count], dtype=np.int64)
