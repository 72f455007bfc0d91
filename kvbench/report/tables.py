"""A report as text: for the terminal, as JSON, CSV, Markdown and LaTeX."""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbench.records import BASELINE, Record
from kvbench.report.build import Critical, Curve, Report, Setting, by_critical, differences
from kvbench.report.statistics import Status

WIDTH_OF_A_FILE = 120  # columns, where stdout is no terminal

CSV_FIELDS = (
    *("model", "task", "context", "seed", "method", "family", "options", "prefill_chunk"),
    *("baseline", "threshold", "critical_footprint", "ci_low", "ci_high", "status"),
    *("critical_peak", "peak_ci_low", "peak_ci_high", "peak_status"),
    *("best", "tied_with_best", "samples"),
)
DIFFERENCE_FIELDS = (
    *("model", "task", "context", "seed", "left", "right"),
    *("difference", "ci_low", "ci_high", "distinct"),
)


def percent(value: float | None) -> str:
    """A fraction as per cent with one decimal, a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def critical_text(found: Critical | None) -> str:
    """A critical value in per cent: `<=` for at most, `~` for extrapolated."""
    if found is None:
        return "-"
    sign = {Status.AT_MOST: "<=", Status.EXTRAPOLATED: "~"}
    return sign.get(found.status, "") + percent(found.value)


def interval_text(found: Critical | None) -> str:
    """The 95 % interval in per cent."""
    ends = found.interval if found else None
    return "-" if ends is None else f"{percent(ends.low)}-{percent(ends.high)}"


def mark(curve: Curve) -> str:
    """`*` for the best of its setting, `=` for what cannot be told from it."""
    return "*" if curve.best else "=" if curve.tied else ""


def title(report: Report, setting: Setting) -> str:
    """One line over a table or picture: task, model, context, samples, baseline."""
    curve = report.of(setting)[0]
    return (
        f"{setting.task}: {setting.model}, {setting.context:,} tokens, seed {setting.seed}, "
        f"full attention scores {curve.baseline:.3f}"
    )


def legend(report: Report) -> str:
    """What the signs of a table mean."""
    return (
        f"Critical: the smallest KV footprint (or peak) that keeps {100 * report.threshold:g} % of "
        "full attention's score, with its 95 % interval. <= every budget measured keeps it; ~ none "
        "does, so it lies between the largest and full attention. * the best method; = not "
        "distinguishable from it (paired bootstrap over samples)."
    )


def print_tables(report: Report, console: Console) -> None:
    """One table per setting on the console: critical values, then score and footprint."""
    for setting in report.settings():
        table = Table(box=SIMPLE_HEAD, title=title(report, setting), title_justify="left")
        table.add_column("")
        table.add_column("method", no_wrap=True)
        table.add_column("footprint %", justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
        table.add_column("peak %", justify="right", no_wrap=True)
        table.add_column("samples", justify="right")
        table.add_column("score at footprint %", overflow="fold")
        for curve in by_critical(report.of(setting)):
            points = "  ".join(f"{p.score:.2f}@{100 * p.kv_footprint:.0f}" for p in curve.points)
            table.add_row(
                mark(curve),
                escape(curve.label),
                critical_text(curve.footprint),
                interval_text(curve.footprint),
                critical_text(curve.peak),
                str(curve.samples),
                points,
                style="bold" if curve.best else None,
            )
        console.print(table)
    console.print(legend(report), highlight=False)


def to_json(report: Report) -> str:
    """A list with one object per curve (DESIGN, commands)."""
    return json.dumps([curve.as_dict() for curve in report.curves], indent=2, allow_nan=False)


def to_csv(report: Report) -> str:
    """One line per curve, without its points."""
    rows = []
    for curve in report.curves:
        row = curve.as_dict()
        row["options"] = json.dumps(row["options"], sort_keys=True)
        rows.append(row)
    return _csv(CSV_FIELDS, rows)


def differences_csv(report: Report) -> str:
    """One line per pair of methods: by how much the left critical footprint is larger."""
    rows = []
    for setting in report.settings():
        for found in differences(report.of(setting)):
            ends = found.interval
            rows.append(
                {
                    **vars(setting),
                    "left": found.left.label,
                    "right": found.right.label,
                    "difference": found.value,
                    "ci_low": ends.low if ends else None,
                    "ci_high": ends.high if ends else None,
                    "distinct": found.distinct,
                }
            )
    return _csv(DIFFERENCE_FIELDS, rows)


def _csv(names: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@dataclass(frozen=True)
class Grid:
    """Methods by settings: critical footprints with their intervals, as texts."""

    header: list[str]
    rows: list[list[str]]


def _grid(report: Report, cell: Callable[[Curve], str]) -> Grid:
    settings = report.settings()
    labels = list(dict.fromkeys(curve.label for curve in report.curves))
    several = len({(s.model, s.context, s.seed) for s in settings}) > 1
    header = [f"{s.task} ({s.model}, {s.context}, {s.seed})" if several else s.task
              for s in settings]  # fmt: skip
    found = {(c.setting, c.label): cell(c) for c in report.curves}
    rows = [[label, *(found.get((s, label), "") for s in settings)] for label in labels]
    return Grid(["method", *header], rows)


def to_markdown(report: Report) -> str:
    """Critical footprints in per cent with their intervals, methods by tasks; the best in bold."""

    def cell(curve: Curve) -> str:
        text = critical_text(curve.footprint)
        ends = interval_text(curve.footprint)
        text = f"**{text}**" if curve.best else text + (" =" if curve.tied else "")
        return text if curve.method == BASELINE or ends == "-" else f"{text} ({ends})"

    grid = _grid(report, cell)
    lines = [grid.header, ["---", *["---:"] * (len(grid.header) - 1)], *grid.rows]
    body = "\n".join("| " + " | ".join(_markdown(c) for c in cells) + " |" for cells in lines)
    return f"{body}\n\n{legend(report).replace('* the best', 'Bold: the best')}"


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("~", "\\~")


def to_latex(report: Report) -> str:
    """Critical footprints in per cent, methods by tasks, for the booktabs package.

    Each method has a second line with the intervals, small; the best of a task is bold, and what
    cannot be told from it underlined.
    """

    def value(curve: Curve) -> str:
        text = _latex(critical_text(curve.footprint))
        if curve.best:
            return rf"\textbf{{{text}}}"
        return rf"\underline{{{text}}}" if curve.tied else text

    def ends(curve: Curve) -> str:
        text = interval_text(curve.footprint)
        if curve.method == BASELINE or text == "-":
            return ""
        return r"{\scriptsize " + text.replace("-", "--") + "}"

    grid, spread = _grid(report, value), _grid(report, ends)
    columns = "l" + "r" * (len(grid.header) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(map(_latex, grid.header))]
    lines.append(r"\midrule")
    for cells, below in zip(grid.rows, spread.rows, strict=True):
        lines.append(_row([_latex(cells[0]), *cells[1:]]))
        if any(below[1:]):
            lines.append(_row(["", *below[1:]]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


_LATEX = {
    **{character: "\\" + character for character in "_%&#${}"},
    "\\": r"\textbackslash{}",
    "~": r"$\approx$",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
}


def _latex(text: str) -> str:
    at_most = text.startswith("<=")
    rest = "".join(_LATEX.get(character, character) for character in text[2 * at_most :])
    return r"$\leq$" + rest if at_most else rest


def print_report(report: Report, form: str) -> None:
    """Write a report to stdout as `form`: table, json, csv, markdown or latex."""
    if form == "table":
        width = None if sys.stdout.isatty() else WIDTH_OF_A_FILE
        print_tables(report, Console(width=width))
        return
    text = {"json": to_json, "csv": to_csv, "markdown": to_markdown, "latex": to_latex}[form]
    print(text(report).rstrip("\n"))


def print_summary(records: Sequence[Record]) -> None:
    """Score and footprint of every method and budget, a table a task, on stdout."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
    for task in dict.fromkeys(r.task for r in records):
        of_task = [r for r in records if r.task == task]
        budgets = sorted({r.budget for r in of_task})
        table = Table(
            box=SIMPLE_HEAD, title=f"{task}: score @ KV footprint %", title_justify="left"
        )
        table.add_column("method", no_wrap=True)
        for budget in budgets:
            table.add_column(f"{budget:g}", justify="right", no_wrap=True)
        for method, chunk in dict.fromkeys((r.method, r.prefill_chunk) for r in of_task):
            several = len({r.prefill_chunk for r in of_task if r.method == method}) > 1
            row = []
            for budget in budgets:
                cells = [
                    r
                    for r in of_task
                    if (r.method, r.prefill_chunk, r.budget) == (method, chunk, budget)
                ]
                row.append(_mean_text(cells))
            table.add_row(f"{method} (chunk {chunk})" if several else method, *row)
        console.print(table)


def _mean_text(records: Sequence[Record]) -> str:
    if not records:
        return ""
    score = fmean(r.score or 0.0 for r in records)
    footprint = fmean(r.kv_footprint or 0.0 for r in records)
    return f"{score:.2f}@{100 * footprint:.0f}"
