"""Completion by the protocols of typer's scripts for bash and zsh."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from helpers.process import KVBENCH

from kvbench.cli import complete
from kvbench.cli.app import main
from kvbench.registry import tasks
from kvbench.spec import method_names


def completed(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """What bash is offered at the end of a line."""
    monkeypatch.setenv("_KVBENCH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("kvbench re", "report reproduce"),
        ("kvbench train ", "prulong duoattention saliency tiny"),
        ("kvbench run --meth", "--method"),
        (
            "kvbench run --method full,pyramidkv-",
            "full,pyramidkv-bounded full,pyramidkv-naive full,pyramidkv-patched",
        ),
        ("kvbench run --method recency,al", "recency,all"),
        ("kvbench run --samples 3 --task recall,r", "recall,rag recall,rerank"),
        ("kvbench run --config none.yaml --model sm", "smollm2-135m"),
        ("kvbench run --chat-template o", "on off"),
        ("kvbench list methods,t", "methods,tasks"),
        ("kvbench report ru", "run-1"),
        ("kvbench report elsewhere/", "elsewhere/run-2"),
    ],
)
def test_bash_is_offered(
    line: str,
    offered: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "results" / "runs" / "run-1", tmp_path / "elsewhere" / "run-2"):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"common": {}, "invocations": []}))
    assert completed(line, monkeypatch, capsys) == offered.split()


def test_names_are_those_that_are_registered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(complete.method_names()) == method_names()
    assert completed("kvbench run --task ", monkeypatch, capsys) == tasks.names()


def test_zsh_is_offered_methods_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AssertionError('imported')\n")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "_KVBENCH_COMPLETE": "complete_zsh",
        "_TYPER_COMPLETE_ARGS": "kvbench run --method recency,kn",
    }
    done = subprocess.run(
        KVBENCH, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    offered = (
        '_arguments \'*: :(("recency,knorm"\n"recency,knorm-bounded"\n"recency,knorm-naive"))\''
    )
    assert done.stdout.strip() == offered


def test_names_that_steer_a_terminal_are_not_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["run 1", "[v2]", "\x1b[31m", "a\nb", "\u202ex", "x\udcff"]
    for name in names:
        folder = tmp_path / "results" / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"common": {}, "invocations": []}))
    assert sorted(complete.runs("")) == ["[v2]", "run 1"]
    offered = [Path(run).name for run in complete.runs(str(tmp_path / "results" / "runs") + "/")]
    assert sorted(offered) == ["[v2]", "run 1"]
