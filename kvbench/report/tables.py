"""A report as text: for the terminal, as JSON, CSV, Markdown and LaTeX.

`kvbench/escape.py` escapes text from outside; the page escapes by its template (`page.py`).
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pandas import DataFrame
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvbench import escape
from kvbench.records import BASELINE, Record
from kvbench.report.build import (
    Critical,
    Curve,
    Report,
    Setting,
    by_critical,
    group_cells,
    labels_of,
    means_over_subtasks,
)
from kvbench.report.frames import as_text, frame_of, select
from kvbench.report.statistics import ROUNDING, Status

NOTICEABLE = 0.1  # costs that differ by more than this share of the smallest are shown

CSV_COLUMNS = [
    *("model", "task", "context", "seed", "compress", "method", "label", "family", "options"),
    *("prefill_chunk", "method_code"),
    *("baseline", "threshold", "critical_footprint", "ci_low", "ci_high", "status"),
    *("critical_peak", "peak_ci_low", "peak_ci_high", "peak_status"),
    *("critical_reads", "reads_ci_low", "reads_ci_high", "reads_status"),
    *("best", "tied_with_best", "samples"),
]


def percent(value: float | None) -> str:
    """Return a fraction as per cent with one decimal, a dash for None.

    Only what equals full attention is shown as 100: 99.97 is rounded down.
    """
    if value is None:
        return "-"
    text = f"{100 * value:.1f}"
    return "99.9" if text == "100.0" and value < 1 - ROUNDING else text


def score_text(score: float, kv_footprint: float) -> str:
    """Return a score and the footprint (per cent) that it was measured at."""
    return f"{score:.2f}@{percent(kv_footprint).removesuffix('.0')}"


def critical_text(found: Critical | None) -> str:
    """Return a critical value in per cent: `<=` for at most, `~` for extrapolated."""
    if found is None:
        return "-"
    sign = {Status.AT_MOST: "<=", Status.EXTRAPOLATED: "~"}
    return sign.get(found.status, "") + percent(found.value)


def interval_text(found: Critical | None) -> str:
    """Return the 95 % interval in per cent."""
    ends = found.interval if found else None
    return "-" if ends is None else f"{percent(ends.low)}-{percent(ends.high)}"


def mark(curve: Curve) -> str:
    """Return `*` for the best of a setting, `=` for one not distinguishable from it."""
    return "*" if curve.best else "=" if curve.tied else ""


def title(report: Report, setting: Setting) -> str:
    """Return one line for a table or picture: task, model, context, seed, baseline."""
    curve = report.of(setting)[0]
    return (
        f"{setting.task}: {setting.model}, {setting.context:,} tokens, {setting.seeds}"
        f"{setting.question}, "
        f"full attention scores {curve.baseline:.3f}"
    )


def legend(report: Report) -> str:
    """Return what the signs of a table mean, and what costs are shares of."""
    text = (
        "Critical footprint (peak): the smallest KV footprint (peak) at which a method keeps "
        f"{100 * report.threshold:g} % of full attention's score, with its 95 % interval. "
        "<= means that every measured budget keeps it: the true value may be smaller. ~ means that "
        "no measured budget keeps it: the value lies between the largest footprint measured and "
        "full attention. * marks the best method, = a method that cannot be distinguished from it "
        "(paired bootstrap over samples)."
    )
    if any(curve.fitted_reads for curve in report.curves):
        text += (
            " Reads are counted like the footprint, but only entries that a token reads count; "
            "critical reads are the smallest reads that keep the score."
        )
    if any("while decoding" in curve.family for curve in report.curves):
        text += (
            " A footprint is a share of what full attention holds with an answer of the same "
            "length, as in the paper. Where methods change the length of answers, "
            "footprint_of_full in the points is a share of what full attention holds with its own."
        )
    return text


@dataclass(frozen=True)
class CostColumn:
    """A cost beside the footprint: of each curve in order a text, and a number to sort by."""

    header: str
    cells: list[tuple[str, float | None]]


def costs(curves: Sequence[Curve]) -> list[CostColumn]:
    """Return the costs beside the footprint that differ noticeably between curves of a setting.

    Critical reads are there if a curve reads less than it holds. The others are means over the
    samples, from the smallest of a curve's budgets to the largest. The footprint of full
    attention's own answer is there where it differs from the footprint.
    """
    columns = []
    if any(curve.fitted_reads for curve in curves):
        found = [(critical_text(c.reads), c.reads.value if c.reads else None) for c in curves]
        columns.append(CostColumn("critical reads %", found))
    tokens = [[p.new_tokens for p in c.points if p.new_tokens is not None] for c in curves]
    read = [[p.kv_bytes_read / 1024 for p in c.points if p.kv_bytes_read] for c in curves]
    for header, values in (("answer tokens", tokens), ("KiB read a token", read)):
        means = [fmean(of_curve) for of_curve in values if of_curve]
        if means and max(means) > (1 + NOTICEABLE) * min(means):
            columns.append(CostColumn(header, [_span(of_curve) for of_curve in values]))
    known = [[p for p in c.points if p.footprint_of_full is not None] for c in curves]
    shares = [[(p.footprint_of_full or 0.0, p.kv_footprint) for p in points] for points in known]
    if any(abs(own - held) > NOTICEABLE * held for of_curve in shares for own, held in of_curve):
        spans = [_span([100 * own for own, _ in of_curve]) for of_curve in shares]
        columns.append(CostColumn("% of full's own answer", spans))
    return columns


def _span(values: Sequence[float]) -> tuple[str, float | None]:
    """Return the smallest and the largest of some values as a text, and their mean."""
    if not values:
        return "-", None
    ends = dict.fromkeys(
        f"{v:,.0f}" if v >= 100 else f"{v:.1f}" for v in (min(values), max(values))
    )
    return "-".join(ends), fmean(values)


def overview(report: Report, cell: Callable[[Curve], object]) -> DataFrame:
    """Return what `cell` says of each curve: a row for each label, a column for each setting."""
    settings = report.settings()
    several = len({(s.model, s.context, s.seed, s.compress) for s in settings}) > 1
    columns = {
        f"{s.task} ({s.model}, {s.context}, {s.seed}{s.question})" if several else s.task: {
            curve.label: cell(curve) for curve in report.of(s)
        }
        for s in settings
    }
    labels = list(dict.fromkeys(curve.label for curve in report.curves))
    return DataFrame(columns, index=labels).fillna("")


def print_tables(report: Report, console: Console) -> None:
    """Print one table per setting, with a table of other costs below it where these differ."""
    for setting in report.settings():
        table = Table(box=SIMPLE_HEAD, title=title(report, setting), title_justify="left")
        table.add_column("")
        table.add_column("method", no_wrap=True)
        table.add_column("footprint %", justify="right", no_wrap=True)
        table.add_column("95 % interval", justify="right", no_wrap=True)
        table.add_column("peak %", justify="right", no_wrap=True)
        table.add_column("samples", justify="right")
        table.add_column("score at footprint %", overflow="fold")
        curves = by_critical(report.of(setting))
        for curve in curves:
            points = "  ".join(score_text(p.score, p.kv_footprint) for p in curve.points)
            table.add_row(
                mark(curve),
                curve.label,
                critical_text(curve.footprint),
                interval_text(curve.footprint),
                critical_text(curve.peak),
                str(curve.samples),
                points,
                style="bold" if curve.best else None,
            )
        console.print(table)
        columns = costs(curves)
        if columns:
            console.print(_cost_table(setting, curves, columns))
    console.print(legend(report))


def _cost_table(setting: Setting, curves: Sequence[Curve], columns: Sequence[CostColumn]) -> Table:
    title = f"{setting.task}: costs beside the footprint"
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right")
    rows = zip(*(column.cells for column in columns), strict=True)
    for curve, cells in zip(curves, rows, strict=True):
        table.add_row(curve.label, *(text for text, _ in cells))
    return table


def to_json(report: Report) -> str:
    """Return a list with one object per curve: a row of `Report.critical`, with its points."""
    rows = [{**c.row(), "points": [point.as_dict() for point in c.points]} for c in report.curves]
    return json.dumps(rows, indent=2, allow_nan=False)


def to_csv(report: Report) -> str:
    """Return one line per curve, without its points; `label` joins it with `differences.csv`."""
    frame = report.critical.assign(options=report.critical["options"].map(as_text))
    return escape.csv(frame[CSV_COLUMNS])


def to_markdown(report: Report) -> str:
    """Return critical footprints in per cent with intervals, methods by tasks; the best in bold.

    Damaged records are named below.
    """

    def cell(curve: Curve) -> str:
        text = escape.markdown(critical_text(curve.footprint))
        ends = interval_text(curve.footprint)
        text = f"**{text}**" if curve.best else text + (" =" if curve.tied else "")
        return text if curve.method == BASELINE or ends == "-" else f"{text} ({ends})"

    grid = overview(report, cell)
    header = ["method", *map(escape.markdown, grid.columns)]
    rows = [[escape.markdown(label), *cells] for label, *cells in grid.itertuples()]
    text = escape.markdown(legend(report)).replace("\\* marks", "Bold marks")
    damaged = [f"- {escape.markdown(line)}" for line in report.damaged]
    return "\n".join([markdown_table(header, rows), "", text, *([""] if damaged else []), *damaged])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts that are Markdown already, the first column left-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def to_latex(report: Report) -> str:
    """Return critical footprints in per cent, methods by tasks, for the booktabs package.

    Each method has a second line with the intervals, small. The best of a task is bold; those not
    distinguishable from it are underlined.
    """

    def value(curve: Curve) -> str:
        text = escape.latex(critical_text(curve.footprint))
        if curve.best:
            return rf"\textbf{{{text}}}"
        return rf"\underline{{{text}}}" if curve.tied else text

    def ends(curve: Curve) -> str:
        text = interval_text(curve.footprint)
        if curve.method == BASELINE or text == "-":
            return ""
        return r"{\scriptsize " + text.replace("-", "--") + "}"

    values, spread = overview(report, value), overview(report, ends)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(values.columns)}}}",
        r"\toprule",
        _latex_row(["method", *map(escape.latex, values.columns)]),
        r"\midrule",
    ]
    for (label, *cells), (_, *below) in zip(values.itertuples(), spread.itertuples(), strict=True):
        lines.append(_latex_row([escape.latex(label), *cells]))
        if any(below):
            lines.append(_latex_row(["", *below]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def print_report(report: Report, form: str) -> None:
    """Print a report on stdout as `form`: table, json, csv, markdown or latex."""
    if form == "table":
        print_tables(report, escape.console())
        return
    text = {"json": to_json, "csv": to_csv, "markdown": to_markdown, "latex": to_latex}[form]
    print(text(report).rstrip("\n"))


def print_summary(records: Sequence[Record], codes: Mapping[str, str]) -> None:
    """Print score and footprint of every method and budget, one table per task, on stdout.

    Only the current code of each method and task counts; see `kvbench.run_folder.current_codes`.
    """
    console = escape.console()
    cells, _ = select(frame_of(records), True, codes)
    by_task = cells.groupby("task", sort=False)
    tasks = {str(task): (of_task, group_cells(of_task)) for task, of_task in by_task}
    peers = [group for _, groups in tasks.values() for group in groups]
    for task, (of_task, groups) in tasks.items():
        table = Table(
            box=SIMPLE_HEAD, title=f"{task}: score @ KV footprint %", title_justify="left"
        )
        table.add_column("method", no_wrap=True)
        budgets = sorted(of_task["budget"].unique())
        for budget in budgets:
            table.add_column(f"{budget:g}", justify="right", no_wrap=True)
        for group, label in zip(groups, labels_of(groups, peers, with_chunk=True), strict=True):
            means = means_over_subtasks(group.cells, ["score", "kv_footprint"])
            texts = {b: score_text(score, kv) for b, score, kv in means.itertuples()}
            table.add_row(label, *(texts.get(budget, "") for budget in budgets))
        console.print(table)
