"""The sequences that head scores are learnt on; row (step, index) is the same on every process."""

import random
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np

from kvbench.errors import InputError
from kvbench.learning.corpus import Corpus
from kvbench.learning.tiny import ExampleMaker, subtasks

TASKS = "tasks"  # the data of the embedded model, whose language is the tasks'


@dataclass(frozen=True)
class Row:
    """Token ids, and for each whether the loss looks at its prediction."""

    ids: list[int]
    counts: list[bool]


class Rows(Protocol):
    """Rows by step and by place in the step's whole batch."""

    def row(self, step: int, index: int) -> Row:
        """The row; equal arguments give equal rows."""
        ...


class PackedRows:
    """Documents one after another, cut to equal lengths; every token is predicted.

    A corpus of fewer than `steps * batch` rows is read again. InputError if it has less than one.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Any, length: int, steps: int, batch: int, seed: int
    ) -> None:
        self.tokens = read_tokens(corpus, tokenizer, length * steps * batch, seed)
        self.length, self.batch = length, batch
        self.count = len(self.tokens) // length
        if self.count == 0:
            raise InputError(
                f"the data '{corpus.name}' has {len(self.tokens)} tokens, less than one sequence "
                f"of {length}: give more data or a smaller --length"
            )

    def row(self, step: int, index: int) -> Row:
        """Rows in the order of the documents, none twice unless the corpus is short."""
        start = (step * self.batch + index) % self.count * self.length
        ids = self.tokens[start : start + self.length].tolist()
        return Row(ids, [False] + [True] * (len(ids) - 1))


class TaskRows:
    """Episodes of the synthetic tasks; the answers are predicted, as in the model's training.

    Seeded apart from both the training of the embedded model and the samples of evaluations.
    """

    def __init__(self, tokenizer: Any, length: int, seed: int) -> None:
        self.maker = ExampleMaker(tokenizer, tokenizer.eos_token_id)
        self.names, self.length, self.seed = subtasks(), length, seed

    def row(self, step: int, index: int) -> Row:
        """An episode of a subtask drawn at random, at most `length` tokens."""
        rng = random.Random(f"heads/{self.seed}/{step}/{index}")
        example = self.maker.make(rng.choice(self.names), rng, self.length)
        return Row(example.ids, [turn > 0 for turn in example.answer])


class PasskeyRows:
    """Passkeys hidden in filler and all asked for at the end (DuoAttention, 2410.10819, 3.2).

    Lengths are drawn anew at each step, the same for its whole batch, from a quarter of `length`
    (1,024 tokens if that is less) up to it. Where `passkeys` of them do not fit half of a row, it
    has fewer. The words of the passkeys are drawn from the filler's own.
    """

    def __init__(
        self, filler: "np.ndarray[Any, Any]", tokenizer: Any, length: int, passkeys: int,
        words: int, seed: int,
    ) -> None:  # fmt: skip
        self.filler, self.tokenizer, self.length = filler, tokenizer, length
        self.passkeys, self.words, self.seed = passkeys, words, seed
        text = tokenizer.decode(filler[:20_000].tolist())
        self.vocabulary = sorted({w for w in text.split() if w.isalpha() and w.islower()})
        if len(self.vocabulary) < 2:
            raise InputError("the data has no words to make passkeys of")

    def row(self, step: int, index: int) -> Row:
        """Filler with passkeys at random depths, then the questions; the passkeys are predicted."""
        whole = random.Random(f"passkey/{self.seed}/{step}")
        length = whole.randint(min(1024, self.length // 4), self.length)
        rng = random.Random(f"passkey/{self.seed}/{step}/{index}")
        needles: list[list[int]] = []
        asked: list[tuple[list[int], list[int]]] = []
        room = length // 2
        for number in range(1, self.passkeys + 1):
            key = " ".join(rng.choices(self.vocabulary, k=self.words))
            needle = self.encode(f"\nThe passkey number {number} is {key}.\n")
            question = self.encode(f"\nThe passkey number {number} is")
            room -= 2 * len(needle)
            if room < 0 and asked:
                break
            needles.append(needle)
            asked.append((question, self.encode(f" {key}.")))
        order = rng.sample(range(len(asked)), len(asked))
        tail = list(chain.from_iterable([*asked[i][0], *asked[i][1]] for i in order))
        fill = max(0, length - len(tail) - sum(map(len, needles)))
        start = rng.randrange(max(1, len(self.filler) - fill))
        text = self.filler[start : start + fill].tolist()
        for place, needle in zip(
            sorted((rng.randrange(len(text) + 1) for _ in needles), reverse=True),
            rng.sample(needles, len(needles)),
            strict=True,
        ):
            text[place:place] = needle
        counts = [False] * len(text)
        for i in order:
            counts += [False] * len(asked[i][0]) + [True] * len(asked[i][1])
        return Row(text + tail, counts)

    def encode(self, text: str) -> list[int]:
        """Token ids without special ones."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids


def read_tokens(
    corpus: Corpus, tokenizer: Any, wanted: int, seed: int
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """The corpus as one stream of tokens, an end token after each document, `wanted` at most."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    parts, found = [], 0
    for document in corpus.documents(seed):
        ids = [*tokenizer.encode(document, add_special_tokens=False), *end]
        parts.append(np.asarray(ids, dtype=np.int64))
        found += len(ids)
        if found >= wanted:
            break
    return np.concatenate(parts)[:wanted] if parts else np.empty(0, dtype=np.int64)


def task_filler(tokenizer: Any, tokens: int, seed: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Contexts of the tasks' episodes as one stream of tokens, for the embedded model's filler."""
    maker = ExampleMaker(tokenizer, tokenizer.eos_token_id)
    names = subtasks()
    found: list[int] = []
    number = 0
    while len(found) < tokens:
        rng = random.Random(f"filler/{seed}/{number}")
        example = maker.make(names[number % len(names)], rng, 1024)
        found += example.ids[: example.answer.index(1)]
        number += 1
    return np.asarray(found[:tokens], dtype=np.int64)
