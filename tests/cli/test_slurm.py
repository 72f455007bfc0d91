"""`kvbench slurm`: a script that Slurm and a shell accept, and options that a job could not use."""

import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.process import kvbench_here

from kvbench.cli.slurm import clock
from kvbench.reproduce.full import FULL_SCALE

RUN = ["--model", "tiny", "--out", "runs/a b", "--samples", "4"]


def test_the_script_runs_a_shard_in_each_job(tmp_path: Path) -> None:
    options = ["--shards", "6", "--at-once", "2", "--gpus", "0", "--cpus", "1", "--hours", "2.5"]
    more = ["--memory", "3", "--sbatch", "partition=debug", "--sbatch", "exclusive"]
    done = kvbench_here("slurm", *options, *more, "--", *RUN, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")] == [
        "job-name=kvbench",
        "array=1-6%2",
        "ntasks=1",
        "cpus-per-task=1",
        "mem=3G",
        "time=0-02:30:00",
        "requeue",
        "open-mode=append",
        "output=kvbench-%A_%a.out",
        "partition=debug",
        "exclusive",
    ]
    assert lines[-1] == "exec kvbench run --model tiny --out 'runs/a b' --samples 4"
    script = tmp_path / "job.sh"
    script.write_text(done.stdout)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    for checker in (["shellcheck"], ["sbatch", "--test-only"]):
        if shutil.which(checker[0]):
            found = subprocess.run([*checker, script], capture_output=True, text=True)
            # sbatch without a controller cannot say whether the job would start
            assert found.returncode == 0 or "contact" in found.stderr, found.stderr


def test_time_and_memory_are_predicted(tmp_path: Path) -> None:
    shutil.copy(FULL_SCALE, tmp_path / "full.yaml")
    run = ["--", "--config", "full.yaml", "--out", "runs/paper"]
    few = kvbench_here("slurm", "--shards", "512", *run, folder=tmp_path).stdout
    many = kvbench_here("slurm", "--shards", "64", *run, folder=tmp_path).stdout
    assert "--mem=46G" in few  # 16 and twice the 15 GiB of an 8B model
    assert "--time=0-07:" in few  # 2,536 hours, 1.5 times as many
    assert "--time=2-11:" in many
    assert "--gres=gpu:1" in many


@pytest.mark.parametrize(
    ("run", "directive"),
    [
        (["--workers", "2", "--gpus-per-worker", "4"], "#SBATCH --gres=gpu:8"),
        (["--device", "cpu", "--workers", "2"], None),
    ],
)
def test_a_job_asks_for_the_gpus_of_its_workers(
    tmp_path: Path, run: list[str], directive: str | None
) -> None:
    fixed = ["--hours", "1", "--memory", "3"]
    done = kvbench_here("slurm", *fixed, "--", *RUN, *run, folder=tmp_path)
    found = [line for line in done.stdout.splitlines() if "--gres" in line]
    assert found == [directive] * (directive is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--", "--model", "tiny"], "add --out FOLDER after --"),
        (["--", *RUN, "--dry-run"], "--dry-run does not belong into a job"),
        (["--", *RUN, "--metod", "snapkv"], "--method"),
        (["--sbatch", "a b=1", "--", *RUN], "no directive"),
        (["--sbatch", "time=", "--", *RUN], "no directive"),
        (["--gpu", "h10", "--", *RUN], "did you mean 'h100'"),
        (["--shards", "0", "--", *RUN], "--shards"),
        (["--hours", "nan", "--", *RUN], "--hours"),
        (["--gpus", "2", "--", *RUN, "--gpus-per-worker", "4"], "1 workers with 4 each need 4"),
    ],
)
def test_what_a_job_could_not_use_is_refused(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = kvbench_here("slurm", *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_hours_as_slurm_writes_them() -> None:
    assert clock(0.5) == "0-00:30:00"
    assert clock(49.01) == "2-01:01:00"
    assert clock(0.001) == "0-00:01:00"
