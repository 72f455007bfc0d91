"""Head splits: retrieval heads keep every entry, streaming heads keep sinks and a recent window."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from kvbench.errors import InputError
from kvbench.files import read_regular
from kvbench.method import Family, KVShape, Method, Window

Table = list[list[float]]  # [layers][KV heads], a score for each KV head


@dataclass(frozen=True)
class HeadSplit(Method):
    """A method that ranks the KV heads of a model (docs/methods.md).

    With a budget b, the `round(b * layers * KV heads)` heads of highest score are retrieval heads.
    """

    family = Family.HEAD_SPLIT
    sinks: int = field(default=128, metadata={"help": "First entries that streaming heads keep."})
    window: int = field(
        default=1024, metadata={"help": "Most recent entries that streaming heads keep."}
    )

    def __post_init__(self) -> None:
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")
        self.check(self.window >= 1, f"window must be at least 1, not {self.window}")

    def head_scores(self, shape: KVShape, budget: float) -> Table:
        """Scores [layers][KV heads], larger for heads that need every entry.

        InputError if the method has no scores for a model of this shape.
        """
        raise NotImplementedError

    def windows(
        self, shape: KVShape, budget: float, prompt: int
    ) -> Sequence[Sequence[Window | None]]:
        """None for retrieval heads, sinks and a recent window for streaming heads."""
        retrieval = retrieval_heads(self.head_scores(shape, budget), budget, shape.acting)
        window = Window(self.sinks, self.window)
        return [
            [None if (layer, head) in retrieval else window for head in range(shape.kv_heads)]
            for layer in range(shape.layers)
        ]


@dataclass(frozen=True)
class LearntHeads(HeadSplit):
    """A head split by scores that were learnt and are read from a file.

    `training` is the name of the training in `kvbench train`, if it is not the method's.
    """

    training: ClassVar[str] = ""
    scores_file: Path | None = field(
        default=None,
        metadata={"option": "scores", "help": "File of head scores, from `kvbench train`."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.sets  # an unusable file is refused now

    @cached_property
    def sets(self) -> "list[ScoreSet]":
        """The score sets of the file, empty if no file is given; read once."""
        return [] if self.scores_file is None else read_scores(self.scores_file)

    def missing(self) -> str | None:
        """Head scores, if no file is given."""
        if self.scores_file is not None:
            return None
        return (
            f"head scores: give --option {self.name}.scores=FILE, learnt by "
            f"'kvbench train {self.training or self.name}'"
        )

    def remarks(self) -> dict[str, Any]:
        """The sparsities that the scores were learnt for."""
        return {"score_targets": [each.target for each in self.sets]} if self.sets else {}

    def head_scores(self, shape: KVShape, budget: float) -> Table:
        """The scores learnt for the sparsity nearest to 1 - budget."""
        if not self.sets:
            raise InputError(f"{self.name} needs {self.missing()}")
        table = nearest(self.sets, 1 - budget).scores
        if (len(table), len(table[0])) != (shape.layers, shape.kv_heads):
            raise InputError(
                f"head scores '{self.scores_file}' are for {len(table)} layers of {len(table[0])} "
                f"KV heads, the model has {shape.layers} of {shape.kv_heads}"
            )
        return table


@dataclass(frozen=True)
class ScoreSet:
    """Scores of all KV heads, and the sparsity they were learnt for; None if the file has none."""

    target: float | None
    scores: Table


def read_scores(path: Path) -> list[ScoreSet]:
    """The score sets of a file; InputError if it cannot be read.

    The file is JSON with a table `scores`, or with `sets`, each of them a table `scores` and its
    `target`; or a TSV with a row for each layer and a column for each KV head, as DuoAttention
    publishes them.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"head scores '{path}' cannot be read: {reason}") from None
    try:
        if path.suffix == ".json":
            content = json.loads(text)
            given = content.get("sets", [content])
            sets = [ScoreSet(each.get("target"), numbers(each["scores"])) for each in given]
        else:
            rows = [line.split() for line in text.splitlines() if line.strip()]
            sets = [ScoreSet(None, numbers(rows))]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError(
            f"head scores '{path}' are not a table of numbers: expected JSON with a key 'scores' "
            "or 'sets', or a TSV with a row for each layer and a column for each KV head"
        ) from None
    shapes = {(len(each.scores), len(row)) for each in sets for row in each.scores}
    whole = all(math.isfinite(s) for each in sets for row in each.scores for s in row)
    if len(shapes) != 1 or not whole:
        raise InputError(f"head scores '{path}' have rows of different lengths, or no numbers")
    return sets


def equal_scores(folder: Path, shape: KVShape) -> Path:
    """A file of head scores that are all equal, where only the number of heads matters."""
    file = folder / "equal-scores.tsv"
    row = "\t".join(["0"] * shape.kv_heads)
    file.write_text("\n".join([row] * shape.layers) + "\n", encoding="utf-8")
    return file


def numbers(rows: Sequence[Sequence[Any]]) -> Table:
    """The rows as floats; ValueError or TypeError if a cell is not a number."""
    return [[float(cell) for cell in row] for row in rows]


def nearest(sets: Sequence[ScoreSet], sparsity: float) -> ScoreSet:
    """The set learnt for the nearest sparsity; the sparser one if two are equally near."""
    return min(sets, key=lambda each: (abs((each.target or 0.0) - sparsity), -(each.target or 0.0)))


def retrieval_heads(
    scores: Table, budget: float, acting: Sequence[int] | None = None
) -> set[tuple[int, int]]:
    """The `round(budget * layers * KV heads)` pairs (layer, KV head) of highest score.

    Only the layers `acting` count (None: all). Ties go to the earlier layer and head.
    """
    layers = range(len(scores)) if acting is None else acting
    order = sorted(
        ((layer, head) for layer in layers for head in range(len(scores[layer]))),
        key=lambda place: -scores[place[0]][place[1]],
    )
    return set(order[: round(budget * len(order))])
