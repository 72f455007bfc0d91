"""What a task is: samples made to a length, and a score for a prediction."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol


class Tokenizer(Protocol):
    """The little of a tokenizer that a task needs: how long a text is."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True)
class Sample:
    """One question with its context.

    `prompt` ends where the model's answer starts. `reference` is JSON-serialisable and only the
    task that made it reads it. `index` with the seed, context and subtask determines all the rest.
    """

    task: str
    subtask: str
    index: int
    prompt: str
    reference: Any
    max_new_tokens: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One question about a context.

    `answer_prefix` starts the answer and belongs to the prompt; `answer` is what a perfect model
    writes after it.
    """

    question: str
    answer_prefix: str
    answer: str
    reference: Any


@dataclass(frozen=True)
class Episode:
    """A context and the turns about it: a sample has one turn, training text has many."""

    context: str
    turns: tuple[Turn, ...]


class Task(ABC):
    """A family of samples and its metric (ALGORITHMS, section 8)."""

    name: ClassVar[str]
    metric: ClassVar[str]  # the name of a registered metric, or what a score is
    subtasks: ClassVar[tuple[str, ...]]
    default: ClassVar[bool] = True  # whether a run that names no task has this one

    @abstractmethod
    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """Sample number `index`, its prompt plus answer at most `context` tokens long.

        The subtask is `subtasks[index % len(subtasks)]`. Equal arguments give equal samples.
        Raises InputError if `context` is too short to hold a sample.
        """

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """How good `prediction` is, in 0..1."""

    def samples(
        self, count: int, *, seed: int, context: int, tokenizer: Tokenizer
    ) -> Sequence[Sample]:
        """Samples 0 .. count-1."""
        return [
            self.sample(i, seed=seed, context=context, tokenizer=tokenizer) for i in range(count)
        ]
