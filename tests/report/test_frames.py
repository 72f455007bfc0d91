"""The frames that a user gets, and which records count in them."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.records import record, store
from pandas import DataFrame
from pandas.testing import assert_frame_equal

from kvbench.errors import InputError
from kvbench.records import Record
from kvbench.report.build import Report, make_report, report_records
from kvbench.report.frames import frame_of, load_records
from kvbench.report.page import render_notebook
from kvbench.report.tables import print_summary, to_csv

OLD, NEW = "3f2a90bb1c", "77e0d1a4f2"


def rows_of(
    method: str, budgets: tuple[float, ...], samples: int, score: float, **changes: Any
) -> list[Record]:
    """Records of a method with one score at every budget."""
    return [record(method, b, i, score, **changes) for b in budgets for i in range(samples)]


def sign_flipped() -> list[Record]:
    """A run of 24 samples, and 8 samples of one budget after the method's sign was flipped."""
    old: dict[str, Any] = {"method_code": OLD, "finished": "2026-01-01T00:00:00"}
    new: dict[str, Any] = {"method_code": NEW, "finished": "2026-01-02T00:00:00"}
    return [
        *rows_of("full", (1.0,), 24, 1.0, method_code="f0f0"),
        *rows_of("keydiff", (0.3, 0.6, 0.9), 24, 0.95, **old),
        *rows_of("keydiff", (0.6,), 8, 0.1, **new),
    ]


def test_records_of_several_runs_are_one_frame(tmp_path: Path) -> None:
    store(tmp_path / "runs" / "a", [record("full", 1.0, 0, 1.0)])
    failed = record("snapkv", 0.3, 0, None, error="out of memory", kv_footprint=None, kv_peak=None)
    store(tmp_path / "runs" / "b", [record("snapkv", 0.3, 1, 0.5, prefill_chunk=8), failed])
    frame = load_records(tmp_path / "runs")
    names = ["seed" if f.name == "sample_seed" else f.name for f in fields(Record)]
    assert list(frame.columns) == [*names, "run"]
    assert sorted(frame["run"]) == ["a", "b", "b"]
    assert frame["prefill_chunk"].dtype == "Int64"
    assert frame["prefill_chunk"].isna().tolist() == [True, False, True]
    assert frame["score"].sum() == 1.5
    assert frame["error"].notna().sum() == 1
    assert frame["options"].tolist() == [{}, {}, {}]
    named = load_records(str(tmp_path / "runs" / "a"), tmp_path / "runs" / "b")
    assert_frame_equal(frame.sort_values("fingerprint"), named.sort_values("fingerprint"))


def test_records_need_a_folder_that_holds_some(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one run folder"):
        load_records()
    with pytest.raises(InputError, match="holds no results"):
        load_records(tmp_path)
    several: Any = [tmp_path, tmp_path]
    with pytest.raises(InputError, match=r"load_records\(FIRST, SECOND\)"):
        load_records(several)


def test_the_frames_of_a_report_have_the_documented_columns() -> None:
    report = report_records([*sign_flipped(), *rows_of("recency", (0.5,), 24, 0.9)], 0.9)
    documented = str(Report.__doc__)
    for frame in (report.points, report.critical, report.differences):
        assert len(frame)
        assert [name for name in frame.columns if f"`{name}`" not in documented] == []
    assert len(report.critical) == len(report.curves) == 4
    assert len(report.points) == sum(len(curve.points) for curve in report.curves)
    assert len(report.differences) == 3  # of three methods, full attention excepted
    (point,) = report.points[report.points["label"] == "recency"].to_dict("records")
    assert (point["budget"], point["score"]) == (0.5, pytest.approx(0.9))
    assert point["score_low"] < 0.9
    row = report.critical.set_index("label").loc["recency"]
    assert (row["critical_footprint"], row["status"]) == (0.5, "at_most")
    assert len(report.records) == len(sign_flipped()) + 24


def test_a_frame_of_a_report_without_pairs_has_its_columns_all_the_same() -> None:
    report = report_records(rows_of("full", (1.0,), 4, 1.0), 0.9)
    assert report.differences.empty
    assert "difference" in report.differences.columns


def test_a_frame_gives_the_same_report_as_records() -> None:
    rows = sign_flipped()
    assert report_records(frame_of(rows), 0.9).curves == report_records(rows, 0.9).curves


def test_old_and_new_code_of_a_method_are_two_curves() -> None:
    report = report_records(sign_flipped(), 0.9)
    curves = {curve.label: curve for curve in report.curves}
    assert list(curves) == ["full", "keydiff", "keydiff (older code 3f2a)"]
    new, old = curves["keydiff"], curves["keydiff (older code 3f2a)"]
    assert [(p.budget, p.samples) for p in new.points] == [(0.6, 8)]
    assert new.points[0].score == pytest.approx(0.1)
    assert [(p.budget, p.samples) for p in old.points] == [(0.3, 24), (0.6, 24), (0.9, 24)]
    assert all(point.score == pytest.approx(0.95) for point in old.points)
    assert (new.method_code, old.method_code) == (NEW, OLD)
    assert new.best
    assert not old.best  # older code takes no part in the comparison
    assert any("keydiff: measured with several versions" in note for note in report.notes)
    assert not any("measured more than once" in note for note in report.notes)
    lines = to_csv(report).splitlines()
    assert lines[0].startswith(
        "model,task,context,seed,compress,method,label,family,options,prefill_chunk,method_code,"
    )
    assert ",keydiff,keydiff (older code 3f2a)," in lines[-1]
    assert f",{OLD}," in lines[-1]


def test_the_newest_code_can_be_had_alone(tmp_path: Path) -> None:
    folder = store(tmp_path / "run", sign_flipped())
    report = make_report([folder], 0.9, latest=True)
    assert [curve.label for curve in report.curves] == ["full", "keydiff"]
    assert [point.samples for point in report.curves[1].points] == [8]
    assert "keydiff: 72 cells of older code of this method are left out" in report.notes
    assert ",label," in to_csv(report).splitlines()[0]


def test_records_without_a_code_are_told_apart_from_those_with_one() -> None:
    later = "2026-02-01T00:00:00"
    rows = [
        *rows_of("full", (1.0,), 12, 1.0),
        *rows_of("snapkv", (0.5,), 12, 0.2, prefill_chunk=8),
        *rows_of("snapkv", (0.5,), 12, 0.8, prefill_chunk=4, method_code=NEW, finished=later),
    ]
    report = report_records(rows, 0.9)
    assert [(curve.label, curve.name) for curve in report.curves[1:]] == [
        ("snapkv (chunk 4)", "snapkv"),
        ("snapkv (chunk 8, no code recorded)", "snapkv (no code recorded)"),
    ]


def test_the_baseline_of_a_setting_is_one_code_the_newest() -> None:
    later = "2026-02-01T00:00:00"
    rows = [
        *rows_of("full", (1.0,), 12, 0.2, method_code=OLD),
        *rows_of("full", (1.0,), 8, 1.0, method_code=NEW, finished=later),
        *rows_of("snapkv", (0.5,), 12, 1.0),
    ]
    report = report_records(rows, 0.9)
    assert [(curve.label, curve.samples) for curve in report.curves] == [("full", 8), ("snapkv", 8)]
    assert report.curves[0].baseline == 1.0
    assert "full: 12 cells of older code of this method are left out" in report.notes


def test_of_a_cell_measured_again_with_equal_code_the_latest_counts() -> None:
    again = rows_of("snapkv", (0.5,), 12, 0.9, finished="2026-02-01T00:00:00")
    rows = [*again, *rows_of("full", (1.0,), 12, 1.0), *rows_of("snapkv", (0.5,), 12, 0.1)]
    report = report_records(rows, 0.9)
    assert report.curves[1].points[0].score == pytest.approx(0.9)
    assert "12 cells were measured more than once; the latest counts" in report.notes


def test_two_windows_of_a_method_are_two_curves() -> None:
    rows = rows_of("full", (1.0,), 12, 1.0)
    for window in (16, 64):
        rows += rows_of("snapkv", (0.5,), 12, 0.9, options={"window": window, "kernel": 5})
    report = report_records(rows, 0.9)
    assert report.critical["label"].tolist() == ["full", "snapkv (window=16)", "snapkv (window=64)"]
    assert report.critical["options"].tolist()[1] == {"window": 16, "kernel": 5}


def test_the_summary_of_a_run_is_of_the_newest_code(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = [
        r for chunk in (8, 4) for r in rows_of("pyramid[b]kv", (0.3,), 2, 0.5, prefill_chunk=chunk)
    ]
    print_summary([*sign_flipped(), *chunks], {})
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["recall:", "score", "@", "KV", "footprint", "%"]
    assert ["full", "1.00@100"] in lines
    assert ["keydiff", "0.10@60"] in lines
    assert ["pyramid[b]kv", "(chunk", "8)", "0.50@30"] in lines


def test_reading_results_needs_no_torch(tmp_path: Path) -> None:
    store(tmp_path / "run", sign_flipped())
    program = (
        "import sys; from pathlib import Path; from kvbench.report.build import make_report; "
        "r = make_report([Path('run')]); r.records, r.points, r.critical, r.differences; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0


def test_a_notebook_shows_the_overview_escaped() -> None:
    rows = rows_of("full", (1.0,), 12, 1.0, task="<img src=x>")
    rows += rows_of("snapkv", (0.5,), 12, 1.0, task="<img src=x>", options={})
    shown = render_notebook(report_records(rows, 0.9))
    assert "<b>&lt;=50.0</b>" in shown
    assert "<img src=x>" not in shown
    assert shown.count('src="data:image/png;base64,') == 1
    assert isinstance(report_records(rows, 0.9).critical, DataFrame)


def test_older_code_of_a_task_is_left_out() -> None:
    rows = rows_of("full", (1.0,), 12, 1.0, task_code="b", finished="2026-02-02")
    rows += rows_of("snapkv", (0.5,), 12, 0.9, task_code="b", finished="2026-02-02")
    rows += rows_of("snapkv", (0.2,), 12, 0.0, task_code="a", finished="2026-01-01")
    report = report_records(rows, 0.9)
    assert set(report.points["budget"]) == {0.5, 1.0}
    assert any("12 cells of older code of this task" in note for note in report.notes)


def test_code_that_was_taken_back_is_current_again() -> None:
    rows = rows_of("full", (1.0,), 12, 1.0)
    rows += rows_of("knorm", (0.5,), 12, 0.2, method_code="aaaa", finished="2026-01-01")
    rows += rows_of("knorm", (0.5,), 12, 0.9, method_code="bbbb", finished="2026-02-02")
    run = {
        "folder": "r",
        "common": {"kvbench": "1"},
        "invocations": [
            {"started": "2026-02-02", "codes": {"method knorm": "bbbb"}},
            {"started": "2026-03-03", "codes": {"method knorm": "aaaa"}},
        ],
    }
    points = report_records(rows, 0.9, (run,), latest=True).points
    assert points[points["method"] == "knorm"]["score"].tolist() == [pytest.approx(0.2)]


def test_runs_of_different_code_are_not_reported_as_one() -> None:
    rows = rows_of("full", (1.0,), 12, 1.0)
    runs = tuple(
        {"folder": f"r{code}", "common": {"kvbench": code}, "invocations": []} for code in "12"
    )
    with pytest.raises(InputError, match="report them one by one"):
        report_records(rows, 0.9, runs)
