"""Head splits: some KV heads keep every entry, the others stream, by scores read from a file."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvbench.errors import InputError
from kvbench.method import Family, KVShape, Method, Window


@dataclass(frozen=True)
class HeadSplit(Method):
    """A method that is a file of learnt head scores (ALGORITHMS, section 6).

    A budget b makes the `round(b * L * K)` heads of highest score retrieval heads.
    """

    family = Family.HEAD_SPLIT
    scores_file: Path | None = field(default=None, metadata={"option": "scores"})
    sinks: int = 128
    window: int = 1024

    def __post_init__(self) -> None:
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")
        self.check(self.window >= 1, f"window must be at least 1, not {self.window}")
        if self.scores_file is not None:
            read_scores(self.scores_file)

    def windows(
        self, shape: KVShape, budget: float, prompt: int
    ) -> Sequence[Sequence[Window | None]]:
        """None for retrieval heads, sinks and window for streaming heads."""
        if self.scores_file is None:
            raise InputError(f"{self.name} needs head scores: give --option scores=FILE")
        window = Window(self.sinks, self.window)
        return split_windows(self.scores_file, shape, budget, window)


def read_scores(path: Path) -> list[list[float]]:
    """Scores [L][K] of a file: JSON with a `scores` table, or a TSV of L rows by K columns.

    The TSV is what DuoAttention publishes. InputError if it cannot be read as such a table.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"head scores '{path}' cannot be read: {error}") from None
    try:
        if path.suffix == ".json":
            table = json.loads(text)["scores"]
        else:
            table = [line.split() for line in text.splitlines() if line.strip()]
        scores = [[float(cell) for cell in row] for row in table]
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"head scores '{path}' are not a table of numbers: expected JSON with a key 'scores', "
            "or a TSV with a row for each layer and a column for each KV head"
        ) from None
    widths = {len(row) for row in scores}
    if len(widths) != 1 or not all(math.isfinite(s) for row in scores for s in row):
        raise InputError(f"head scores '{path}' have rows of different lengths, or no numbers")
    return scores


def split_windows(
    path: Path, shape: KVShape, budget: float, window: Window
) -> list[list[Window | None]]:
    """None for the `round(budget * L * K)` heads of highest score, `window` for the others.

    Ties go to the earlier layer and head. InputError if the file is of another shape of model.
    """
    scores = read_scores(path)
    if (len(scores), len(scores[0])) != (shape.layers, shape.kv_heads):
        raise InputError(
            f"head scores '{path}' are for {len(scores)} layers of {len(scores[0])} KV heads, the "
            f"model has {shape.layers} of {shape.kv_heads}"
        )
    order = sorted(
        ((layer, head) for layer in range(shape.layers) for head in range(shape.kv_heads)),
        key=lambda place: -scores[place[0]][place[1]],
    )
    retrieval = set(order[: round(budget * len(order))])
    return [
        [None if (layer, head) in retrieval else window for head in range(shape.kv_heads)]
        for layer in range(shape.layers)
    ]
