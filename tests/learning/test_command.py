"""Training head scores as a user does: `kvbench train` in one or two processes, `train_heads`."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helpers.process import interrupted, kvbench, kvbench_here
from helpers.warm import Program

from kvbench.heads import read_scores
from kvbench.learning.command import HeadChoices, train_heads
from kvbench.models.card import EMBEDDED

SMALL = ["--steps", "6", "--batch", "4", "--length", "160"]


def scores(folder: Path, method: str) -> list[list[float]]:
    table: list[list[float]] = json.loads((folder / f"scores-{method}.json").read_text())["sets"][
        0
    ]["scores"]
    return table


def test_trained_scores_are_scores_to_run_with(tmp_path: Path) -> None:
    done = kvbench(
        "train",
        "prulong",
        *SMALL,
        "--target",
        "0.4,0.8",
        "--seed",
        "3",
        "--out",
        "t",
        folder=tmp_path,
    )
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
    done = kvbench_here("run", "--method", "prulong", *small, *option, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(t) for f in (tmp_path / "r").glob("samples-*") for t in f.open()]
    (record,) = [line for line in lines if line["method"] == "prulong"]
    assert record["options"]["score_targets"] == [0.4, 0.8]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[list[float]]]:
    """The scores that one process learns by a method, which is asked once."""

    @cache
    def learnt(method: str) -> list[list[float]]:
        folder = tmp_path_factory.mktemp(method)
        command = ["train", method, *SMALL, "--device", "cpu", "--out", "one"]
        one = kvbench_here(*command, folder=folder)
        assert one.returncode == 0, one.stderr
        return scores(folder / "one", method)

    return learnt


def test_saliency_ranks_the_heads_of_saliency_heads(tmp_path: Path) -> None:
    focused = ["--option", "focus=0.2", "--out", "t"]
    done = kvbench_here("train", "saliency", *SMALL, *focused, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kvbench run --method saliency-heads --option scores=t/scores-saliency" in done.stderr
    file = json.loads((tmp_path / "t" / "scores-saliency-heads.json").read_text())
    assert file["focus"] == 0.2
    assert file["sets"][0]["sparsity"] is None
    assert len({score for row in file["sets"][0]["scores"] for score in row}) == 16
    assert (tmp_path / "t" / "training.png").stat().st_size > 0
    small = ["--task", "rag", "--context", "256", "--samples", "1", "--budgets", "0.5"]
    option = ["--option", "scores=t/scores-saliency-heads.json", "--out", "r"]
    done = kvbench_here("run", "--method", "saliency-heads", *small, *option, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_card_chooses_the_dtype_of_a_training(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED["tiny"], tmp_path / "m", ignore=shutil.ignore_patterns("scores-*"))
    card = json.loads((tmp_path / "m" / "kvbench.json").read_text())
    card["training"]["saliency"] = {"data": "tasks", "dtype": "bfloat16", "sinks": 4, "window": 32}
    (tmp_path / "m" / "kvbench.json").write_text(json.dumps(card))
    for dtype, found in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        arguments = ["--model", "m", *SMALL, *dtype, "--out", found]
        done = kvbench_here("train", "saliency", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        file = json.loads((tmp_path / found / "scores-saliency-heads.json").read_text())
        assert file["dtype"] == found


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    log = tmp_path / "t" / "log.jsonl"
    many = ["500" if text == "6" else text for text in SMALL]  # steps
    command = ["train", "prulong", *many, "--out", "t"]
    errors = interrupted(command, tmp_path, lambda: log.is_file() and log.stat().st_size > 0)
    assert "the same command goes on" in errors
    assert (tmp_path / "t" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "t" / "scores-prulong.json").exists()


def test_a_result_says_what_was_learnt_and_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 2, "batch": 1, "length": 64, "passkey_words": 2}
    choices = HeadChoices("duoattention", "tiny", None, settings, tmp_path, "cpu", "auto")

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    broken = train_heads(choices, say=interrupt)  # called after the last step
    assert (broken.scores, broken.sets, broken.interrupted) == (None, (), True)

    result = train_heads(choices, say=lambda text: None)
    assert not result.interrupted
    assert result.scores == tmp_path / "scores-duoattention.json"
    assert [(each.target, each.scores) for each in read_scores(result.scores)] == [
        (each.target, each.scores) for each in result.sets
    ]
    assert 0 < (result.sets[0].sparsity or 0) < 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2  # no step was repeated
    assert capfd.readouterr() == ("", "")


def launched(folder: Path, *arguments: str) -> None:
    """Run `kvbench train` in two processes, as `accelerate launch` does on GPUs."""
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kvbench"]
    done = subprocess.run(
        [sys.executable, *two, "train", *arguments, "--device", "cpu"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 6 of 6") == 1  # only one process reports


def forked(folder: Path, *arguments: str) -> None:
    """The same without the launcher: two processes whose environment says who is who."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = ["-m", "kvbench", "train", *arguments, "--device", "cpu"]
    started = [
        Program(
            *command, folder=folder, environment={**os.environ, **both, "RANK": n, "LOCAL_RANK": n}
        )
        for n in ("0", "1")
    ]
    errors = [process.wait().stderr for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert "".join(errors).count("step 6 of 6") == 1


@pytest.mark.parametrize(
    ("method", "options", "run"),
    [
        ("prulong", [], forked),
        ("prulong", ["--option", "shard=true"], forked),
        ("duoattention", [], forked),
        ("duoattention", ["--option", "shard=true"], launched),
    ],
    ids=["whole-prulong", "sharded-prulong", "whole-duoattention", "sharded-duoattention"],
)
def test_two_processes_learn_what_one_learns(
    method: str,
    options: list[str],
    run: Callable[..., None],
    alone: Callable[[str], list[list[float]]],
    tmp_path: Path,
) -> None:
    run(tmp_path, method, *SMALL, *options, "--out", "two")
    file = json.loads((tmp_path / "two" / f"scores-{method}.json").read_text())
    assert file["processes"] == 2
    one, together = alone(method), scores(tmp_path / "two", method)
    for a, b in zip(one, together, strict=True):
        assert a == pytest.approx(b, abs=1e-3)
    assert max(map(max, one)) - min(map(min, one)) > 0.01  # they were learnt


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
def test_recomputed_activations_change_nothing(
    alone: Callable[[str], list[list[float]]], tmp_path: Path
) -> None:
    options = ["--option", "gradient_checkpointing=true", "--device", "cpu", "--out", "again"]
    done = kvbench_here("train", "prulong", *SMALL, *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for a, b in zip(alone("prulong"), scores(tmp_path / "again", "prulong"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("prulong --target 1.5", "not a sparsity"),
        ("prulong --target 0.5,,0.7", "empty entry"),
        ("prulong --option stps=3", "did you mean 'steps'"),
        ("prulong --option l1=3", "no 'l1'"),
        ("duoattention --option passkeys=0", "at least 1"),
        ("prulong --option length=1", "length must be at least 2"),
        (f"prulong --steps {10**30}", "steps is too large"),
        ("prulong --rate nan", "--rate"),
        ("prulong --option weights_rate=inf", "weights_rate must be float"),
        ("duoattention --target 0.5", "--target"),
        ("prulong --data nowhere", "no data 'nowhere'"),
        ("prulong --data empty", "no text or code"),
        ("prulong --data short --length 512", "less than one sequence"),
        ("duoattention --data short --length 512", "less than one sequence"),
        ("prulong --length 9000", "at most 8192"),
        ("prulong --model nowhere", "no model 'nowhere'"),
        ("prulong --out /proc/none", "cannot write"),
        ("prulong --option weights_rate=0.1 --target 0.5,0.7", "one --target at a time"),
        ("prulong --option shard=true", "several processes"),
        ("prulon", "did you mean 'prulong'"),
        ("prulong --option focus=0", "above 0 to 1"),
        ("prulong --option focus=nan", "focus must be float"),
        ("saliency --option focus=5%", "focus must be float"),
        ("prulong --option focus=0.1 --option weights_rate=0.1", "frozen weights"),
        ("prulong --option constraint=exakt", "did you mean 'exact'"),
        ("prulong --option train_chunk=0", "at least 1"),
        ("saliency --option rows=0", "at least 1"),
        ("saliency --option rows=5", "rows is for text"),
        ("saliency --target 0.5", "--target"),
        ("saliency --option l1=3", "no 'l1'"),
        ("duoattention --option focus=0.5", "no 'focus'"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("too few words to learn from")
    before = sorted(tmp_path.rglob("*"))
    done = kvbench_here("train", *arguments.split(), folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
