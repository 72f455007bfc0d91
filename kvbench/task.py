"""What a task is: it makes samples of a wanted length and scores predictions.

This is where the walk of the data starts (`docs/architecture.md`): a task makes `Sample`s, the
harness has the model answer each under every method and budget, and the task scores the answers.
How to write one: `docs/writing-a-task.md`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Protocol, runtime_checkable


class Tokenizer(Protocol):
    """The part of a tokenizer that tasks use, to measure the length of a text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True)
class Sample:
    """One question with its context, as a prompt.

    A sample is determined by its task, `index`, and the seed and context it was made with.
    """

    task: str
    subtask: str
    index: int
    prompt: str  # ends where the model's answer starts
    reference: Any  # what `Task.score` compares with; JSON-serialisable, read by its task alone
    max_new_tokens: int  # tokens to decode at most
    metadata: dict[str, Any] = field(default_factory=dict)
    cluster: str | None = None  # samples with the same cluster are not independent
    question_at: int | None = None  # characters of the prompt before its question; None: not known
    # Characters of the prompt that may be cut if it is too long: [start, end); None: not known.
    context_span: tuple[int, int] | None = None
    metric: str | None = None  # name of a registered metric; None: the task's own
    chat: bool | None = None  # whether the data were made for a chat template; None: not said
    answer_prefix: str = ""  # the end of the prompt, where it is the start of the answer
    stop: tuple[str, ...] = ()  # decoding stops at any of these texts; none of it is scored


@dataclass(frozen=True)
class Turn:
    """One question about a context, with its answer."""

    question: str
    answer_prefix: str  # the start of the answer; it belongs to the prompt
    answer: str  # what a perfect model writes after the prefix
    reference: Any  # as in `Sample`


@dataclass(frozen=True)
class Episode:
    """A context and the turns about it: one turn for a sample, usually many for training."""

    context: str
    turns: tuple[Turn, ...]


class Task(ABC):
    """A family of samples and its metric; register a subclass with `register_task`.

    The harness creates a registered task without arguments. A subclass gives `metric`, `subtasks`,
    `sample` and `score`. A task that comes from a source (`register_task_source`), such as a file,
    sets `name`, `metric` and `subtasks` on the instance.
    """

    name: str  # what a user types; set by `register_task`
    metric: str  # name of a registered metric, or what the score is
    subtasks: tuple[str, ...]  # at least one; samples take turns among them
    default: ClassVar[bool] = True  # whether a run without --task measures this task
    # Whether samples are read rather than made. They are the same for every seed, and have lengths
    # of their own, which a run may cut or refuse. A sweep holds the prompts of one batch at a time:
    # `score` is then given a sample with the end of its prompt only, and without metadata.
    reads: ClassVar[bool] = False
    source: str = ""  # where samples are read from, for people
    size: int | None = None  # samples there are, once it is ready; None: as many as are asked for
    remarks: tuple[str, ...] = ()  # for the user, once it is ready

    def ready(self, count: int, metric: str | None, max_new_tokens: int | None) -> None:
        """Get ready for a sweep of `count` samples, before anything is loaded or measured.

        `metric` and `max_new_tokens` are for samples that do not say theirs. A task that reads
        checks all that it will be asked for, and sets `size`. InputError if something is damaged.
        """
        self.size = None

    @abstractmethod
    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """Sample number `index` (from 0), of subtask `subtasks[index % len(subtasks)]`.

        The tokens of its prompt, special ones included, and its `max_new_tokens` are at most
        `context` together. Equal arguments give equal samples. InputError if `context` is too short
        for a sample.
        """

    def place(self, index: int) -> str:
        """Where sample `index` is found, for messages; of a file, its name and the line."""
        return f"sample {index} of task '{self.name}'"

    @abstractmethod
    def score(self, prediction: str, sample: Sample) -> float:
        """The score of `prediction`, from 0 to 1 (as good as the reference).

        `prediction` is the decoded text without special tokens; it may be empty or malformed.
        """

    def fingerprint(self) -> str:
        """What can change a sample or a score, beside the class's source and what a sample holds.

        For example the version of a library that scores. If it changes, all cells of the task are
        measured again.
        """
        return ""

    def samples(
        self, count: int, *, seed: int, context: int, tokenizer: Tokenizer
    ) -> Sequence[Sample]:
        """Samples 0 to `count - 1`; arguments and errors are those of `sample`."""
        return [
            self.sample(i, seed=seed, context=context, tokenizer=tokenizer) for i in range(count)
        ]


@runtime_checkable
class EpisodicTask(Protocol):
    """A task that also makes training text: `kvbench train tiny` and the data `tasks` use it."""

    def episode(self, rng: Random, subtask: str, units: int, turns: int) -> Episode:
        """A context of `units` records, passages or documents, with `turns` turns about it.

        Fewer turns if the context has less to ask about. Equal states of `rng` give equal episodes.
        """
        ...

    def smallest(self, subtask: str) -> int:
        """The fewest units that a context of `subtask` can have."""
        ...
