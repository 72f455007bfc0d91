"""Small runs of the embedded model, and what was measured in them."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvbench.records import read_records

SMALL = [
    *("--task", "recall,rag", "--context", "256", "--samples", "3", "--budgets", "0.3,0.6"),
    *("--method", "snapkv,recency", "--device", "cpu"),
]
# What depends on when, where and beside what a cell was measured.
CIRCUMSTANCES = (
    *("finished", "prefill_seconds", "decode_seconds", "shared_rows", "group_bytes_peak"),
    "device_bytes_peak",
)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured, by fingerprint; each cell once."""
    lines = [line for path in folder.glob("samples-*") for line in path.open("rb")]
    records = read_records(folder)
    assert len(lines) == len(records)
    return {
        record.fingerprint: {k: v for k, v in asdict(record).items() if k not in CIRCUMSTANCES}
        for record in records
    }
