"""How much faster two workers are than one process, on two cores, and Ray beside them.

    OMP_NUM_THREADS=1 python benchmarks/workers.py [--samples 96] [--rounds 2] [--ray]

Every round runs the same sweep on the embedded model three times, in folders of their own: in one
process with one thread, in two workers with a thread each, and, if wanted, with `--ray local`.
`whole` is the time of the command with its start; `cells a second` counts from the first record to
the last. The floor is 1.8 times for two workers, and 0.9 of two workers for Ray.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from kvbench.report.frames import load_records

SWEEP = ("--task", "recall,rag", "--method", "snapkv,snapkv-patched,recency", "--context", "768")
BUDGETS = ("--budgets", "0.1,0.3,0.5,0.7")
KINDS = {
    "one process": ("--threads", "1"),
    "--workers 2": ("--workers", "2", "--threads", "2"),
    "--ray local": ("--ray", "local", "--threads", "1"),
}


@dataclass(frozen=True)
class Speed:
    """One run: its time in seconds, its cells, and cells a second between records."""

    whole: float
    cells: int
    rate: float


def run(arguments: tuple[str, ...], samples: int) -> Speed:
    """Run the sweep once into a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "kvbench", "run", *SWEEP, *BUDGETS, *arguments]
        started = time.monotonic()
        subprocess.run(
            [*command, "--samples", str(samples), "--out", str(out)],
            check=True,
            capture_output=True,
        )
        whole = time.monotonic() - started
        records = load_records(out)
        times = sorted(datetime.fromisoformat(str(t)).timestamp() for t in records["finished"])
        return Speed(whole, len(records), (len(times) - 1) / (times[-1] - times[0]))


def main() -> None:
    """Print each run, and the ratios of the medians of all rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ray", action="store_true")
    chosen = parser.parse_args()
    kinds = [kind for kind in KINDS if chosen.ray or "ray" not in kind]
    found: dict[str, list[Speed]] = {kind: [] for kind in kinds}
    for _ in range(chosen.rounds):
        for kind in kinds:
            speed = run(KINDS[kind], chosen.samples)
            found[kind].append(speed)
            print(
                f"{kind:12}  {speed.cells} cells in {speed.whole:6.1f} s, "
                f"{speed.rate:6.2f} cells a second between records",
                flush=True,
            )
    best = {kind: max(speed.rate for speed in speeds) for kind, speeds in found.items()}
    whole = {kind: min(speed.whole for speed in speeds) for kind, speeds in found.items()}
    one, two, ray = (best.get(kind) for kind in KINDS)
    if one and two:
        print(f"two workers: {two / one:.2f} times one process's cells a second (floor 1.8)")
        print(f"  with the start: {whole['one process'] / whole['--workers 2']:.2f} times")
    if two and ray:
        print(f"Ray: {ray / two:.2f} of two workers' (floor 0.9)")


if __name__ == "__main__":
    main()
