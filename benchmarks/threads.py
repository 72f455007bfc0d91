"""Threads that wait for each other: on an idle machine, and beside a process that never rests.

    python benchmarks/threads.py [--repeats 9] [--loops 1] [--settings "kvbench,spin 100"]

Processes with different settings take turns, with short pieces of work, within one run. Printed
are milliseconds (medians) and two ratios, medians of pairs that were measured one after the other:
to OpenMP's own setting, which is what an idle machine can do, and to one thread, the floor beside
other work. `kvbench` shall take at most 1.05 of the first if the machine is idle, and at most 1.3
of the second beside a loop. Other work on the machine while this runs spoils the first.

`kvbench` is what a user gets: as many threads as there are free cores when it starts. `all cores`
is the same if the loop comes later; the other settings take all cores, too, and wait otherwise.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil

FLOOR, OWN = "one thread", "OpenMP's own"
CHOSEN = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what settings are made of
ALL = {"OMP_NUM_THREADS": str(len(psutil.Process().cpu_affinity()))}
SETTINGS: dict[str, dict[str, str]] = {
    FLOOR: {"OMP_NUM_THREADS": "1"},
    OWN: {**ALL, "GOMP_SPINCOUNT": "300000"},
    "kvbench": {},
    "all cores": ALL,
    "passive": {**ALL, "OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin {n}": {**ALL, "GOMP_SPINCOUNT": str(n)} for n in (100, 1000, 10_000, 30_000)},
}
SHOWN = (FLOOR, OWN, "kvbench", "all cores", "passive")
LOOP = [sys.executable, "-c", "while True: pass"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--loops", type=int, default=1, help="busy processes")
    parser.add_argument("--settings", default=",".join(SHOWN), help=f"of: {', '.join(SETTINGS)}")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    names = list(dict.fromkeys([FLOOR, *arguments.settings.split(",")]))
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    for loops in (0, arguments.loops):
        busy = [subprocess.Popen(LOOP, text=True) for _ in range(loops)]
        workers: dict[str, Worker] = {}
        try:
            workers |= {name: Worker(SETTINGS[name]) for name in names}
            measure(f"beside {loops} busy loops" if loops else "no busy loop", workers, arguments)
        finally:
            for process in busy + [worker.process for worker in workers.values()]:
                process.kill()
                process.wait()


class Worker:
    """A process with one setting, which works when it is asked."""

    def __init__(self, setting: dict[str, str]) -> None:
        inherited = {k: v for k, v in os.environ.items() if k not in CHOSEN}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"],
            env=inherited | setting,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.works = self.answer().split(",")

    def answer(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def milliseconds(self, name: str) -> float:
        """How long the process takes for a piece of work."""
        assert self.process.stdin is not None
        print(name, file=self.process.stdin, flush=True)
        return float(self.answer())


def measure(title: str, workers: dict[str, Worker], arguments: argparse.Namespace) -> None:
    """Let the workers take turns, and print what they took."""
    works = next(iter(workers.values())).works
    times: dict[tuple[str, str], list[float]] = {(w, n): [] for w in works for n in workers}
    for _ in range(arguments.repeats):
        for work, name in times:
            times[work, name].append(workers[name].milliseconds(work))
    print(f"\n{title:22} {'ms':>10} {'/ ' + OWN:>16} {'/ ' + FLOOR:>14}")
    for work, name in times:
        own = ratio(times[work, name], times[work, OWN]) if OWN in workers else math.nan
        floor = ratio(times[work, name], times[work, FLOOR])
        took = statistics.median(times[work, name])
        print(f"{work:8} {name:13} {took:10.1f} {own:16.2f} {floor:14.2f}")


def ratio(some: list[float], others: list[float]) -> float:
    """The median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def work() -> None:
    """Do the pieces of work that are named on stdin, and print the milliseconds of each."""
    import torch

    from kvbench.engine.row import Row
    from kvbench.engine.run import run_rows
    from kvbench.models.load import load_model
    from kvbench.spec import parse_method

    model = load_model("tiny")
    model.model.generation_config.eos_token_id = -1

    def rows(count: int, new: int, methods: tuple[str, ...] = ("full",)) -> list[Row]:
        made = []
        for sample in range(count):
            torch.manual_seed(sample)
            prompt = torch.randint(1, 200, (400,)).tolist()
            for method in methods:
                spec = parse_method(method, {}, model.card.options)
                made.append(Row(prompt, new, spec, 0.3, sample))
        return made

    def decoding(some: list[Row]) -> Callable[[], float]:
        return lambda: sum(o.decode_seconds for o in run_rows(model, some, prefill_chunk=None))

    def sweep() -> float:
        started = time.perf_counter()
        run_rows(model, cells, prefill_chunk=128)
        return time.perf_counter() - started

    cells = rows(1, 16, ("full", "recency", "snapkv", "snapkv-naive", "snapkv-patched", "prulong"))
    works = {"1 row": decoding(rows(1, 40)), "16 rows": decoding(rows(16, 12)), "sweep": sweep}
    for function in works.values():
        function()
    print(",".join(works), flush=True)
    for line in sys.stdin:
        print(1000 * works[line.strip()](), flush=True)


if __name__ == "__main__":
    main()
