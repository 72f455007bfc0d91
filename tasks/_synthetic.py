"""What generated tasks share: the longest sample that fits a context, and drawing helpers.

A generated task makes an *episode*, a context of a number of *units* (records, passages, lines)
with one or more turns (a question and its answer) about it. A sample is an episode with one turn
and as many units as fit. Training text has many turns, because the model then learns faster.
"""

import random
from abc import abstractmethod
from collections.abc import Sequence

from kvbench.errors import InputError
from kvbench.metrics import metrics
from kvbench.task import Episode, Sample, Task, Tokenizer, Turn

from . import _metrics  # noqa: F401  registers the metrics that these tasks name

SPARE_TOKENS = 8  # for the end token, and special tokens that a tokenizer adds around a prompt


class GeneratedTask(Task):
    """A task whose samples are generated at any length, with nothing to download."""

    @abstractmethod
    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """The episode of a sample: `units` units and one turn.

        `context` is the sample's length in tokens, for tasks whose answer grows with it. Equal
        states of `rng` give equal episodes.
        """

    @abstractmethod
    def smallest(self, subtask: str) -> int:
        """The fewest units that a context of `subtask` can have."""

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """The longest sample whose prompt and reference answer fit `context` tokens together."""
        subtask = self.subtasks[index % len(self.subtasks)]

        def make(units: int) -> tuple[Episode, int, int]:
            rng = random.Random(f"{self.name}/{subtask}/{seed}/{context}/{index}")
            episode = self.episode_for(rng, subtask, units, context)
            turn = episode.turns[0]
            prompt = len(tokenizer.encode(episode.context + turn.question + turn.answer_prefix))
            answer = len(tokenizer.encode(turn.answer, add_special_tokens=False))
            return episode, prompt, answer

        def fits(units: int) -> bool:
            _, prompt, answer = make(units)
            return prompt + answer + SPARE_TOKENS <= context

        low = self.smallest(subtask)
        if not fits(low):
            _, prompt, answer = make(low)
            raise InputError(
                f"a context of {context} tokens is too short for {self.name}/{subtask}, whose "
                f"shortest sample has {prompt + answer + SPARE_TOKENS}; choose a longer --context"
            )
        high = 2 * low + 1
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)

        episode, prompt, answer = make(low)
        turn = episode.turns[0]
        return Sample(
            task=self.name,
            subtask=subtask,
            index=index,
            prompt=episode.context + turn.question + turn.answer_prefix,
            reference=turn.reference,
            max_new_tokens=min(answer + SPARE_TOKENS, context - prompt),
            metadata={"answer_prefix": turn.answer_prefix, "units": low},
            question_at=len(episode.context),
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """The value of the task's metric."""
        return metrics.get(self.metric)(prediction, sample.reference)


class SyntheticTask(GeneratedTask):
    """A generated task that the embedded model is trained on (an `EpisodicTask`)."""

    @abstractmethod
    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A context of `units` units with `turns` turns, or fewer if there is less to ask about."""

    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """An episode with one turn; a task whose answer grows with `context` overrides this."""
        return self.episode(rng, subtask, units, turns=1)


def table_turn(columns: Sequence[str], table: Sequence[tuple[str, ...]]) -> Turn:
    """The turn that asks for all rows of a table as tab-separated values, after their header."""
    return Turn(
        f"\nThe table ({len(table)} items) as tab-separated values:\n",
        "\t".join(columns) + "\n",
        "\n".join("\t".join(row) for row in table),
        [list(row) for row in table],
    )


def distinct(rng: random.Random, count: int, *parts: Sequence[str]) -> list[tuple[str, ...]]:
    """`count` different tuples of one word from each part; InputError if there are too few."""
    total = 1
    for part in parts:
        total *= len(part)
    if count > total:
        raise InputError(
            f"a context this long needs {count} different names but only {total} exist; choose a "
            "shorter --context"
        )
    found: list[tuple[str, ...]] = []
    for code in rng.sample(range(total), count):
        words = []
        for part in parts:
            code, place = divmod(code, len(part))
            words.append(part[place])
        found.append(tuple(words))
    return found


def code(rng: random.Random) -> str:
    """A UUID-like code: two groups of four hexadecimal digits."""
    return f"{rng.getrandbits(16):04x}-{rng.getrandbits(16):04x}"
