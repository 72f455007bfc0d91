"""Training text made from the tasks' own generators, and batches of it.

Used by the training of the embedded model (`tiny.py`) and by that of head scores (`rows.py`).
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kvbench.registry import tasks
from kvbench.task import Episode, EpisodicTask, Tokenizer

SINGLE = 0.3  # share of the examples that have one turn
UNIT_TOKENS = 14  # rough length of a unit; only the first guess depends on it


@dataclass(frozen=True)
class TrainingRow:
    """A sequence of tokens to train on.

    `answers` has a number for each token: 0 if the loss ignores the prediction of this token, else
    the answer that the token belongs to, counted from 1. Running text is one answer.
    """

    ids: list[int]
    answers: list[int]
    subtask: str = ""  # "task/subtask" of an example, "" for other text


def padded(rows: Sequence[TrainingRow], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids [B, T], and the answer that each *next* token belongs to [B, T], 0 for none.

    Rows are padded on the right, where causal attention never looks, so no mask is needed.
    """
    ids = [torch.tensor(row.ids) for row in rows]
    following = [torch.tensor([*row.answers[1:], 0]) for row in rows]
    return pad_sequence(ids, True, pad), pad_sequence(following, True)


def episodic_subtasks() -> dict[str, tuple[EpisodicTask, str]]:
    """The (task, subtask) pairs that offer training episodes, by "task/subtask", tasks sorted."""
    made = {name: tasks.get(name)() for name in tasks.names()}
    return {
        f"{name}/{subtask}": (task, subtask)
        for name, task in made.items()
        if isinstance(task, EpisodicTask)
        for subtask in task.subtasks
    }


class ExampleMaker:
    """Makes examples of a wanted length: an episode of a task, the answers marked.

    `end` is the id of the token that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        self.sources = episodic_subtasks()
        self.subtasks = list(self.sources)

    def make(self, name: str, rng: random.Random, length: int) -> TrainingRow:
        """An example of subtask `name` ("task/subtask") with at most `length` tokens.

        The context takes a random share of them. If even the smallest episode is longer than
        `length`, that episode is returned.
        """
        task, subtask = self.sources[name]
        # A sample has one turn, so the model must also learn to answer without earlier answers.
        turns = 1 if rng.random() < SINGLE else rng.randint(1, max(2, length // 24))
        least = task.smallest(subtask) + 1
        units = max(least, int(length * rng.uniform(0.25, 0.9) / UNIT_TOKENS))
        while True:
            example = self.encode(name, task.episode(rng, subtask, units, turns))
            if len(example.ids) <= length:
                return example
            excess = len(example.ids) / length
            units = int(units / excess * 0.95)
            turns = max(1, int(turns / excess))
            if units < least:
                units, turns, length = least, 1, sys.maxsize

    def encode(self, name: str, episode: Episode) -> TrainingRow:
        """The tokens of an episode; the end token follows each answer.

        The first turn is encoded together with the context, as in the prompt of a sample, because
        a token may span the place where they meet.
        """
        ids: list[int] = []
        answers: list[int] = []
        before = episode.context
        for number, turn in enumerate(episode.turns, start=1):
            question = self.tokenizer.encode(before + turn.question + turn.answer_prefix)
            reply = [*self.tokenizer.encode(turn.answer), self.end]
            ids += question + reply
            answers += [0] * len(question) + [number] * len(reply)
            before = ""
        return TrainingRow(ids, answers, name)
