"""`kvbench slurm`: a script that Slurm and a shell accept, and options that a job could not use."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.process import kvbench_here

from kvbench.cli.slurm import clock
from kvbench.reproduce.paper import MODEL

FIXED = ["--hours", "1", "--memory", "3", "--"]
RUN = ["--model", "tiny", "--out", "runs/a b", "--samples", "4"]


def test_the_script_runs_a_shard_in_each_job(tmp_path: Path) -> None:
    options = ["--shards", "6", "--at-once", "2", "--gpus", "0", "--cpus", "1", "--hours", "2.5"]
    more = ["--memory", "3", "--sbatch", "partition=debug", "--sbatch", "exclusive"]
    more += ["--sbatch", "comment=two words"]
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
        'comment="two words"',
    ]
    ran = "kvbench run --shard \"$SLURM_ARRAY_TASK_ID/6\" --model tiny --out 'runs/a b' --samples 4"
    assert lines[-1] == f"exec {ran}"
    script = tmp_path / "job.sh"
    script.write_text(done.stdout)
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    # a cluster without a controller, which sbatch need not wait for
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=none\nSlurmctldHost=localhost\nMessageTimeout=1\n"
    )
    environment = {**os.environ, "SLURM_CONF": str(tmp_path / "slurm.conf")}
    for checker in (["shellcheck"], ["sbatch", "--test-only"]):
        if shutil.which(checker[0]):
            found = subprocess.run(
                [*checker, script], capture_output=True, text=True, env=environment
            )
            # sbatch without a controller cannot say whether the job would start
            assert found.returncode == 0 or "contact" in found.stderr, found.stderr


LARGE = [
    *("--model", MODEL, "--context", "8192", "--prefill-chunk", "2048", "--out", "runs/a"),
    *("--method", "snapkv-naive", "--budgets", "0.5"),
]


def hours_of(folder: Path, *run: str, shards: int = 1) -> tuple[float, str]:
    """The time limit of a script in hours, and what was said."""
    done = kvbench_here("slurm", "--shards", str(shards), "--", *LARGE, *run, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "--mem=46G" in done.stdout  # 16 and twice the 15 GiB of an 8B model
    assert "--gres=gpu:1" in done.stdout
    time = re.search(r"--time=(\d+)-(\d+):(\d+):00", done.stdout)
    assert time is not None
    days, hours, minutes = map(int, time.groups())
    return 24 * days + hours + minutes / 60, done.stderr


def test_the_time_counts_what_a_run_measures(tmp_path: Path) -> None:
    few, said = hours_of(tmp_path, "--task", "recall", "--samples", "10000")
    assert said == ""
    # the paper has 600 of them
    many, said = hours_of(tmp_path, "--task", "recall", "--samples", "1000000")
    assert many == pytest.approx(100 * few, rel=0.03)
    assert "days, more than many clusters allow" in said
    parts, _ = hours_of(tmp_path, "--task", "recall", "--samples", "1000000", shards=100)
    assert parts == pytest.approx(few, rel=0.03)
    seeds, _ = hours_of(tmp_path, "--task", "recall", "--samples", "10000", "--seed", "0,1,2")
    assert seeds == pytest.approx(3 * few, rel=0.03)
    swept, _ = hours_of(
        tmp_path, "--task", "recall", "--samples", "10000", "--option", "window=8,32"
    )
    assert swept > 1.05 * few
    line = json.dumps({"prompt": "word " * 5000, "reference": "x"})
    (tmp_path / "my.jsonl").write_text(f"{line}\n" * 3)
    own = ["--task", "my.jsonl", "--metric", "exact_match", "--max-new-tokens", "8"]
    assert hours_of(tmp_path, *own, "--samples", "9999")[0] == 0.5  # there are three


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
    done = kvbench_here("slurm", *FIXED, *RUN, *run, folder=tmp_path)
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
        (["--shards", "100001", "--", *RUN], "--shards"),
        (["--hours", "nan", "--", *RUN], "--hours must be a number, not nan"),
        (["--", *RUN, "--help"], "--help"),
        (["--gpus", "0", "--", *RUN], "give --hours"),
        (["--sbatch", "qos=a", "--sbatch", "--qos=b", "--", *RUN], "qos is given twice"),
        (["--sbatch", "array=1,3", "--", *RUN], "use --shards"),
        (["--sbatch", "comment=it's", "--", *RUN], "without quotes"),
        (["--sbatch", "comment=a\rb", "--", *RUN], "no directive"),
        (["--sbatch", "p=gpu", "--", *RUN], "long name"),
        # as `kvbench run` refuses it
        ([*FIXED, *RUN, "--budgets", "7"], "a budget must be more than 0 and at most 1, not 7"),
        ([*FIXED, *RUN, "--seed", "x"], "'x' is not a seed"),
        ([*FIXED, *RUN, "--task", "recal"], "did you mean 'recall'"),
        ([*FIXED, *RUN, "--task", "none.jsonl"], "cannot read the task none.jsonl"),
        ([*FIXED, *RUN, "--method", "snapk"], "did you mean 'snapkv'"),
        ([*FIXED, *RUN, "--method", "snapkv", "--option", "window=x"], "must be int"),
        ([*FIXED, *RUN[2:], "--model", "tin"], "no model 'tin'"),
        ([*FIXED, *RUN, "--context", "99999"], "is more than model 'tiny' takes"),
        ([*FIXED, *RUN[2:], "--model", MODEL, "--method", "prulong"], "prulong needs"),
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
