"""The paper's table and figure, and its claims judged on made-up curves."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.records import record, store
from pandas import read_csv

from kvbench.report.build import Report, make_report, report_records
from kvbench.report.statistics import Status
from kvbench.reproduce.claims import Verdict, judge
from kvbench.reproduce.command import claims_markdown, compare, table_csv, table_markdown
from kvbench.reproduce.paper import paper_records, paper_report, paper_table
from kvbench.sweep.command import Choices, SweepResult
from kvbench.sweep.progress import Listener

RESULTS = Path(__file__).parents[2] / "results" / "reproduce"


def test_the_papers_figure_gives_the_papers_critical_footprints() -> None:
    found = {(c.setting.task, c.method): c for c in paper_report(0.9).curves}
    for method, percent, status in (
        ("prulong", 46.2, Status.REACHED),
        ("duoattention", 58.1, Status.REACHED),
        ("pyramidkv-patched", 63.7, Status.REACHED),
        ("pyramidkv-naive", 95.0, Status.EXTRAPOLATED),
    ):
        curve = found["recall", method]
        assert curve.footprint is not None
        assert 100 * curve.footprint.value == pytest.approx(percent, abs=0.5)
        assert curve.footprint.status is status
        assert curve.footprint.interval is None
        assert curve.peak is None
    assert len({task for task, _ in found}) == 8
    assert len(paper_records()) == sum(1 for c in found.values() for _ in c.points)


def printed() -> dict[tuple[str, str], tuple[float, str]]:
    """The paper's values and bounds, by task and method."""
    columns = ["task", "method", "critical_footprint", "bound"]
    rows = paper_table(0.9)[columns].itertuples(index=False)
    return {(task, method): (value, bound) for task, method, value, bound in rows}


def test_the_table_has_the_papers_printed_values() -> None:
    table = printed()
    assert len(table) == 32
    assert table["icl", "duoattention"] == (0.49, "")
    assert table["rerank", "duoattention"] == (0.69, "")
    assert table["rerank", "prulong"] == (0.61, "")
    # in the figure there are no points for these three
    assert table["longqa", "duoattention"] == (0.60, "")
    assert table["summ", "pyramidkv-naive"] == (0.53, "")
    assert table["travel_planning", "pyramidkv-naive"] == (0.98, "above")
    assert table["rag", "pyramidkv-patched"] == (0.34, "below")
    assert paper_table(0.8).empty


def test_the_figure_agrees_with_the_table_where_it_shows_the_crossing() -> None:
    table, compared = printed(), 0
    for curve in paper_report(0.9).curves:
        if (key := (curve.setting.task, curve.method)) not in table:
            continue  # full attention
        value, bound = table[key]
        assert curve.footprint is not None
        status = curve.footprint.status
        if status is Status.REACHED:
            assert curve.footprint.value == pytest.approx(value, abs=0.016)
            compared += 1
        # what the paper's signs mean
        assert bound != "above" or status is Status.EXTRAPOLATED
        assert bound != "below" or status is Status.AT_MOST
    assert compared == 20


def curves(**at: dict[int | None, list[float]]) -> list[Any]:
    """Records of full attention at 1.0, and of methods: prefill chunk -> scores at 0.1, 0.4, 0.9.

    Each sample's score is moved a little up or down, the same for all methods.
    """
    rows = [record("full", 1.0, i, 0.9 + 0.02 * (i % 3), task="recall") for i in range(30)]
    for name, by_chunk in at.items():
        method = name.replace("_", "-")
        for chunk, scores in by_chunk.items():
            for i in range(30):
                for budget, score in zip((0.1, 0.4, 0.9), scores, strict=True):
                    rows.append(
                        record(method, budget, i, score + 0.02 * (i % 3), prefill_chunk=chunk)
                    )
    return rows


def verdicts(folder: Path, **at: dict[int | None, list[float]]) -> list[Verdict]:
    report = make_report([store(folder, curves(**at))], 0.9)
    return [claim.verdict for claim in judge(report)]


def test_claims_are_true_of_curves_made_so(tmp_path: Path) -> None:
    found = verdicts(
        tmp_path / "r",
        snapkv={None: [0.1, 0.2, 0.3]},
        snapkv_naive={256: [0.1, 0.2, 0.5], 128: [0.0, 0.2, 0.5]},
        snapkv_patched={256: [0.1, 0.8, 0.9], 128: [0.1, 0.7, 0.9]},
        prulong={256: [0.4, 0.9, 0.9], 128: [0.1, 0.8, 0.9]},
        duoattention={256: [0.1, 0.5, 0.9], 128: [0.1, 0.4, 0.9]},
        recency={256: [0.0, 0.1, 0.1]},
    )
    assert found == [Verdict.TRUE] * 5 + [Verdict.NOT_MEASURED]


def test_claims_are_false_of_curves_made_the_other_way_round(tmp_path: Path) -> None:
    found = verdicts(
        tmp_path / "r",
        snapkv={None: [0.1, 0.85, 0.9]},
        snapkv_naive={256: [0.1, 0.8, 0.9]},
        snapkv_patched={256: [0.1, 0.2, 0.5]},
        prulong={256: [0.1, 0.4, 0.9], 128: [0.1, 0.4, 0.9]},
        duoattention={256: [0.4, 0.9, 0.9], 128: [0.4, 0.9, 0.9]},
        recency={256: [0.1, 0.85, 0.9]},
    )
    assert found == [Verdict.FALSE] * 5 + [Verdict.NOT_MEASURED]


def test_claims_are_undecided_where_the_intervals_do_not_tell(tmp_path: Path) -> None:
    even: dict[int | None, list[float]] = {256: [0.1, 0.6, 0.9]}
    rows = curves(snapkv_naive=even, snapkv_patched=even, prulong=even, duoattention=even)
    report = make_report([store(tmp_path / "r", rows)], 0.9)
    claims = {claim.text.split()[0]: claim.verdict for claim in judge(report)}
    assert claims["Patched"] is Verdict.UNDECIDED
    assert claims["PruLong"] is Verdict.NOT_MEASURED  # one prefill chunk only
    # both reach at every budget: the smaller one may be anywhere below
    low: dict[int | None, list[float]] = {256: [0.9, 0.9, 0.9]}
    rows = curves(prulong=low, duoattention={256: [0.1, 0.9, 0.9]})
    beats = judge(make_report([store(tmp_path / "s", rows)], 0.9))[2]
    assert beats.verdict is Verdict.TRUE
    rows = curves(duoattention=low, prulong={256: [0.1, 0.9, 0.9]})
    assert judge(make_report([store(tmp_path / "t", rows)], 0.9))[2].verdict is Verdict.FALSE


def test_methods_that_are_near_each_other_are_judged_where_they_differ(tmp_path: Path) -> None:
    few, many, even = [0.4, 0.9, 0.9], [0.1, 0.4, 0.9], [0.1, 0.6, 0.9]
    for chunks, expected in (
        ((few, many, even, even), Verdict.TRUE),
        ((even, even, many, few), Verdict.FALSE),
        ((few, many, many, few), Verdict.UNDECIDED),
        ((even, even, even, even), Verdict.UNDECIDED),
    ):
        here, there, here_128, there_128 = chunks
        rows = curves(prulong={256: here, 128: here_128}, duoattention={256: there, 128: there_128})
        claim = judge(report_records(rows, 0.9))[2]
        assert claim.verdict is expected
        assert [finding.where for finding in claim.findings] == [
            f"prulong and duoattention on recall, chunk {chunk}" for chunk in (256, 128)
        ]


def sparse(held: float, reads: dict[float, float]) -> Report:
    """The report of full attention and a method of dynamic sparsity, with its reads by budget."""
    measured: dict[str, Any] = {"family": "dynamic sparsity", "kv_footprint": held, "kv_peak": 1.0}
    rows = curves()
    for budget, read in reads.items():
        rows += [record("quest", budget, i, 0.9, kv_reads=read, **measured) for i in range(30)]
    return report_records(rows, 0.9)


def test_dynamic_sparsity_is_counted() -> None:
    report = sparse(1.0, {0.1: 0.1, 0.5: 0.5})
    claim = judge(report)[-1]
    assert claim.verdict is Verdict.TRUE
    assert "footprint 100.0 % at every budget" in claim.findings[0].what
    assert "reads of it 10.0 % at least" in claim.findings[0].what
    assert "not in this run" not in claims_markdown([claim], report)
    quest = report.curves[-1]
    assert quest.footprint is not None
    assert quest.footprint.value == 1.0


@pytest.mark.parametrize(
    ("held", "reads", "verdict"),
    [
        (1.0 - 1e-12, 0.3, Verdict.TRUE),
        (0.99, 0.3, Verdict.FALSE),
        (1.0, 1.0, Verdict.UNDECIDED),
    ],
)
def test_dynamic_sparsity_is_judged(held: float, reads: float, verdict: Verdict) -> None:
    claim = judge(sparse(held, {0.3: reads}))[-1]
    assert (claim.text, claim.verdict) == ("Dynamic sparsity saves no footprint", verdict)


def test_dynamic_sparsity_may_not_be_measured() -> None:
    (finding,) = judge(report_records(curves(snapkv={None: [0.1, 0.5, 0.9]}), 0.9))[-1].findings
    assert (finding.what, finding.verdict) == ("not in this run", Verdict.NOT_MEASURED)


def test_the_table_sets_ours_beside_the_papers(tmp_path: Path) -> None:
    rows = curves(prulong={256: [0.1, 0.9, 0.9], 128: [0.1, 0.5, 0.9]}, snapkv={None: [0.1] * 3})
    report = make_report([store(tmp_path / "r", rows)], 0.9)
    lines = compare(report, paper_report(0.9))
    text = table_markdown(lines, report)
    (row,) = [line for line in text.splitlines() if line.startswith("| prulong")][:1]
    assert row.endswith("| 46 |")
    assert row.count("(") == 2
    assert "| duoattention |  |  | 58 |" in text  # the paper's alone
    assert "| pyramidkv-naive |  |  | &gt;93 |" in text
    assert "| pyramidkv-patched | &lt;36 |" in text  # icl
    assert "Table 2" in text
    assert "whole per cent, without intervals; &gt; where none" in text
    assert "## travel_planning" in text
    csv = table_csv(lines).splitlines()
    assert csv[0].startswith("task,method,prefill_chunk,critical_footprint,ci_low,ci_high,status")
    assert sum(line.startswith("recall,prulong,") for line in csv) == 2
    assert sum(line.startswith("recall,snapkv,") for line in csv) == 1
    assert csv[0].endswith(",paper_critical_footprint,paper_bound,paper_baseline")
    assert all(line.endswith(",0.46,,0.951") for line in csv if line.startswith("recall,prulong,"))
    assert "recall,pyramidkv-naive,,,,,,,,0.93,above,0.951" in csv


def test_the_papers_column_is_empty_at_another_threshold(tmp_path: Path) -> None:
    rows = curves(prulong={256: [0.1, 0.9, 0.9]})
    report = make_report([store(tmp_path / "r", rows)], 0.8)
    text = table_markdown(compare(report, paper_report(0.8)), report)
    row = next(line for line in text.splitlines() if line.startswith("| prulong"))
    assert row.endswith("|  |")
    assert "at a threshold of 0.9 only, so its column is empty" in text
    assert "## icl" not in text


def test_reproduce_writes_tables_claims_and_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All after the sweep, which is the same function that `kvbench run` calls."""
    from kvbench.cli.reproduce import print_reproduction
    from kvbench.reproduce import command as reproduce

    seen = []

    def sweep(choices: Choices, listener: Listener) -> SweepResult:
        seen.append(choices)
        rows = curves(prulong={256: [0.1, 0.9, 0.9], 128: [0.1, 0.5, 0.9]})
        assert choices.out is not None
        store(choices.out, rows)
        # some cells failed: reported all the same
        return SweepResult(choices.out, len(rows), 0, failed=rows[:1])

    monkeypatch.setattr(reproduce, "start", sweep)
    how: Any = {"samples": 5, "seed": 3, "threshold": 0.9, "workers": 2}
    found = reproduce.reproduce_small(tmp_path / "out", **how)
    assert found.code == 1
    assert capsys.readouterr().out == ""
    print_reproduction(found)
    assert seen[0].prefill_chunk == (256, 128)
    assert seen[0].budgets == (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    assert (seen[0].samples, seen[0].seed, seen[0].workers) == (5, 3, 2)
    # What the paper compares, controls and dynamic sparsity, whatever plug-ins are installed.
    assert {"snapkv", "snapkv-patched", "prulong", "random-heads"} <= set(seen[0].method or ())
    measured = read_csv(RESULTS / "table.csv")["method"].dropna()
    assert set(seen[0].method or ()) == {*measured, "quest"}
    assert set(seen[0].task or ()) == {"recall", "rag", "rerank", "html_to_tsv"}
    for name in ("table.csv", "table.md", "claims.md", "report.html", "recall.pdf"):
        assert (tmp_path / "out" / name).stat().st_size > 0
        assert tmp_path / "out" / name in found.files
    claims = (tmp_path / "out" / "claims.md").read_text()
    assert "- [x] **PruLong depends on the size of the prefill chunk: true**" in claims
    assert claims.count("dynamic sparsity: not in this run") == 1
    printed = capsys.readouterr().out
    assert "not measured Recency eviction fails at recall" in printed

    interrupted = SweepResult(tmp_path / "no", 5, 0, interrupted=True)
    monkeypatch.setattr(reproduce, "start", lambda choices, listener: interrupted)
    stopped = reproduce.reproduce_small(tmp_path / "no", **how)
    assert (stopped.code, stopped.report, stopped.files) == (130, None, ())
    assert not (tmp_path / "no").exists()


def test_the_full_scale_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvbench.cli.app import main
    from kvbench.reproduce.full import FULL_SCALE, full_choices

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "kvbench", "reproduce", "--scale", "full"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert "cannot run here; missing:" in lines[0]
    assert any("the model meta-llama/Llama-3.1-8B-Instruct" in line for line in lines)
    assert any("json_kv" in line and "kvbench convert helmet CHECKOUT" in line for line in lines)
    assert any("kvbench convert longproc CHECKOUT" in line for line in lines)
    assert any("--option prulong.scores=FILE" in line for line in lines)
    assert "narrativeqa" not in done.stderr  # nobody judges it
    assert list(tmp_path.rglob("*.jsonl")) == []
    # the configuration holds options of kvbench run, and nothing else
    assert main(["run", "--config", str(FULL_SCALE), "--samples", "0"]) == 2
    errors = capsys.readouterr().err
    assert "--samples" in errors
    assert "unknown key" not in errors
    choices = full_choices(tmp_path, tmp_path / "data", options={}, judge=None)
    assert (choices.seed, choices.prefill_chunk) == (42, (32768, 131072, 8192))
    assert choices.option["prulong.window"] == "1024"
    assert choices.task is not None
    assert str(tmp_path / "data" / "longqa") in choices.task
    assert str(tmp_path / "data" / "summ") not in choices.task  # all of it is judged
    judged = full_choices(
        tmp_path, tmp_path, options={}, judge=("big", "http://host/v1"), method=("snapkv",)
    )
    assert len(judged.task or ()) == 8
    assert judged.option == {"snapkv.window": "64"}
