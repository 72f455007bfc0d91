"""Time and memory of `kvbench report` on many records, compared with parsing them alone.

    python benchmarks/report.py [--records 100000] [--samples 200]

The records are made up: 13 methods at six budgets on four tasks, with texts as long as those of a
run and a timeline. The report runs as a separate process and makes everything: tables, pictures,
page.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvbench.engine.accounting import chunks, full_rows
from kvbench.records import Record
from kvbench.run_folder import RunWriter

TASKS = ("recall", "rag", "rerank", "html_to_tsv")
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
METHODS = {
    "recency": 0.9,
    "snapkv": 0.1,
    "snapkv-naive": 0.8,
    "snapkv-patched": 0.4,
    "pyramidkv": 0.1,
    "pyramidkv-naive": 0.8,
    "pyramidkv-patched": 0.4,
    "knorm": 0.6,
    "knorm-naive": 0.7,
    "random": 0.7,
    "random-naive": 0.8,
    "duoattention": 0.35,
    "prulong": 0.25,
}
PROMPT, ANSWER, CHUNK, HEADS = 1000, 24, 256, 16


def timeline(budget: float) -> list[list[int]]:
    """Return the timeline of a chunked eviction."""
    corners, held, rows = [[0, 0]], 0, 0
    for size in chunks(PROMPT, CHUNK):
        rows += size
        corners.append([rows, HEADS * (held + size)])
        held += round(budget * size)
        corners.append([rows, HEADS * held])
    return [*corners, [rows + ANSWER, HEADS * (held + ANSWER)]]


def made_up(count: int, samples: int) -> list[Record]:
    """Return `count` records, of as many models as that takes at `samples` samples per task."""
    draw = random.Random(0)
    known = set(Record.__dataclass_fields__)
    records: list[Record] = []
    for model in range(1 + count // (len(TASKS) * samples * (1 + len(METHODS) * len(BUDGETS)))):
        for sample in range(samples):
            for task in TASKS:
                cells = [("full", 1.0)] + [(m, b) for m in METHODS for b in BUDGETS]
                for method, budget in cells:
                    share = 0.1 + 0.9 * budget
                    passed = (
                        draw.random() < 0.95 and budget > METHODS.get(method, 0) * draw.random()
                    )
                    values: dict[str, Any] = {
                        "fingerprint": f"{len(records):020x}",
                        "model": f"model-{model}",
                        "task": task,
                        "subtask": f"kind {sample % 4}",
                        "method": method,
                        "family": "made up",
                        "options": {"window": 16, "kernel": 5},
                        "budget": budget,
                        "prefill_chunk": CHUNK if method.endswith(("naive", "patched")) else None,
                        "sample": sample,
                        "sample_seed": 0,
                        "context": PROMPT + ANSWER,
                        "finished": "2026-01-01T00:00:00.000",
                        "prompt_tail": "the prompt's tail " * 13,
                        "reference": ["the reference"],
                        "prediction": "what the model wrote " * 5,
                        "score": float(passed),
                        "kv_footprint": share,
                        "kv_peak": share,
                        "kv_reads": share,
                        "resident_rows": int(share * HEADS * full_rows(PROMPT, ANSWER)),
                        "full_rows": HEADS * full_rows(PROMPT, ANSWER),
                        "patch_rows": 0,
                        "kv_bytes_peak": int(share * 4_000_000),
                        "prefill_seconds": 0.1,
                        "decode_seconds": 0.1,
                        "prompt_tokens": PROMPT,
                        "new_tokens": ANSWER,
                        "timeline": timeline(budget),
                    }
                    records.append(Record(**{k: v for k, v in values.items() if k in known}))
    return records[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=200, help="samples a task and model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        with RunWriter(run, {}, {}) as writer:
            writer.append(made_up(arguments.records, arguments.samples))
        (file,) = run.glob("samples-*.jsonl")
        started = time.perf_counter()
        for line in file.open("rb"):
            json.loads(line)
        floor = time.perf_counter() - started
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "kvbench", "report", str(run)], check=True, capture_output=True
        )
        spent = time.perf_counter() - started
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        page = (run / "report.html").stat().st_size
        print(f"{arguments.records:,} records, {file.stat().st_size / 2**20:.0f} MiB")
        print(f"parsing alone    {floor:8.2f} s")
        print(f"kvbench report   {spent:8.2f} s, {spent / floor:.1f} times that")
        print(f"memory at most   {memory:8.0f} MiB")
        print(f"report.html      {page / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
