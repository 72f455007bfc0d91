"""Costs beside the footprint (reads, answers, bytes read), and what methods knew of the question.

They are in the tables, the pictures and the page where methods differ in them, and only there.
"""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.records import record, store
from matplotlib.figure import Figure
from pandas import read_csv
from rich.console import Console

from kvbench.records import Record
from kvbench.report.build import Report, make_report, report_records
from kvbench.report.figures import draw_pictures
from kvbench.report.page import render
from kvbench.report.statistics import Status
from kvbench.report.tables import costs, legend, print_tables, to_csv, to_json, to_markdown

BUDGETS = (0.2, 0.6)
TOKEN = 1024 * 100  # bytes that full attention reads for a token


def full(samples: int = 12, **more: Any) -> list[Record]:
    """Records of full attention, whose answers have 10 tokens."""
    measured: dict[str, Any] = {"kv_reads": 1.0, "kv_bytes_read": TOKEN, "new_tokens": 10}
    rows: dict[str, Any] = {"resident_rows": 1000, "full_rows": 1000}
    return [record("full", 1.0, i, 1.0, **{**measured, **rows, **more}) for i in range(samples)]


def method(name: str, **more: Any) -> list[Record]:
    """Records of a method that fails below a budget of 0.6."""
    return [
        record(name, budget, i, float(budget > 0.5), **{"kv_reads": budget, **more})
        for budget in BUDGETS
        for i in range(12)
    ]


def quest(**more: Any) -> list[Record]:
    """Records of a method that holds everything and reads its budget."""
    held: dict[str, Any] = {"family": "dynamic sparsity", "kv_footprint": 1.0, "kv_peak": 1.0}
    return [
        record("quest", budget, i, float(budget > 0.5), **held, kv_reads=budget, **more)
        for budget in BUDGETS
        for i in range(12)
    ]


def headers(report: Report) -> list[str]:
    """The costs that are shown of the only setting."""
    return [column.header for column in costs(report.curves)]


def table(report: Report, width: int) -> str:
    """What a terminal of this width shows."""
    out = StringIO()
    print_tables(report, Console(file=out, width=width))
    return out.getvalue()


def labels(figure: Figure) -> list[str]:
    """The entries of a figure's legends."""
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_critical_reads_are_found_as_critical_footprints_are() -> None:
    report = report_records([*full(), *quest(), *method("snapkv")], 0.9)
    curves = {curve.method: curve for curve in report.curves}
    by_footprint = curves["snapkv"].footprint
    assert curves["quest"].reads is not None
    assert by_footprint is not None
    # snapkv's footprint is what quest reads, with the same scores
    assert curves["quest"].reads.value == pytest.approx(by_footprint.value)
    assert curves["quest"].reads.status is Status.REACHED
    assert curves["quest"].reads.interval is not None
    assert curves["quest"].footprint is not None
    assert curves["quest"].footprint.value == 1.0
    assert [x for x, _ in curves["quest"].fitted_reads] == pytest.approx([0.2, 0.6, 1.0])
    found = read_csv(StringIO(to_csv(report))).set_index("method")["critical_reads"]
    assert found["quest"] == pytest.approx(by_footprint.value)
    rows = {row["method"]: row for row in json.loads(to_json(report))}
    assert rows["quest"]["reads_status"] == "reached"
    assert rows["full"]["critical_reads"] == 1.0


def test_where_all_that_is_held_is_read_critical_reads_are_the_footprints() -> None:
    older = method("knorm", kv_reads=None)
    report = report_records([*full(), *method("snapkv"), *older], 0.9)
    for curve in report.curves:
        assert curve.reads is curve.footprint
        assert curve.fitted_reads == ()
    assert headers(report) == []
    assert "reads" not in table(report, 120)
    assert "reads" not in legend(report)


@pytest.mark.parametrize("width", [80, 120])
def test_tables_show_reads_answers_and_bytes_where_they_differ(width: int) -> None:
    few: dict[str, Any] = {"new_tokens": 10, "kv_bytes_read": TOKEN / 2}
    report = report_records([*full(), *quest(**few)], 0.9)
    assert headers(report) == ["critical reads %", "KiB read a token"]
    longer = method("tova", new_tokens=25, kv_bytes_read=TOKEN, family="eviction while decoding")
    report = report_records([*full(), *quest(**few), *longer], 0.9)
    shown = table(report, width)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "method critical reads % answer tokens KiB read a token" in lines
    assert "tova 56.0 25.0 100" in lines
    assert "full 100.0 10.0 100" in lines
    assert any(line.startswith("quest 5") and line.endswith(" 10.0 50.0") for line in lines)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "…" not in shown


def test_answers_within_a_tenth_are_not_told_apart() -> None:
    alike = method("snapkv", new_tokens=11, kv_bytes_read=TOKEN)
    assert headers(report_records([*full(), *alike], 0.9)) == []


def test_a_longer_answer_shows_the_footprint_of_full_attentions_own() -> None:
    longer: dict[str, Any] = {"family": "eviction while decoding", "new_tokens": 30}
    rows = method("h2o", **longer, resident_rows=900, full_rows=1800)
    report = report_records([*full(), *rows], 0.9)
    columns = {column.header: column.cells for column in costs(report.curves)}
    assert columns["% of full's own answer"] == [("100", 100.0), ("90.0", 90.0)]
    assert "answer of the same length" in legend(report)
    assert "answer of the same length" in to_markdown(report)
    assert "answer of the same length" not in legend(report_records([*full(), *quest()], 0.9))


def test_a_picture_has_a_dashed_line_against_reads() -> None:
    rows = [*full(), *quest(), *method("snapkv")]
    pictures = {p.stem: p for p in draw_pictures(report_records(rows, 0.9))}
    for stem in ("recall", "all-tasks"):
        figure = pictures[stem].figure
        assert {"quest", "quest, reads", "snapkv"} <= set(labels(figure))
        assert "snapkv, reads" not in labels(figure)
        axes = figure.axes[0]
        assert axes.get_xlabel() == "KV footprint or reads (share of full attention's)"
        lines = [(np.asarray(line.get_xdata()).tolist(), line) for line in axes.lines]
        held = next(line for x, line in lines if x == [100, 100, 100])
        against = [
            x for x, line in lines if line.is_dashed() and line.get_color() == held.get_color()
        ]
        assert against == [pytest.approx([20, 60, 100])]
        assert not held.is_dashed()
        assert "against reads" in pictures[stem].caption
    plain = {p.stem: p for p in draw_pictures(report_records([*full(), *method("snapkv")], 0.9))}
    assert "reads" not in plain["recall"].caption
    assert plain["recall"].figure.axes[0].get_xlabel().startswith("KV footprint (")


def test_the_page_has_the_same_columns_and_says_what_they_are() -> None:
    rows = [*full(), *quest(new_tokens=25), *method("snapkv")]
    page = render(report_records(rows, 0.9), [])
    for header in ("critical reads %", "answer tokens"):
        assert page.count(f"<th><button>{header}</button></th>") == 1
    assert '<td data-value="25.0">25.0</td>' in page
    assert '<td data-value="">-</td>' in page  # snapkv's answers were not recorded
    assert "critical reads are the smallest reads" in page
    plain = render(report_records([*full(), *method("snapkv")], 0.9), [])
    assert "critical reads" not in plain


def test_what_methods_knew_of_the_question_keeps_settings_apart(tmp_path: Path) -> None:
    rows = [row for how in ("prompt", "context") for row in full(compress=how)]
    rows += method("snapkv", compress="prompt")
    rows += [record("snapkv", b, i, 0.0, compress="context") for b in BUDGETS for i in range(12)]
    first = store(tmp_path / "a", [r for r in rows if r.compress == "prompt"], compress="prompt")
    second = store(tmp_path / "b", [r for r in rows if r.compress == "context"], compress="context")
    report = make_report([first, second], 0.9)
    assert [setting.compress for setting in report.settings()] == ["context", "prompt"]
    unknown, known = (report.of(setting)[-1] for setting in report.settings())
    assert (known.method, unknown.method) == ("snapkv", "snapkv")
    assert [p.score for p in known.points] == [0.0, 1.0]
    assert [p.score for p in unknown.points] == [0.0, 0.0]
    pictures = draw_pictures(report)
    curves = [p for p in pictures if p.setting is not None]
    assert [p.stem for p in curves] == ["recall-m-100-s0-context", "recall-m-100-s0"]
    titles = [str(p.figure.get_suptitle()) for p in curves]
    assert ["question unknown" in title for title in titles] == [True, False]
    over_all = [p.caption for p in pictures if p.stem.startswith("all-tasks")]
    assert ["question unknown" in caption for caption in over_all] == [True, False]
    assert "seed 0, question unknown, full attention scores" in table(report, 120)
    assert "recall (m, 100, 0, question unknown)" in to_markdown(report)
    page = render(report, [])
    assert page.count("m, 100 tokens, seed 0, question unknown") >= 1
