"""The data sets of the paper's eight tasks, as its public code ran them.

`datasets.yaml` holds them, and says what the fields mean.
"""

from dataclasses import dataclass
from pathlib import Path

import yaml

TABLE = Path(__file__).parent / "datasets.yaml"


@dataclass(frozen=True)
class DataSet:
    """A published data set; lengths and limits in tokens of the evaluated model."""

    name: str  # HELMET's or LongProc's
    task: str  # the paper's
    benchmark: str
    input_limit: int  # prompt and answer together
    answer_limit: int
    shots: int
    samples: int  # questions drawn
    chat: bool
    metric: str  # a registered metric, unless `left_out`
    prompt_tokens: int  # of a typical prompt
    data: str | None = None  # a file of the benchmark's checkout; None: from the Hugging Face hub
    demos: str | None = None
    rows: float = 1  # of each question
    question: tuple[str, ...] = ()  # columns that tell the question; (): every row asks another
    newline: bool = False  # whether the configuration asks to stop there
    left_out: str | None = None  # why it cannot be scored here

    @property
    def files(self) -> list[str]:
        """The files of a checkout that it needs."""
        return [path for path in (self.data, self.demos) if path]


def published_data_sets() -> dict[str, DataSet]:
    """The data sets by name, in the order of the paper's tasks."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return {
        name: DataSet(name, **{**entry, "question": tuple(entry.get("question", ()))})
        for name, entry in table.items()
    }
