"""How the paper's full scale scales: its predicted costs, replayed through the real order of work.

    python benchmarks/scaling.py > results/benchmarks/scaling.txt

Needs no GPU. A unit is a sample with all of its cells; `kvbench plan` predicts its seconds on an
H100. Workers take units as `--workers` and Ray do: whoever is free takes the longest that is left.
Shards (`--shard I/N`) are dealt before the run by tokens, and nobody helps a late one. Each worker
loads the model first (START seconds). A unit fails with a probability of FAILURES, at a random
moment of it; its worker starts again, and the unit returns to the queue.

Efficiency is the time that units need over the time that workers are held, from the first start to
the end of the last worker. The floor of the makespan is the larger of the mean load and the longest
unit, plus one start.
"""

import heapq
import random
from dataclasses import dataclass

from kvbench.reproduce.full import full_settings, options_for, shapes, workloads
from kvbench.sweep.command import Choices
from kvbench.sweep.forecast import forecast, read_gpu
from kvbench.sweep.units import dealt, longest_first

START = 120.0  # seconds until a worker has loaded an 8B model and checked itself
FAILURES = 0.01  # of units
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
RUNS = 20  # with failures drawn anew; the median counts


@dataclass(frozen=True)
class Unit:
    """A sample with all of its cells."""

    seconds: float  # predicted
    tokens: float  # what shards are dealt by


@dataclass(frozen=True)
class Outcome:
    """How a run went, in seconds."""

    makespan: float
    tail: float  # from the moment when the first worker has nothing left
    held: float  # over all workers

    def efficiency(self, units: list[Unit]) -> float:
        """The share of the time held that units need."""
        return sum(unit.seconds for unit in units) / self.held


def paper_units() -> list[Unit]:
    """The units of the paper's full scale."""
    settings = full_settings()
    choices = Choices(
        model=settings["model"],
        method=tuple(settings["method"]),
        budgets=tuple(settings["budgets"]),
        prefill_chunk=tuple(settings["prefill-chunk"]),
        option=options_for(settings["method"], {}),
    )
    model, gpu = shapes(choices.model, None, "auto"), read_gpu("h100")
    units = []
    for load in workloads(None, context=settings["context"]):
        seconds = forecast(choices, model, gpu, [load]).total.seconds / load.samples
        units += [Unit(seconds, load.prompt + load.answer)] * load.samples
    return units


def taken(units: list[Unit], workers: int, failures: float, rng: random.Random) -> Outcome:
    """Workers that take the longest unit that is left."""
    left = longest_first(units, lambda unit: unit.seconds)[::-1]
    free = [(START, worker) for worker in range(workers)]  # when each is free
    heapq.heapify(free)
    retries: list[tuple[float, int, Unit]] = []  # when a unit returns to the queue
    idle, ends = [], []
    while free:
        now, worker = heapq.heappop(free)
        while retries and retries[0][0] <= now:
            left.append(heapq.heappop(retries)[2])
        if not left and retries:  # helps the worker that fails
            heapq.heappush(free, (retries[0][0], worker))
            idle.append(now)
            continue
        if not left:
            idle.append(now)
            ends.append(now)
            continue
        unit = left.pop()
        if rng.random() < failures:
            died = now + rng.random() * unit.seconds
            heapq.heappush(retries, (died, worker, unit))
            heapq.heappush(free, (died + START, worker))
        else:
            heapq.heappush(free, (now + unit.seconds, worker))
    makespan = max(ends)
    return Outcome(makespan, makespan - min(idle), workers * makespan)


def sharded(units: list[Unit], workers: int, failures: float, rng: random.Random) -> Outcome:
    """Workers that have their share from the start; each is given back when it ends."""
    ends = []
    for share in dealt(units, workers, lambda unit: unit.tokens):
        now = START
        for unit in share:
            while rng.random() < failures:
                now += rng.random() * unit.seconds + START
            now += unit.seconds
        ends.append(now)
    return Outcome(max(ends), max(ends) - min(ends), sum(ends))


def main() -> None:
    """Print a table for each way to share the work."""
    units = paper_units()
    total, longest = sum(u.seconds for u in units), max(u.seconds for u in units)
    print(
        f"{len(units):,} units, {total / 3600:,.0f} H100-hours predicted; the longest unit takes "
        f"{longest / 3600:.2f} h, the mean one {total / len(units) / 3600:.2f} h"
    )
    print(f"each worker starts in {START:.0f} s, {FAILURES:.0%} of units fail once; of {RUNS} runs")
    for name, run in (("one queue (--workers, Ray)", taken), ("shards (--shard I/N)", sharded)):
        print(f"\n{name}")
        print("workers  efficiency  without failures  makespan h  floor h  tail h  GPU-hours")
        for workers in WORKERS:
            rng = random.Random(workers)
            runs = [run(units, workers, FAILURES, rng) for _ in range(RUNS)]
            middle = sorted(runs, key=lambda outcome: outcome.makespan)[RUNS // 2]
            calm = run(units, workers, 0, rng)
            floor = max(total / workers, longest) + START
            print(
                f"{workers:7} {middle.efficiency(units):11.1%} {calm.efficiency(units):17.1%}"
                f" {middle.makespan / 3600:11.2f} {floor / 3600:8.2f} {middle.tail / 3600:7.2f}"
                f" {middle.held / 3600:10,.0f}"
            )
    print(
        "\nIt stops scaling where a worker has few units: the longest takes "
        f"{longest / 3600:.2f} h, and with 1,024 workers each has {len(units) / 1024:.0f} units of "
        f"{total / 1024 / 3600:.2f} h together, so that one unit that fails late is a long tail."
    )


if __name__ == "__main__":
    main()
