"""`kvbench report` of odd runs: a sensible answer, or one line and code 2."""

import json
import math
import re
import subprocess
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.process import kvbench_here
from helpers.records import record, store

from kvbench.records import Record, to_line
from kvbench.report.build import make_report
from kvbench.report.page import render
from kvbench.report.tables import to_json


def report(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        return kvbench_here("report", *arguments, folder=folder)


def rows_of(*arguments: str, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The JSON rows and what stderr says of a report that has to succeed."""
    done = report(*arguments, "--format", "json", folder=folder)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows, done.stderr


def refusal(*arguments: str, folder: Path) -> str:
    """The one line of a report that has to refuse, having written nothing."""
    before = sorted(folder.rglob("*"))
    done = report(*arguments, folder=folder)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert sorted(folder.rglob("*")) == before
    return done.stderr


def full(samples: int, score: float = 1.0) -> list[Record]:
    return [record("full", 1.0, i, score) for i in range(samples)]


def test_one_budget(tmp_path: Path) -> None:
    store(tmp_path / "r", [*full(12), *(record("snapkv", 0.4, i, i % 2) for i in range(12))])
    rows, _ = rows_of("r", folder=tmp_path)
    # half the score at 0.4, all of it at 1: nine tenths at 0.88
    assert rows[1]["critical_footprint"] == pytest.approx(0.88)
    assert rows[1]["status"] == "extrapolated"
    assert (tmp_path / "r" / "recall.png").stat().st_size > 0


def test_one_sample_has_no_interval(tmp_path: Path) -> None:
    store(tmp_path / "r", [*full(1), *(record("snapkv", b, 0, b) for b in (0.2, 0.95))])
    rows, errors = rows_of("r", folder=tmp_path)
    assert rows[1]["status"] == "reached"
    assert rows[1]["ci_low"] is rows[1]["ci_high"] is None
    assert "one sample only" in errors
    assert (tmp_path / "r" / "report.html").stat().st_size > 0


def test_a_baseline_of_zero(tmp_path: Path) -> None:
    store(tmp_path / "r", [*full(4, 0.0), *(record("snapkv", 0.3, i, 0.0) for i in range(4))])
    rows, errors = rows_of("r", folder=tmp_path)
    for row in rows:
        assert row["critical_footprint"] is row["critical_peak"] is row["status"] is None
    assert "full attention scores 0" in errors


def test_a_method_better_than_the_baseline(tmp_path: Path) -> None:
    rows = [record("snapkv", b, i, s) for i in range(12) for b, s in ((0.2, 0.1), (0.6, 0.9))]
    store(tmp_path / "r", [*full(12, 0.5), *rows])
    found, _ = rows_of("r", folder=tmp_path)
    assert found[1]["status"] == "reached"
    assert 0.2 < found[1]["critical_footprint"] < 0.6


def test_a_run_half_finished(tmp_path: Path) -> None:
    rows = [record("snapkv", b, i, b) for b, n in ((0.2, 12), (0.5, 8), (0.9, 2)) for i in range(n)]
    store(tmp_path / "r", [*full(12), *rows, record("prulong", 0.5, 40, 1.0)])
    found, errors = rows_of("r", folder=tmp_path)
    assert [row["method"] for row in found] == ["full", "snapkv"]
    assert [p["budget"] for p in found[1]["points"]] == [0.2, 0.5]
    assert [p["samples"] for p in found[1]["points"]] == [12, 8]
    assert "too few samples at budget 0.9" in errors
    assert "unfinished; each budget has 8 to 12 of full attention's 12 samples" in errors
    assert "no sample that the baseline has too" in errors


def test_records_of_two_models(tmp_path: Path) -> None:
    for model in ("org/a", "org/b"):
        rows = [record("full", 1.0, i, 1.0, model=model) for i in range(3)]
        rows += [record("snapkv", 0.5, i, 1.0, model=model) for i in range(3)]
        store(tmp_path / "runs" / model.replace("/", "-"), rows, model=model)
    found, _ = rows_of("runs", "--out", "out", folder=tmp_path)
    assert [row["model"] for row in found] == ["org/a", "org/a", "org/b", "org/b"]
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"recall-org-a-100-s0.png", "recall-org-b-100-s0.png"} <= pictures


def test_a_torn_line_is_dropped(tmp_path: Path) -> None:
    run = store(tmp_path / "r", full(4))
    file = next(run.glob("samples-*.jsonl"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    rows, _ = rows_of("r", folder=tmp_path)
    assert rows[0]["samples"] == 3


WRONG: list[Any] = [
    *(None, "", "x", True, -1, 0, 0.5, 2, 2**70, 1e308, math.nan, math.inf, "\ud800"),
    *([], [1], [[0, "x"]], [[5, 5], [-1, 2]], {}, {"a": {"b": [1]}}),
]


@pytest.mark.parametrize("name", [field.name for field in fields(Record)])
def test_a_field_of_another_type_is_named_with_its_line_or_does_no_harm(
    name: str, tmp_path: Path
) -> None:
    measured = {"prompt_tokens": 8, "new_tokens": 2, "timeline": [[0, 0], [8, 8], [8, 4], [10, 6]]}
    budgets = [(i, b) for i in range(3) for b in (0.3, 1)]
    rows = [*full(3), *(record("snapkv", b, i, b, **measured) for i, b in budgets)]
    lines = [to_line(row) for row in rows]
    for number, wrong in enumerate(WRONG):
        values = json.loads(lines[4])
        values |= {"fingerprint": f"{number}", "sample": number, name: wrong}
        lines.append(json.dumps(values).encode() + b"\n")
    file = tmp_path / "samples-x.jsonl"
    file.write_bytes(b"".join(lines))
    report = make_report([tmp_path])
    assert json.loads(to_json(report))
    assert render(report, [])
    refused = [text for text in report.damaged if "more like this" not in text]
    assert refused  # half of a surrogate pair, at least
    for text in refused:
        found = re.match(re.escape(f"left out: {file}, line ") + r"(\d+): not a record", text)
        assert found
        assert int(found[1]) > len(rows)


def test_nothing_but_damage(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "samples-x.jsonl").write_bytes(b"{}\n" * 9)
    said = refusal("r", folder=tmp_path)
    assert "r: nothing to report; left out: r/samples-x.jsonl, line 1: not a record" in said
    assert "and 4 more" in said


def test_nothing_to_report(tmp_path: Path) -> None:
    assert "no run in results" in refusal(folder=tmp_path)
    (tmp_path / "empty").mkdir()
    assert "holds no results" in refusal("empty", folder=tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text('{"common": {}, "invocations": []}')
    assert "no sample is finished yet" in refusal("begun", folder=tmp_path)
    store(tmp_path / "bare", [record("snapkv", 0.3, 0, 1.0)])
    assert "full attention has not been measured" in refusal("bare", folder=tmp_path)
    store(tmp_path / "failed", [record("full", 1.0, 0, None, error="out of memory")])
    assert "1 of 1 cells failed" in refusal("failed", folder=tmp_path)


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    store(tmp_path / "r", full(2))
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal("r", "--out", "file", folder=tmp_path)
    assert "cannot write to" in refusal("r", "--out", "/proc/none", folder=tmp_path)
    assert "--threshold" in refusal("r", "--threshold", "0", folder=tmp_path)


def test_only_full_attention(tmp_path: Path) -> None:
    store(tmp_path / "r", full(12))
    rows, _ = rows_of("r", folder=tmp_path)
    assert (rows[0]["critical_footprint"], rows[0]["ci_low"], rows[0]["best"]) == (1.0, 1.0, False)
    assert rows[0]["status"] == "reached"
