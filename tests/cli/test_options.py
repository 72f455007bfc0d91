"""Options and configurations: what is refused before anything starts, and what is swept."""

from pathlib import Path

import pytest
import yaml
from helpers.process import kvbench_here

from kvbench.cli.app import main
from kvbench.cli.options import comma_list, key_value, swept
from kvbench.errors import InputError

REFUSED = [
    (["report", "--threshold", "nan"], "--threshold"),
    (["report", "--threshold", "inf"], "--threshold"),
    (["report", "--out", "", "r"], "--out is empty"),
    (["report", ""], "RUN is empty"),
    (["run", "--out", " "], "--out is empty"),
    (["run", "--model", ""], "--model is empty"),
    (["run", "--seed", "1", "--seed", "2"], "--seed is given 2 times"),
    (["run", "--seed", "0,1.5"], "'1.5' is not a seed"),
    (["run", "--seed", "0,,1"], "empty entry"),
    (["run", "--seed", "-1"], "seed must be at least 0"),
    (["run", "--budgets", "0.1", "--budgets", "0.2"], "--budgets is given 2 times"),
    (["run", "--samples", "1_0"], "--samples must be a whole number, like 10, not 1_0"),
    (["run", "--context", "1_024"], "--context must be a whole number"),
    (["run", "--workers", "2.0"], "--workers must be a whole number"),
    (["report", "--threshold", "0.9_1", "r"], "--threshold must be a number, not 0.9_1"),
    (["run", "--prefill-chunk", "6_4"], "'6_4' is not a number of tokens"),
    (["run", "--budgets", "nan"], "more than 0 and at most 1"),
    (["run", "--option", "window=8", "--option", "window=9"], "given twice, as 8 and as 9"),
    (["run", "--option", "snapkv.window=8,,9"], "empty entry"),
    (["run", "--method", "snapkv", "--option", "window=8,x"], 'must be int, not "x"'),
    (["run", "--method", "snapkv", "--option", "window=nan"], 'must be int, not "nan"'),
    (["run", "--method", "snapkv", "--option", f"window={10**30}"], "too large"),
    (["run", "--method", "ada-snapkv", "--option", "head_share=inf"], 'must be float, not "inf"'),
    (["run", "--template-option", "a=1", "--template-option", "a=2"], "given twice"),
    (["check", "snapkv", "--option", ""], "--option is empty"),
    (["check", "snapkv", "--option", "window=8,9"], 'must be int, not "8,9"'),
    (["plan", "--gpu", ""], "--gpu is empty"),
    (["plan", "--samples", "0"], "--samples"),
    (["reproduce", "--threshold", "nan"], "--threshold"),
    (["convert", "helmet", ""], "CHECKOUT is empty"),
    (["train", "prulong", "--rate", "inf"], "--rate must be a number"),
    (["train", "prulong", "--steps", "1", "--steps", "2"], "--steps is given 2 times"),
    (["train", "prulong", "--option", "sinks=1", "--option", "sinks=2"], "given twice"),
    (["train", "tiny", "--out", "x", "--minutes", "inf"], "--minutes must be a number"),
    (["train", "tiny", "--out", ""], "--out is empty"),
]

CONFIGURATIONS = [
    ("samples: -1", "c.yaml: Invalid value for '--samples'"),
    ("samples: 1_0", "c.yaml: --samples must be a whole number, like 10, not 1_0"),
    ("samples: 1.5", "c.yaml: Invalid value for '--samples'"),
    ("samples: 1\nsamples: 2", "c.yaml, line 2: 'samples' is there twice"),
    ("max-new-tokens: 1\nmax_new_tokens: 2", "'max_new_tokens' is there twice"),
    ("samples: [1, 2]", "samples has no usable value; give a single value"),
    ("seed: [0, 1.5]", "'1.5' is not a seed"),
    ("seed: 010.0", "'010.0' is not a seed"),
    ("budgets: [0.1, -0.2]", "more than 0 and at most 1"),
    ("budgets: .nan", "'.nan' is not a budget"),
    ("context: 512.5", "c.yaml: Invalid value for '--context'"),
    ("out: ''", "out has no usable value"),
    ("out: [a, b]", "out has no usable value"),
    ("option: {window: 1, window: 2}", "line 1: 'window' is there twice"),
    ("option: {window: {a: 1}}", "window has no usable value"),
    ("option: [window]", "option must be a mapping"),
    ("method: []", "method has no usable value"),
    ("dry-run: perhaps", "dry-run must be true or false"),
    ("template-date: 2025-13-45", "is not a day"),
    ("- samples", "not a list of"),
    ("samples: [", "is not YAML"),
]


def refused(arguments: list[str], message: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = kvbench_here(*arguments, folder=folder)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_options_that_would_be_taken_in_silence(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "r").mkdir()
    refused(arguments, message, tmp_path)


@pytest.mark.parametrize(("text", "message"), CONFIGURATIONS)
def test_configurations_that_would_be_taken_in_silence(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    refused(["run", "--config", "c.yaml"], message, tmp_path)


def test_the_command_line_is_not_blamed_on_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("samples: 3")
    done = kvbench_here("run", "--config", "c.yaml", "--samples", "0", folder=tmp_path)
    assert done.returncode == 2
    assert "c.yaml" not in done.stderr


def test_commas_separate_values_and_a_backslash_keeps_one() -> None:
    given = key_value(["window=8, 32", r"scores=a\,b.tsv", "beta=", r"x=1\,2,3"])
    assert swept(given) == {
        "window": ("8", "32"),
        "scores": "a,b.tsv",
        "beta": "",
        "x": ("1,2", "3"),
    }
    assert swept({"window": "8,8"}) == {"window": "8"}
    assert comma_list(r"a\,b.jsonl,c", "tasks", str) == ("a,b.jsonl", "c")
    with pytest.raises(InputError, match="empty entry"):
        swept({"window": "8,"})


def test_a_plan_shows_every_variant_and_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    config = {
        "method": ["snapkv", "recency"],
        "task": "rag",
        "context": 256,
        "samples": 2,
        "budgets": [0.3, 0.6],
        "seed": [0, 1, 2],
        "option": {"snapkv.window": [4, 8], "recency.sinks": 2},
        "out": "r",
    }
    Path("c.yaml").write_text(yaml.safe_dump(config))
    typed = [
        *("run", "--method", "snapkv,recency", "--task", "rag", "--context", "256"),
        *("--samples", "2", "--budgets", "0.3,0.6", "--seed", "0,1,2", "--out", "r"),
        *("--option", "snapkv.window=4,8", "--option", "recency.sinks=2"),
    ]
    for arguments in (["run", "--config", "c.yaml"], typed):
        assert main([*arguments, "--dry-run"]) == 0
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        # 2 samples x 3 seeds x (2 budgets, or 1 for the baseline)
        assert "full 1 any rag 6" in lines
        assert "snapkv (window=4), snapkv (window=8) 0.3, 0.6 any rag 12" in lines
        assert "recency 0.3, 0.6 64 rag 12" in lines
        assert any("42 of 42 cells to measure in r" in line for line in lines)


def test_a_forecast_counts_variants_and_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    once = ["plan", "--method", "snapkv", "--task", "needle", "--samples", "2", "--format", "csv"]
    shape = ["--model", "tiny", "--context", "4096", "--prefill-chunk", "1024", "--budgets", "0.5"]
    assert main([*once, *shape, "--seed", "0,1,2", "--option", "snapkv.window=8,32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split(",")[6]: float(line.split(",")[0]) for line in lines[1:]}
    assert cells == {"full": 6, "snapkv (window=8)": 6, "snapkv (window=32)": 6}
