"""`kvbench train prulong|duoattention` as a user meets it: real processes, one or two of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_command_line import kvbench

SMALL = ["--steps", "6", "--batch", "4", "--length", "160"]


def scores(folder: Path, method: str) -> list[list[float]]:
    table: list[list[float]] = json.loads((folder / f"scores-{method}.json").read_text())["sets"][
        0
    ]["scores"]
    return table


def test_trained_scores_are_scores_to_run_with(tmp_path: Path) -> None:
    done = kvbench(
        "train", "prulong", *SMALL, "--target", "0.4,0.8", "--seed", "3", "--out", "t",
        folder=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "step 6 of 6" in done.stderr
    file = json.loads((tmp_path / "t" / "scores-prulong.json").read_text())
    assert [each["target"] for each in file["sets"]] == [0.4, 0.8]
    for name in ("model", "model_fingerprint", "data", "steps", "seed", "sinks", "window", "date"):
        assert name in file
    for target in ("0.4", "0.8"):
        for suffix in ("png", "pdf"):
            assert (tmp_path / "t" / f"target-{target}" / f"training.{suffix}").stat().st_size > 0
    option = ["--option", "scores=t/scores-prulong.json", "--out", "r"]
    small = ["--task", "rag", "--context", "256", "--samples", "1", "--budgets", "0.5"]
    done = kvbench("run", "--method", "prulong", *small, *option, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(t) for f in (tmp_path / "r").glob("samples-*") for t in f.open()]
    (record,) = [line for line in lines if line["method"] == "prulong"]
    assert record["options"]["score_targets"] == [0.4, 0.8]


@pytest.mark.parametrize("method", ["prulong", "duoattention"])
def test_two_processes_learn_what_one_learns(method: str, tmp_path: Path) -> None:
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "-m", "kvbench"),
    ]
    command = ["train", method, *SMALL, "--device", "cpu"]
    one = kvbench(*command, "--out", "one", folder=tmp_path)
    assert one.returncode == 0, one.stderr
    two = subprocess.run(
        [*launch, *command, "--out", "two"], cwd=tmp_path, capture_output=True, text=True
    )
    assert two.returncode == 0, two.stderr
    assert two.stderr.count("step 6 of 6") == 1  # one of them speaks
    alone, together = scores(tmp_path / "one", method), scores(tmp_path / "two", method)
    for a, b in zip(alone, together, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert max(map(max, alone)) - min(map(min, alone)) > 0.01  # they were learnt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prulong --target 1.5", "not a sparsity"),
        ("prulong --target 0.5,,0.7", "empty entry"),
        ("prulong --option stps=3", "did you mean 'steps'"),
        ("prulong --option l1=3", "no 'l1'"),
        ("duoattention --option passkeys=0", "at least 1"),
        ("duoattention --target 0.5", "--target"),
        ("prulong --data nowhere", "no data 'nowhere'"),
        ("prulong --data empty", "no text or code"),
        ("prulong --data short --length 512", "less than one sequence"),
        ("duoattention --data short --length 512", "less than one sequence"),
        ("prulong --length 9000", "at most 8192"),
        ("prulong --model nowhere", "no model 'nowhere'"),
        ("prulong --out /proc/none", "cannot write"),
        ("prulong --option weights_rate=0.1 --target 0.5,0.7", "one --target at a time"),
        ("prulon", "did you mean 'prulong'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("too few words to learn from")
    before = sorted(tmp_path.rglob("*"))
    done = kvbench("train", *arguments.split(), folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
