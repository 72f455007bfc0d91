"""A report as text: for the terminal, as JSON, CSV, Markdown and LaTeX."""

import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvbench.report import Curve, Report, Setting, Status
from kvbench.results import Record

WIDTH_OF_A_FILE = 120  # columns, where stdout is no terminal

CSV_FIELDS = (
    "model",
    "task",
    "context",
    "seed",
    "method",
    "family",
    "options",
    "prefill_chunk",
    "baseline",
    "threshold",
    "critical_footprint",
    "ci_low",
    "ci_high",
    "status",
    "samples",
)


def percent(value: float | None) -> str:
    """A fraction as per cent with one decimal, a dash for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def critical_text(curve: Curve) -> str:
    """The critical footprint in per cent: `<=` for at most, `~` for extrapolated."""
    sign = {Status.AT_MOST: "<=", Status.EXTRAPOLATED: "~"}
    return (sign.get(curve.status, "") if curve.status else "") + percent(curve.critical_footprint)


def interval_text(curve: Curve) -> str:
    """The 95 % interval in per cent."""
    return "-" if curve.ci_low is None else f"{percent(curve.ci_low)}-{percent(curve.ci_high)}"


def title(report: Report, setting: Setting) -> str:
    """One line over a table or picture: task, model, context, samples, baseline."""
    curve = report.of(setting)[0]
    return (
        f"{setting.task}: {setting.model}, {setting.context:,} tokens, seed {setting.seed}, "
        f"full attention scores {curve.baseline:.3f}"
    )


def print_tables(report: Report, console: Console) -> None:
    """One table per setting on the console: critical footprint, then score and footprint."""
    for setting in report.settings():
        curves = report.of(setting)
        threshold = curves[0].threshold
        table = Table(box=SIMPLE_HEAD, title=title(report, setting), title_justify="left")
        table.add_column("method", no_wrap=True)
        table.add_column("critical footprint %", justify="right")
        table.add_column("95 % interval", justify="right", no_wrap=True)
        table.add_column("samples", justify="right")
        table.add_column("score at footprint %", overflow="fold")
        for curve in by_critical(curves):
            points = "  ".join(f"{p.score:.2f}@{100 * p.kv_footprint:.0f}" for p in curve.points)
            table.add_row(
                curve.label,
                critical_text(curve),
                interval_text(curve),
                str(curve.points[0].samples),
                points,
            )
        console.print(table)
    if report.curves:
        console.print(
            f"Critical footprint: the smallest KV footprint that keeps {100 * threshold:g} % of "
            "full attention's score; <= every budget measured keeps it, ~ none does.",
            highlight=False,
        )


def by_critical(curves: Iterable[Curve]) -> list[Curve]:
    """Curves from the smallest critical footprint to the largest, unknown ones last."""
    return sorted(
        curves,
        key=lambda c: (c.critical_footprint is None, c.critical_footprint or 0, c.label),
    )


def to_json(report: Report) -> str:
    """A list with one object per curve (DESIGN, commands)."""
    return json.dumps([curve.as_dict() for curve in report.curves], indent=2)


def to_csv(report: Report) -> str:
    """One line per curve, without its points."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for curve in report.curves:
        row = curve.as_dict()
        row["options"] = json.dumps(row["options"], sort_keys=True)
        writer.writerow(row)
    return out.getvalue()


def _grid(report: Report) -> tuple[list[str], list[list[str]]]:
    """Methods by settings: header, and a row of critical footprints for each method."""
    settings = report.settings()
    labels = list(dict.fromkeys(curve.label for curve in report.curves))
    several = len({(s.model, s.context, s.seed) for s in settings}) > 1
    header = [f"{s.task} ({s.model}, {s.context}, {s.seed})" if several else s.task
              for s in settings]  # fmt: skip
    found = {(c.setting, c.label): critical_text(c) for c in report.curves}
    rows = [[label, *(found.get((s, label), "") for s in settings)] for label in labels]
    return ["method", *header], rows


def to_markdown(report: Report) -> str:
    """Critical footprints in per cent, methods by tasks."""
    header, rows = _grid(report)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def to_latex(report: Report) -> str:
    """Critical footprints in per cent, methods by tasks, for the booktabs package."""
    header, rows = _grid(report)
    body = [" & ".join(_latex(cell) for cell in cells) + r" \\" for cells in [header, *rows]]
    columns = "l" + "r" * (len(header) - 1)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", body[0], r"\midrule", *body[1:]]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex(text: str) -> str:
    if text.startswith("<="):
        text = r"$\leq$" + text[2:]
    elif text.startswith("~"):
        text = r"$\approx$" + text[1:]
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")


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
