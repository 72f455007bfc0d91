"""What the synthetic tasks share: an episode made to a number of units, then to a length in tokens.

An *episode* is a context with one or more turns (a question and its answer) about it. A sample is
an episode with one turn; training text has many, because dense supervision learns faster.
"""

import random
from abc import abstractmethod
from collections.abc import Sequence

from kvbench.errors import InputError
from kvbench.metrics import metrics
from kvbench.task import Episode, Sample, Task, Tokenizer

from . import _metrics  # noqa: F401  registers the metrics that these tasks name

SPARE_TOKENS = 8  # room for the end token and for special tokens a tokenizer adds around a prompt


class GeneratedTask(Task):
    """A task whose samples are generated at any length, with nothing to download."""

    @abstractmethod
    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """The one-turn episode of a sample, its context of `units` records, passages or lines.

        `context` is in tokens, for tasks whose answer scales with it.
        """

    @abstractmethod
    def smallest(self, subtask: str) -> int:
        """The fewest units a context of `subtask` can have."""

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """The longest sample that fits `context` tokens, prompt and reference answer together."""
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
                f"a context of {context} tokens is too short for {self.name}/{subtask}: its "
                f"shortest sample has {prompt + answer + SPARE_TOKENS}"
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
        )

    def score(self, prediction: str, sample: Sample) -> float:
        """The value of the task's metric."""
        return metrics.get(self.metric)(prediction, sample.reference)


class SyntheticTask(GeneratedTask):
    """A generated task in the embedded model's own language, which it is trained on."""

    @abstractmethod
    def episode(self, rng: random.Random, subtask: str, units: int, turns: int) -> Episode:
        """A context of `units` records, passages, documents or filler, asked about `turns` times.

        Turns are fewer where the context has fewer things to ask about.
        """

    def episode_for(self, rng: random.Random, subtask: str, units: int, context: int) -> Episode:
        """The one-turn episode of a sample; a task whose answer scales with `context` overrides."""
        return self.episode(rng, subtask, units, turns=1)


def distinct(rng: random.Random, count: int, *parts: Sequence[str]) -> list[tuple[str, ...]]:
    """`count` different tuples with one word of each part; InputError if there are too few."""
    total = 1
    for part in parts:
        total *= len(part)
    if count > total:
        raise InputError(f"a context needs {count} different names but only {total} exist")
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
