"""Kills processes at random moments while two of them share a run folder, and looks for losses.

Two equal `kvbench run` commands measure in one folder. Each is killed (SIGKILL) at a random moment
and started again, until all cells are there; then the next folder begins, until there were
`--kills` kills. Every folder must then hold the same records as an unbroken run: each cell once in
the report, none lost, none failed. Lines that were measured twice are counted, they do no harm.

With `--crew workers` or `--crew ray`, one command measures with `--workers 2` or `--ray local`, and
the processes that it starts are killed. It must end by itself, with exit code 0.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 50
    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 18 --crew workers --samples 96 --longest 30
"""

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from kvbench.cli.app import main as kvbench_main
from kvbench.models.load import load_model
from kvbench.records import read_records
from kvbench.run_folder import read_fingerprints

SWEEP = ("--method", "recency,random,snapkv", "--task", "rag", "--context", "256")
FORK = multiprocessing.get_context("fork")
CREWS = {  # the options of a command, and what is found in the names of processes that it starts
    "": ([], ""),
    "workers": (["--workers", "2"], "kvbench.sweep.workers"),
    "ray": (["--ray", "local", "--workers", "2"], "ray::Worker"),
}
KEPT = ("prediction", "score", "resident_rows", "full_rows", "kv_peak", "error")


def start(folder: Path, samples: int, crew: str = "") -> BaseProcess:
    """One more process that measures the folder; what it says goes to a file beside it.

    It is forked, because to import everything anew takes longer than most of them live.
    """

    def run() -> None:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        sizes = ["--budgets", "0.3,0.6", "--samples", str(samples), "--batch-rows", "8"]
        sys.exit(kvbench_main(["run", *SWEEP, *sizes, *CREWS[crew][0], "--out", str(folder)]))

    process = FORK.Process(target=run)
    process.start()
    return process


def measure(
    folder: Path, samples: int, processes: int, kills: int, longest: float, draw: random.Random
) -> Counter[int]:
    """Let processes share a folder, and kill at most `kills` of them; how often each exit code.

    Moments are counted in seconds of CPU time, so that they are random on a busy machine too.
    """
    codes: Counter[int] = Counter()
    lives: list[tuple[BaseProcess, float]] = []
    while codes[0] < processes:
        while len(lives) + codes[0] < processes:
            lives.append((start(folder, samples), draw.uniform(0, longest)))
        time.sleep(0.005)
        for process, ends in list(lives):
            left = codes[-9] < kills and process.is_alive()
            if left and seconds_of(psutil.Process(process.pid)) > ends:
                process.kill()
                process.join()
            if process.exitcode is not None:
                codes[process.exitcode] += 1
                lives.remove((process, ends))
    return codes


def measure_by_crew(
    folder: Path, samples: int, crew: str, kills: int, longest: float, draw: random.Random
) -> Counter[int]:
    """As `measure`, of one command that starts processes, which are killed; all exit codes."""
    codes: Counter[int] = Counter()
    command = start(folder, samples, crew)
    ends: dict[psutil.Process, float] = {}
    while command.exitcode is None:
        command.join(0.05)
        for process in psutil.Process().children(recursive=True):
            try:
                if CREWS[crew][1] not in " ".join(process.cmdline()):
                    continue
                lives_until = ends.setdefault(process, draw.uniform(0, longest))
                if codes[-9] < kills and seconds_of(process) > lives_until:
                    process.kill()
                    codes[-9] += 1
            except psutil.NoSuchProcess:
                pass  # it has ended meanwhile
    codes[command.exitcode] += 1
    return codes


def seconds_of(process: psutil.Process) -> float:
    """The CPU time that a process has taken."""
    times = process.cpu_times()
    return float(times.user + times.system)


def values(folder: Path) -> dict[str, list[Any]]:
    """What was measured, by fingerprint."""
    return {r.fingerprint: [getattr(r, name) for name in KEPT] for r in read_records(folder)}


def main() -> None:
    """Kill until there were enough, folder by folder, and compare each with an unbroken run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--crew", choices=CREWS, default="")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--longest", type=float, default=5.0, help="CPU seconds of a process")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    left, wrong = arguments.kills, 0
    load_model("tiny")  # imports what processes need
    with tempfile.TemporaryDirectory() as home:
        whole = Path(home) / "whole"
        measure(whole, arguments.samples, 1, 0, 0, draw)
        expected = values(whole)
        for number in range(arguments.kills):
            folder = Path(home) / f"run-{number}"
            began = time.monotonic()
            how = left, arguments.longest, draw
            if arguments.crew:
                codes = measure_by_crew(folder, arguments.samples, arguments.crew, *how)
            else:
                codes = measure(folder, arguments.samples, 2, *how)
            seconds = time.monotonic() - began
            left -= codes[-9]
            lines = sum(1 for _ in read_fingerprints(folder))
            found = values(folder)
            equal = found == expected
            wrong += not equal or bool(set(codes) - {0, -9})
            said = folder.with_suffix(".log").read_text()
            marks = said.count("ended without a word")
            claims = len(list(folder.glob("claims-*")))
            print(
                f"folder {number}: {codes[-9]} kills, {len(found)} of {len(expected)} cells, "
                f"{lines - len(found)} measured twice, {'equal' if equal else 'NOT EQUAL'} to the "
                f"unbroken run; {marks} notes on killed groups, {claims} claims left, exit codes "
                f"{dict(codes)}, {seconds:.0f} s",
                flush=True,
            )
            if left <= 0:
                break
    print(f"{arguments.kills - left} kills, {wrong} folders that are wrong")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
