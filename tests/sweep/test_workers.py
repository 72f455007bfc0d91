"""Several processes for one command: the records of one process, whatever dies on the way."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
from helpers.process import kvbench_here
from helpers.runs import SMALL, results
from helpers.warm import Program, python

from kvbench.errors import InputError
from kvbench.report.build import make_report
from kvbench.sweep.command import Choices
from kvbench.sweep.progress import Listener, Progress
from kvbench.sweep.units import slurm_shard
from kvbench.sweep.workers import Crew, environments, run_workers


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    assert kvbench_here("run", *SMALL, "--out", "alone", folder=folder).returncode == 0
    return folder / "alone"


def test_shards_put_together_are_one_run(alone: Path, tmp_path: Path) -> None:
    for index in (1, 2, 3):
        shard = ["--shard", f"{index}/3", "--out", f"shard-{index}"]
        done = kvbench_here("run", *SMALL, *shard, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"shard {index} of 3: 10 of 30 cells" in done.stderr
    found = [results(tmp_path / f"shard-{index}") for index in (1, 2, 3)]
    assert sum(map(len, found)) == len(results(alone)) == 30
    merge = ["merge", "shard-1", "shard-2", "shard-3", "--out", "all"]
    for _ in range(2):  # the second time, nothing is added
        done = kvbench_here(*merge, folder=tmp_path)
        assert "all holds 30 cells" in done.stderr
        assert results(tmp_path / "all") == results(alone)
    again = kvbench_here("run", *SMALL, "--out", "all", folder=tmp_path)
    assert "all 30 cells are measured already" in again.stderr
    merged, whole = (make_report([folder], 0.9) for folder in (tmp_path / "all", alone))
    assert merged.critical.equals(whole.critical)
    assert merged.differences.equals(whole.differences)


def test_a_slurm_array_says_which_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = {"ID": 4, "COUNT": 3, "MIN": 0, "MAX": 4, "STEP": 2}
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    done = kvbench_here("run", *SMALL, "--dry-run", folder=tmp_path)
    assert "shard 3 of 3: 10 of 30 cells" in done.stderr
    for wrong in (
        {"COUNT": 2},  # such as --array=0,2,4 with a job left out
        {"ID": 3, "COUNT": 1, "MIN": 3, "MAX": 3, "STEP": 1},  # one job of an array, repeated
        {"ID": 1, "COUNT": 1, "MIN": 1, "MAX": 1, "STEP": 1},
        {"ID": 3, "COUNT": 2, "MIN": 3, "MAX": 4, "STEP": 1},
        {"ID": 1},
        {"STEP": 0},
        {"STEP": "x"},
    ):
        given = {f"SLURM_ARRAY_TASK_{name}": str(n) for name, n in (array | wrong).items()}
        with pytest.raises(InputError, match="give --shard I/N"):
            slurm_shard(given)


TWO_WORKERS = ["-m", "kvbench", "run", *SMALL, "--workers", "2", "--out", "out"]


def workers_of(process: Program) -> list[psutil.Process]:
    return psutil.Process(process.pid).children()


def lives(worker: psutil.Process) -> bool:
    try:
        return worker.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(true: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_worker_that_dies_costs_its_unit_once(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = Program(*TWO_WORKERS, "--batch-rows", "4", folder=tmp_path)
    until(lambda: any(path.stat().st_size for path in out.glob("samples-*")))
    workers_of(process)[0].kill()
    done = process.wait()
    assert done.returncode == 0, done.stderr
    assert "ended (signal 9) and is started again" in done.stderr
    assert results(out) == results(alone)


def test_an_interrupt_ends_all_workers_and_the_run_continues(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = Program(*TWO_WORKERS, "--batch-rows", "4", folder=tmp_path)
    until(lambda: any(path.stat().st_size for path in out.glob("samples-*")))
    workers = workers_of(process)
    process.send_signal(signal.SIGTERM)
    done = process.wait()
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    until(lambda: not any(lives(worker) for worker in workers), seconds=20)
    assert 0 < len(results(out)) < 30
    assert kvbench_here("run", *SMALL, "--out", "out", folder=tmp_path).returncode == 0
    assert results(out) == results(alone)


def test_what_no_worker_can_measure_is_refused_once(tmp_path: Path) -> None:
    bad = ["--workers", "2", "--context", "20", "--task", "recall", "--device", "cpu"]
    done = kvbench_here("run", *bad, "--out", "x", folder=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert "too short" in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_worker_that_never_gets_anywhere_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kvbench.sweep.workers.MOST_STARTS", 2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(InputError, match="all workers died"):
        run_workers(Choices(out=tmp_path / "x", workers=2, device="cpu"))


def test_cores_and_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = environments(Choices(workers=3, device="cpu"))
    assert [each["OMP_NUM_THREADS"] for each in found] == ["2", "2", "2"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-3f")
    found = environments(Choices(workers=2))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["5", "GPU-3f"]
    with pytest.raises(InputError, match="3 workers need a GPU each, this machine has 2"):
        environments(Choices(workers=3))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1, 4,6,7")
    found = environments(Choices(workers=2, gpus_per_worker=2))
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["0,1", "4,6"]
    with pytest.raises(InputError, match="2 workers need 3 GPUs each, this machine has 5"):
        environments(Choices(workers=2, gpus_per_worker=3))
    with pytest.raises(InputError, match="give cuda or cpu"):
        environments(Choices(workers=2, device="cuda:1"))


def test_more_workers_than_the_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvbench.sweep.workers.free_memory", lambda: 2**31)
    with pytest.raises(InputError, match=r"64 workers need .* 2\.0 are free; choose --workers 7"):
        environments(Choices(workers=64, device="cpu"))


def test_progress_counts_the_cells_of_all_workers() -> None:
    class Heard(Listener):
        lines: ClassVar[list[str]] = []

        def advanced(self, progress: Progress) -> None:
            self.lines.append(f"{progress.task} {progress.done}/{progress.cells}")

    heard = Heard()
    crew = Crew(Choices(workers=2), heard, [])
    told = {"what": "progress", "task": "rag", "finished": True, "left": 5.0}
    crew.hear(0, {**told, "cells": 40, "tokens": 400, "done": 0, "done_tokens": 0})
    crew.hear(1, {**told, "cells": 40, "tokens": 400, "done": 30, "done_tokens": 300})
    crew.hear(0, {**told, "cells": 40, "tokens": 400, "done": 10, "done_tokens": 100})
    crew.speaker = None  # the first one died, and another measures what is left
    crew.hear(1, {**told, "cells": 30, "tokens": 300, "done": 10, "done_tokens": 100})
    assert heard.lines == ["rag 0/40", "rag 10/40", "rag 20/40"]


PRINTING = """
import kvbench
print("a line", flush=True)
print(5)
"""


def test_two_workers_measure_what_one_process_does_whatever_a_plugin_prints(
    alone: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    info = site / "kv_printing-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "kv_printing.py").write_text(PRINTING)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kv-printing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvbench.plugins]\nprinting = kv_printing\nbroken = kv_broken\n"
    )
    (site / "kv_broken.py").write_text("import kvbench\nkvbench.no_such_name\n")
    (site / "sitecustomize.py").write_text("print('{}', flush=True)\n")
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "2,1"}
    done = python(*TWO_WORKERS, folder=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "started again" not in done.stderr
    assert done.stderr.count("plug-in broken (kv_broken) cannot be loaded") == 1
    assert results(tmp_path / "out") == results(alone)
    assert not list((tmp_path / "out").glob("claims-*"))
