"""The command line as a user meets it: wrong input, help, lists, kills in the middle of a sweep."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.process import KVBENCH, interrupted, interrupted_at_import, kvbench, kvbench_here
from helpers.warm import Program

from kvbench.cli.app import main
from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED

SMALL = ["--task", "rag", "--context", "256", "--samples", "3", "--budgets", "0.3,0.6"]
LONG = 300 * "x"
ONE = ["1" if text == "3" else text for text in SMALL]  # sample


def records(folder: Path) -> list[dict[str, Any]]:
    lines = [line for f in folder.glob("samples-*.jsonl") for line in f.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --method snapk", "did you mean 'snapkv'"),
        ("run --task recal", "did you mean 'recall'"),
        ("run --metod snapkv", "--method"),
        ("rn", "did you mean 'run'"),
        ("run --budgets 0", "more than 0 and at most 1"),
        ("run --budgets -1", "more than 0 and at most 1"),
        ("run --budgets 1.5", "more than 0 and at most 1"),
        ("run --budgets abc", "'abc' is not a budget"),
        ("run --seed 1_0", "'1_0' is not a seed"),
        ("run --config /dev/zero", "cannot read the configuration /dev/zero: it is not a regular"),
        ("run --config pipe", "cannot read the configuration pipe: it is not a regular file"),
        ("run --config long.yaml", "longer than 1000000 bytes"),
        ("run --method prulong --option scores=pipe", "'pipe' cannot be read: it is not a regular"),
        ("run --model piped", "'piped/model.safetensors.index.json' is not an index of weights"),
        ("plan --model some --model-config pipe", "it is not a regular file"),
        ("run --shard 1", "not a shard"),
        (f"run --shard 1/{10**12}", "not a shard"),
        ("run --shard 3/2", "a shard is too large"),
        ("run --budgets 0.1,,0.3", "empty entry"),
        ("run --samples 0", "--samples"),
        (f"run --samples {10**30}", "samples is too large: give at most 1000000"),
        (f"run --seed {10**30}", "seed is too large"),
        (f"run --context {10**30}", "context is too large"),
        (f"run --prefill-chunk {10**30}", "prefill_chunk is too large"),
        ("run --prefill-chunk 0", "at least 1"),
        ("run --model tinyy", "no model 'tinyy'"),
        ("run --model ./nowhere", "no model './nowhere'"),
        ("run --model empty", "no config.json"),
        ("run --model broken", "config.json is not a JSON object"),
        ("run --model organisation/name", "cannot be loaded"),
        ("run --context 100000", "at most 8192"),
        ("run --context 20", "too short"),
        ("run --model plain --method prulong", "needs head scores"),
        ("run --method prulong --option scores=none.tsv", "cannot be read"),
        ("run --method prulong --option scores=words.tsv", "not a table of numbers"),
        ("run --method prulong --option scores=other.tsv", "1 layers of 2 KV heads"),
        ("run --method snapkv --option windw=3", "did you mean 'window'"),
        ("run --method snapkv --option window", "key=value"),
        ("run --device cudaa", "unknown device"),
        ("run --dtype float31", "did you mean 'float32'"),
        ("run --attention sdpaa", "did you mean 'sdpa'"),
        ("run --chat-template on", "no chat template"),
        ("run --out words.tsv --method recency", "is a file"),
        ("run --out /proc/none --method recency --task rag --samples 1", "cannot write"),
        (f"run --out {LONG}", "File name too long; choose another --out"),
        (f"run --model /{LONG}", "no model"),
        (f"merge empty --out {LONG}", "File name too long; choose another --out"),
        ("run --config none.yaml", "cannot read"),
        ("run --config unknown.yaml", "did you mean 'budgets'"),
        ("report nowhere", "nowhere"),
        ("report empty", "no results"),
        ("report --threshold 2", "--threshold"),
        ("reproduce --scale huge", "--scale"),
        ("reproduce --samples 0", "--samples"),
        ("list methds", "did you mean 'methods'"),
        ("train tinny --out x", "did you mean 'tiny'"),
        ("train duoattention --target 0.5", "has no --target"),
        ("run --memory-limit lots", "not an amount of memory"),
        ("run --threads 0", "--threads"),
        ("run --threads 100000", "100000 threads are too many: this machine has"),
        ("run --chat-template of", "'off'"),
        ("reproduce --threshold 0", "--threshold"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "plain").mkdir()  # the embedded model without its head scores
    for file in EMBEDDED["tiny"].iterdir():
        if file.is_file() and not file.name.startswith("scores-"):
            (tmp_path / "plain" / file.name).symlink_to(file)
    (tmp_path / "piped").mkdir()
    (tmp_path / "piped" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "piped" / "model.safetensors.index.json")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "long.yaml").write_text("#" * 1_000_001)
    (tmp_path / "words.tsv").write_text("not numbers\n")
    (tmp_path / "other.tsv").write_text("0.1\t0.2\n")
    (tmp_path / "unknown.yaml").write_text("budgts: 0.3\n")
    before = sorted(tmp_path.rglob("*"))
    done = kvbench_here(*arguments.split(), folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_current_directory_that_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f"rmdir ../gone; {shlex.join([*KVBENCH, 'run', '--dry-run'])}"
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path / "gone", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("kvbench: the current directory no longer exists")


def test_a_sweep_a_report_and_the_same_sweep_again(tmp_path: Path) -> None:
    sweep = ["run", "--method", "snapkv-naive,recency", *SMALL, "--out", "r"]
    dry = kvbench_here(*sweep, "--dry-run", folder=tmp_path)
    assert dry.returncode == 0
    assert "15 of 15 cells" in dry.stdout
    assert not (tmp_path / "r").exists()

    done = kvbench(*sweep, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = records(tmp_path / "r")
    assert len(found) == 15  # 3 samples x (2 methods x 2 budgets + the baseline)
    for record in found:
        assert record["kv_footprint"] == record["resident_rows"] / record["full_rows"]
        assert 0 <= record["score"] <= 1
    assert {r["kv_footprint"] for r in found if r["method"] == "full"} == {1.0}
    run = json.loads((tmp_path / "r" / "run.json").read_text())
    assert run["common"]["model"] == "tiny"

    again = kvbench_here(*sweep, folder=tmp_path)
    assert again.returncode == 0
    assert "measured already" in again.stderr
    assert records(tmp_path / "r") == found

    report = kvbench_here("report", "r", "--format", "json", folder=tmp_path)
    rows = json.loads(report.stdout)
    assert {row["method"] for row in rows} == {"full", "snapkv-naive", "recency"}
    for row in rows:
        assert {"model", "task", "prefill_chunk", "baseline", "threshold", "status"} <= set(row)
        assert 0 <= row["critical_footprint"] <= 1
    for name in ("critical.csv", "rag.png", "rag.pdf"):
        assert (tmp_path / "r" / name).stat().st_size > 0

    other = kvbench_here(*sweep, "--seed", "1", folder=tmp_path)
    assert other.returncode == 2
    assert "seed was 0, now 1" in other.stderr


def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    sweep = ["run", "--method", "recency,random", *SMALL, "--out", "r", "--batch-rows", "1"]
    process = Program("-m", "kvbench", *sweep, folder=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (tmp_path / "r").is_dir() and len(records(tmp_path / "r")) >= 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    early = records(tmp_path / "r")
    assert 4 <= len(early) < 15

    # what a kill in the middle of a write leaves behind
    with next((tmp_path / "r").glob("samples-*.jsonl")).open("a") as file:
        file.write('{"fingerprint": "torn')
    done = kvbench_here(*sweep, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line)
        for file in (tmp_path / "r").glob("samples-*.jsonl")
        for line in file.read_text().splitlines()
        if line.endswith("}")
    ]
    assert len(lines) == len({line["fingerprint"] for line in lines}) == 15
    # the unbroken run measures the same
    assert kvbench_here(*sweep[:-4], "--out", "whole", folder=tmp_path).returncode == 0
    key = ["method", "budget", "sample", "prediction", "score", "resident_rows"]
    whole = sorted([r[k] for k in key] for r in records(tmp_path / "whole"))
    assert sorted([r[k] for k in key] for r in lines) == whole


def test_ctrl_c_keeps_what_is_finished(tmp_path: Path) -> None:
    sweep = ["run", "--method", "recency,random", *SMALL, "--out", "r", "--batch-rows", "1"]
    errors = interrupted(
        sweep, tmp_path, lambda: (tmp_path / "r").is_dir() and bool(records(tmp_path / "r"))
    )
    assert "the same command continues it" in errors
    assert records(tmp_path / "r")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("kvbench.errors", "list"),
        ("typer.core", "--help"),
        ("kvbench.cli.app", "list"),
        ("numpy", "run --task rag --samples 1 --out r"),
        ("torch._utils", "run --task rag --samples 1 --out r"),
        ("transformers.utils", "run --task rag --samples 1 --out r"),
    ],
)
def test_ctrl_c_before_the_work_is_one_line(module: str, command: str, tmp_path: Path) -> None:
    code, errors = interrupted_at_import(module, command.split(), tmp_path)
    assert (code, errors) == (130, "kvbench: interrupted")
    assert not (tmp_path / "r").exists()


def test_help_and_report_import_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from kvbench.cli.app import main\n"
        "main(['--help'])\n"
        "late = {'torch', 'transformers', 'numpy', 'pandas', 'matplotlib', 'pydantic', 'yaml'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)\n"
        "import kvbench.report.publish\n"
        "assert 'kvbench.report.page' in sys.modules and 'kvbench.report.figures' in sys.modules\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_lists_say_what_there_is(tmp_path: Path) -> None:
    listing = json.loads(kvbench("list", "--format", "json", folder=tmp_path).stdout)
    assert {"full", "recency", "snapkv", "prulong"} <= {m["method"] for m in listing["methods"]}
    assert {t["task"] for t in listing["tasks"]} == {
        "recall",
        "rag",
        "rerank",
        "html_to_tsv",
        "facts",
        "needle",
        "yaml_to_tsv",
    }
    variants = {m["method"]: m["variants"] for m in listing["methods"]}
    forms = ["ada-snapkv", "snapkv-naive", "snapkv-patched", "snapkv-bounded"]
    assert variants["snapkv"] == forms
    assert "random-heads" not in variants["random"]  # not random-heads, which is a method
    assert variants["random-heads"] == variants["prulong"] == []
    snapkv = next(m for m in listing["methods"] if m["method"] == "snapkv")
    assert snapkv["options"]["window"] == "64"
    assert snapkv["option_types"]["window"] == "int"
    assert set(snapkv["option_help"]) == set(snapkv["options"])
    assert snapkv["on_models"]["window"] == {"tiny": "16"}
    assert snapkv["on_models"]["kernel"] == {}


def test_the_list_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "pyramidkv  post-fill" in lines
    forms = "ada-pyramidkv, pyramidkv-naive, pyramidkv-patched, pyramidkv-bounded"
    assert f"    forms: {forms}" in [line.rstrip() for line in lines]
    assert any(line.startswith("    window=64 ") for line in lines)
    assert any("(int; on tiny: 16)" in line for line in lines)


def test_a_plan_names_methods_that_are_measured_alike_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    methods = "snapkv,recency,knorm,snapkv-naive"
    sweep = ["run", "--method", methods, *ONE, "--dry-run"]
    assert main([*sweep, "--out", str(tmp_path / "r")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "full 1 any rag 1" in lines
    assert "snapkv, knorm 0.3, 0.6 any rag 2" in lines
    assert "recency, snapkv-naive 0.3, 0.6 64 rag 2" in lines


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        ("run", ["What to measure", "How much", "Model", "Memory", "Output"]),
        ("report", ["Arguments", "Output"]),
        ("list", ["Arguments", "Output"]),
        ("reproduce", ["What to measure", "How much", "Output"]),
        ("train prulong", ["Model", "How much", "Training", "Output"]),
        ("train duoattention", ["Model", "How much", "Training", "Output"]),
        ("train tiny", ["How much", "Training", "Output"]),
        ("train", ["Commands"]),
        ("", ["Commands"]),
    ],
)
def test_help_has_panels_and_examples(
    command: str, panels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    for panel in panels:
        assert f"─ {panel} ─" in shown
    assert "Examples" in shown
    assert "$ kvbench" in shown


def test_a_configuration_gives_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(
        "method: [recency, snapkv]\ntask: rag\nbudgets: 0.5\nsamples: 1\ncontext: 256\n"
        "chat-template: off\noption: {window: 8}\n",
        encoding="utf-8-sig",  # as editors of Windows write it
    )
    sweep = ["run", "--config", "sweep.yaml", "--dry-run"]
    assert main(sweep) == 0
    assert "3 of 3 cells to measure in results/runs/tiny-rag-" in capsys.readouterr().out
    assert main([*sweep, "--samples", "2", "--method", "snapkv"]) == 0
    assert "4 of 4 cells" in capsys.readouterr().out


def test_brackets_in_names_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["run", "--method", "recency", *ONE, "--dry-run"]
    assert main([*sweep, "--out", str(tmp_path / "[v2]")]) == 0
    assert "[v2]" in capsys.readouterr().out
    assert main(["report", "[bold]name"]) == 2
    assert "[bold]name" in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBENCH_DEBUG", "1")
    with pytest.raises(InputError, match="did you mean 'snapkv'"):
        main(["run", "--method", "snapk"])
