"""Records made up for tests of what is done with records."""

from pathlib import Path
from typing import Any

from kvbench.records import Record
from kvbench.run_folder import RunWriter


def record(method: str, budget: float, sample: int, score: float | None, **changes: Any) -> Record:
    """A record of a method whose footprint is its budget, unless `changes` say otherwise."""
    values: dict[str, Any] = {
        "fingerprint": f"{method}/{budget}/{sample}/{changes}",
        "model": "m",
        "task": "recall",
        "subtask": "any",
        "method": method,
        "family": method,
        "options": {},
        "budget": budget,
        "prefill_chunk": None,
        "sample": sample,
        "sample_seed": 0,
        "context": 100,
        "finished": "2026-01-01T00:00:00",
        "prompt_tail": "",
        "reference": ["x"],
        "prediction": "y",
        "score": score,
        "kv_footprint": budget,
        "kv_peak": budget,
    }
    return Record(**{**values, **changes})


def store(folder: Path, records: list[Record], **common: Any) -> Path:
    """A run directory of the records."""
    with RunWriter(folder, {"model": "m", **common}, {"python": "3.11"}) as writer:
        writer.append(records)
    return folder
