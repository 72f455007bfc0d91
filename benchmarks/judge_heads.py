"""Trainings of head scores at equal compute, judged on the same samples, on one machine.

    python benchmarks/judge_heads.py --out FOLDER                       # a GPU: about eight minutes
    python benchmarks/judge_heads.py --out FOLDER --device cpu --together 1 --minutes 600
    python benchmarks/judge_heads.py --out FOLDER --steps 1000 --batch 16 --length 4096

Learns PruLong's masks with the loss of the tokens that need far context and as in the paper,
DuoAttention's gates, and both kinds of saliency, each with the seeds 0, 1 and 2, the same rows and
the same number of steps. Then it sweeps needle and facts with the samples of these seeds: the
scores of training s are judged on the samples of seed s. `--together` processes run at a time; on a
GPU they share it best under CUDA's MPS (`nvidia-cuda-mps-control -d`). What is not done when the
minutes are over is stopped, and the same command continues it. At the end FOLDER has the curves,
the critical KV footprints and their differences, with intervals, for each task and context.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvbench.report.build import Report, report_records
from kvbench.report.frames import read_frame

SEEDS = (0, 1, 2)
SAMPLES = 22  # of each seed
BUDGETS = "0.1,0.2,0.3,0.5"
TASKS = (("needle", 1536), ("facts", 1536), ("needle", 3072), ("facts", 3072))
CHUNK = 384
FOCUS, PAPER = "focus=0.05", "focus=1"
EXACT = ("--option", "constraint=exact")
PAPERS = ("--option", "constraint=multipliers", "--rate", "1", "--target", "0.7")


@dataclass(frozen=True)
class Kind:
    """A way to learn head scores, and the method that uses them."""

    name: str
    training: str
    method: str
    options: Sequence[str] = ()

    def scores(self, out: Path, seed: int) -> Path:
        """The file of scores that a training writes."""
        return out / f"{self.name}-{seed}" / f"scores-{self.method}.json"


KINDS = (
    Kind("prulong-focus", "prulong", "prulong", (*EXACT, "--option", FOCUS)),
    Kind("duoattention", "duoattention", "duoattention"),
    Kind("prulong-paper", "prulong", "prulong", (*PAPERS, "--option", PAPER)),
    Kind("saliency-focus", "saliency", "saliency-heads", ("--option", FOCUS)),
    Kind("saliency-all", "saliency", "saliency-heads", ("--option", PAPER)),
)


@dataclass(frozen=True, eq=False)
class Job:
    """A command of kvbench; what it prints goes to `log`."""

    log: Path
    arguments: Sequence[str]


def run_all(jobs: Sequence[Job], together: int, until: float) -> None:
    """Run the jobs, `together` at a time, and stop what still runs when the time is `until`."""
    waiting, running = list(jobs), dict[Job, subprocess.Popen[bytes]]()
    while (waiting or running) and time.monotonic() < until:
        while waiting and len(running) < together:
            job = waiting.pop(0)
            with job.log.open("wb") as log:
                running[job] = subprocess.Popen(
                    [sys.executable, "-m", "kvbench", *job.arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | ({"OMP_NUM_THREADS": "1"} if together > 1 else {}),
                )
        for job, process in list(running.items()):
            if process.poll() is not None:
                del running[job]
                if process.returncode:
                    print(f"{job.log.stem}: exit code {process.returncode}, see {job.log}")
        time.sleep(0.1)
    for process in running.values():
        os.killpg(process.pid, signal.SIGINT)
    for job, process in running.items():
        process.wait()
        print(f"{job.log.stem}: stopped; the same command continues it")
    if waiting:
        print(f"{len(waiting)} jobs were not started; the same command continues")


def trainings(out: Path, common: Sequence[str], size: argparse.Namespace) -> list[Job]:
    """The trainings that are not done, those of the first seed first."""
    jobs = []
    for seed in SEEDS:
        for kind in KINDS:
            folder = out / f"{kind.name}-{seed}"
            how = ["--steps", str(size.steps), "--batch", str(size.batch)]
            how += ["--length", str(size.length), "--seed", str(seed), "--out", str(folder)]
            if kind.training != "duoattention":
                how += ["--option", f"rows={size.steps * size.batch}"]
            if not kind.scores(out, seed).exists():
                arguments = ["train", kind.training, *common, *how, *kind.options]
                jobs.append(Job(out / f"{folder.name}.txt", arguments))
    return jobs


def sweeps(out: Path, common: Sequence[str], shards: int) -> list[Job]:
    """The sweeps of all seeds, with the scores that there are, a task after another."""
    jobs = []
    for task, context in TASKS:
        for seed in SEEDS:
            files: dict[str, list[str]] = {}
            for kind in KINDS:
                if (file := kind.scores(out, seed)).exists():
                    files.setdefault(kind.method, []).append(str(file))
            how = ["run", *common, "--task", task, "--context", str(context), "--seed", str(seed)]
            how += ["--prefill-chunk", str(CHUNK), "--samples", str(SAMPLES), "--budgets", BUDGETS]
            how += ["--method", ",".join([*files, "random-heads"])]
            how += ["--option", f"random-heads.draw={seed}"]
            for method, given in files.items():
                how += ["--option", f"{method}.scores={','.join(given)}"]
            folder = out / f"{task}-{context}-{seed}"
            for shard in range(1, shards + 1):
                arguments = [*how, "--shard", f"{shard}/{shards}", "--out", str(folder)]
                jobs.append(Job(out / f"{folder.name}-{shard}.txt", arguments))
    return jobs


def judged(out: Path, folders: Sequence[Path]) -> Report:
    """The report of one task and context; the trainings of a kind are one method."""
    kinds = {
        f"sha256:{sha256(file.read_bytes()).hexdigest()[:12]}": kind.name
        for kind in KINDS
        for seed in SEEDS
        if (file := kind.scores(out, seed)).exists()
    }
    frame, _, _ = read_frame(folders)
    names = [
        kinds.get(str(options.get("scores", "")).rpartition(" ")[2], method)
        for method, options in zip(frame["method"], frame["options"], strict=True)
    ]
    options: list[Any] = [{} for _ in names]
    return report_records(frame.assign(method=names, options=options))


def main() -> None:
    """Train, sweep and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--together", type=int, default=14, help="processes at a time")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * given.minutes
    common = ["--model", given.model, "--device", given.device, "--dtype", "bfloat16"]
    half = time.monotonic() + 30 * given.minutes
    run_all(trainings(given.out, common, given), given.together, half)
    shards = max(1, given.together // len(SEEDS))
    run_all(sweeps(given.out, common, shards), given.together, until)
    for task, context in TASKS:
        folders = [given.out / f"{task}-{context}-{seed}" for seed in SEEDS]
        there = [folder for folder in folders if any(folder.glob("samples*.jsonl"))]
        if not there:
            continue
        report = judged(given.out, there)
        for name, table in (("points", report.points), ("critical", report.critical)):
            table.to_csv(given.out / f"{task}-{context}-{name}.csv", index=False)
        report.differences.to_csv(given.out / f"{task}-{context}-differences.csv", index=False)
        scores = report.points.pivot_table(index="method", columns="budget", values="score")
        print(f"\n{task}, {context} tokens", scores.round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
