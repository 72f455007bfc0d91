"""From records to critical footprints, and the store that the records come from."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.records import record, store

import kvbench
from kvbench.errors import InputError
from kvbench.records import Record, from_line, read_records, to_line
from kvbench.report.build import make_report, report_records
from kvbench.report.statistics import Status
from kvbench.report.tables import percent, score_text, to_csv, to_json, to_latex, to_markdown
from kvbench.run_folder import RunWriter, find_run_folders


def curve_of(folder: Path, method: str, threshold: float = 0.9) -> Any:
    report = make_report([folder], threshold)
    return next(curve for curve in report.curves if curve.method == method)


def test_a_run_becomes_curves_with_intervals(tmp_path: Path) -> None:
    rows = []
    for sample in range(20):
        rows.append(record("full", 1.0, sample, 1.0))
        rows.append(record("snapkv", 0.2, sample, float(sample < 4)))
        rows.append(record("snapkv", 0.8, sample, 1.0))
    folder = store(tmp_path / "run", rows)
    curve = curve_of(folder, "snapkv")
    assert [(p.kv_footprint, p.score) for p in curve.points] == [
        (pytest.approx(0.2), pytest.approx(0.2)),
        (pytest.approx(0.8), 1.0),
    ]
    assert curve.footprint.value == pytest.approx(0.2 + 0.6 * 0.7 / 0.8)
    assert curve.footprint.interval.low < curve.footprint.value < curve.footprint.interval.high
    assert curve.footprint.status is Status.REACHED
    full = curve_of(folder, "full")
    assert (full.footprint.value, full.footprint.status, full.baseline) == (1, Status.REACHED, 1)
    report = make_report([folder], 0.9)
    assert len(json.loads(to_json(report))) == 2
    for export in (to_csv, to_markdown, to_latex):
        assert "snapkv" in export(report)


def test_the_best_is_no_worse_than_full_attention(tmp_path: Path) -> None:
    rows = [record("full", 1.0, i, 0.5) for i in range(4)]
    rows += [record("snapkv", b, i, 0.9) for i in range(4) for b in (0.2, 0.5)]
    curve = curve_of(store(tmp_path / "run", rows), "snapkv")
    assert (curve.footprint.value, curve.footprint.status) == (pytest.approx(0.2), Status.AT_MOST)
    assert curve.fitted[-1][1] > curve.baseline  # the curve's end is pooled with what is above it


def test_runs_that_are_odd_give_a_sensible_answer_or_a_line(tmp_path: Path) -> None:
    full = [record("full", 1.0, i, 1.0) for i in range(4)]
    half = store(tmp_path / "half", [*full, record("snapkv", 0.2, 0, 1.0)])
    assert curve_of(half, "snapkv").points[0].samples == 1
    nothing = store(
        tmp_path / "nothing",
        [record("full", 1.0, 0, 0.0), record("snapkv", 0.3, 0, 0.0)],
    )
    assert curve_of(nothing, "snapkv").footprint is None
    failed = store(
        tmp_path / "failed",
        [*full, record("snapkv", 0.3, 0, None, error="out of memory")],
    )
    report = make_report([failed], 0.9)
    assert [curve.method for curve in report.curves] == ["full"]
    assert "1 of 5 cells failed" in report.notes[0]
    with pytest.raises(InputError, match="full attention has not been measured"):
        make_report([store(tmp_path / "none", [record("snapkv", 0.2, 0, 1.0)])], 0.9)
    with pytest.raises(InputError, match="no run in"):
        find_run_folders([], tmp_path / "nowhere")


def test_two_models_are_two_settings(tmp_path: Path) -> None:
    for model in "ab":
        store(tmp_path / model, [record("full", 1.0, 0, 1.0, model=model)], model=model)
    report = make_report([tmp_path / "a", tmp_path / "b"], 0.9)
    assert [setting.model for setting in report.settings()] == ["a", "b"]


def test_a_record_survives_its_line() -> None:
    one = record("snapkv", 0.3, 7, 0.25, prediction='<script>"\n\u2028é')
    assert from_line(to_line(one)) == one
    assert to_line(one).count(b"\n") == 1


def test_a_torn_last_line_is_dropped_and_a_broken_one_named(tmp_path: Path) -> None:
    folder = store(tmp_path / "run", [record("full", 1.0, i, 1.0) for i in range(3)])
    file = next(folder.glob("samples-*.jsonl"))
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1])):
        file.write_bytes(whole[:-cut])
        assert len(read_records(folder)) == 2
    file.write_bytes(b"{}\n" + whole)
    with pytest.raises(InputError, match="line 1"):
        read_records(folder)


def test_a_measured_cell_beats_a_failed_one_and_counts_once(tmp_path: Path) -> None:
    good = record("full", 1.0, 0, 1.0)
    bad = record("full", 1.0, 0, None, error="x")
    bad = Record(**{**vars(bad), "fingerprint": good.fingerprint})
    folder = store(tmp_path / "run", [bad])
    store(folder, [good])
    store(folder, [good])
    assert len(list(folder.glob("samples-*.jsonl"))) == 3
    assert read_records(folder) == [good]


def test_nothing_appended_leaves_nothing_behind(tmp_path: Path) -> None:
    store(tmp_path / "a" / "b", [])
    assert list(tmp_path.iterdir()) == []
    store(tmp_path / "run", [record("full", 1.0, 0, 1.0)])
    with pytest.raises(InputError, match="other settings"):
        RunWriter(tmp_path / "run", {"model": "another"}, {})


def test_curves_that_would_share_a_label_are_told_apart() -> None:
    rows = [record("full", 1.0, i, 1.0, task=task) for i in range(3) for task in ("recall", "rag")]
    for i in range(3):
        for options in ({"window": 8}, {"window": "8"}, {"window": 16}):
            rows.append(record("snapkv", 0.5, i, 0.5, options=options))
        rows.append(record("snapkv", 0.5, i, 0.5, task="rag", options={"window": 8}))
    curves = report_records(rows).curves
    assert [(c.setting.task, c.label) for c in curves if c.method != "full"] == [
        # One window alone was measured on rag; its label says which, for recall has others.
        ("rag", "snapkv (window=8)"),
        ("recall", "snapkv (window=8)"),
        ("recall", "snapkv (window=16)"),
        ("recall", "snapkv (window=8) #2"),
    ]
    labels = [(c.setting, c.label) for c in curves]
    assert len(set(labels)) == len(labels)
    assert [c.name for c in curves] == [c.label for c in curves]


def test_a_share_below_one_is_never_shown_as_100() -> None:
    assert [percent(x) for x in (0.996, 0.9997, 1 - 1e-12, 1.0, 0.3)] == [
        *("99.6", "99.9", "100.0", "100.0", "30.0")
    ]
    assert score_text(0.83, 0.996) == "0.83@99.6"
    assert score_text(1.0, 1.0) == "1.00@100"


def test_a_report_is_one_short_line_in_a_console(tmp_path: Path) -> None:
    store(tmp_path / "r", [record("full", 1.0, i, 1.0) for i in range(12)])
    for shown in (make_report([tmp_path / "r"]), kvbench.report(tmp_path / "r")):
        assert repr(shown) == "Report(curves: 1, settings: 1, threshold: 0.9)"


def test_score_files_are_told_apart_by_the_beginning_of_their_hashes() -> None:
    from kvbench.report.build import _short

    assert _short("scores-prulong.json sha256:57a82c35336f") == "57a82c"
    assert _short(0.5) == "0.5"
