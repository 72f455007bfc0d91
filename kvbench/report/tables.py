"""A report as text: for the terminal, as JSON, CSV, Markdown and LaTeX.

Text from outside is escaped by one function per medium: rich's `escape` for the terminal,
`escape_markdown`, `escape_latex`. The page escapes by its template (`page.py`).
"""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from pandas import DataFrame
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbench.records import BASELINE, Record
from kvbench.report.build import (
    Critical,
    Curve,
    Report,
    Setting,
    by_critical,
    group_cells,
    labels_of,
)
from kvbench.report.frames import as_text, frame_of, select
from kvbench.report.statistics import ROUNDING, Status

WIDTH_OF_A_FILE = 120  # columns, if stdout is no terminal

CSV_COLUMNS = [
    *("model", "task", "context", "seed", "compress", "method", "label", "family", "options"),
    *("prefill_chunk", "method_code"),
    *("baseline", "threshold", "critical_footprint", "ci_low", "ci_high", "status"),
    *("critical_peak", "peak_ci_low", "peak_ci_high", "peak_status"),
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
        f"{setting.task}: {setting.model}, {setting.context:,} tokens, seed {setting.seed}"
        f"{setting.question}, "
        f"full attention scores {curve.baseline:.3f}"
    )


def legend(report: Report) -> str:
    """Return what the signs of a table mean."""
    return (
        "Critical footprint (peak): the smallest KV footprint (peak) at which a method keeps "
        f"{100 * report.threshold:g} % of full attention's score, with its 95 % interval. "
        "<= means that every measured budget keeps it: the true value may be smaller. ~ means that "
        "no measured budget keeps it: the value lies between the largest footprint measured and "
        "full attention. * marks the best method, = a method that cannot be distinguished from it "
        "(paired bootstrap over samples)."
    )


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


def console_of_stdout() -> Console:
    """Return rich's console on stdout, as wide as the terminal."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)


def print_tables(report: Report, console: Console) -> None:
    """Print one table per setting: critical values, then score and footprint."""
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
            points = "  ".join(score_text(p.score, p.kv_footprint) for p in curve.points)
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
    """Return a list with one object per curve: a row of `Report.critical`, with its points."""
    rows = [{**c.row(), "points": [point.as_dict() for point in c.points]} for c in report.curves]
    return json.dumps(rows, indent=2, allow_nan=False)


def to_csv(report: Report) -> str:
    """Return one line per curve, without its points; `label` joins it with `differences.csv`."""
    frame = report.critical.assign(options=report.critical["options"].map(as_text))
    return csv_text(frame[CSV_COLUMNS])


def csv_text(frame: DataFrame) -> str:
    """Return a frame as CSV, the same on every system."""
    return frame.to_csv(index=False, lineterminator="\n")


def to_markdown(report: Report) -> str:
    """Return critical footprints in per cent with intervals, methods by tasks; the best in bold."""

    def cell(curve: Curve) -> str:
        text = escape_markdown(critical_text(curve.footprint))
        ends = interval_text(curve.footprint)
        text = f"**{text}**" if curve.best else text + (" =" if curve.tied else "")
        return text if curve.method == BASELINE or ends == "-" else f"{text} ({ends})"

    grid = overview(report, cell)
    header = ["method", *map(escape_markdown, grid.columns)]
    rows = [[escape_markdown(label), *cells] for label, *cells in grid.itertuples()]
    text = escape_markdown(legend(report)).replace("\\* marks", "Bold marks")
    return f"{markdown_table(header, rows)}\n\n{text}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts that are Markdown already, the first column left-aligned."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def escape_markdown(text: str) -> str:
    """Return Markdown that shows the text as it is, in a table too."""
    signs = {"<=": "≤", ">=": "≥", "<": "&lt;", ">": "&gt;", "~": "\\~", "*": "\\*", "|": "\\|"}
    for sign, shown in signs.items():
        text = text.replace(sign, shown)
    return text


def to_latex(report: Report) -> str:
    """Return critical footprints in per cent, methods by tasks, for the booktabs package.

    Each method has a second line with the intervals, small. The best of a task is bold; those not
    distinguishable from it are underlined.
    """

    def value(curve: Curve) -> str:
        text = escape_latex(critical_text(curve.footprint))
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
        _latex_row(["method", *map(escape_latex, values.columns)]),
        r"\midrule",
    ]
    for (label, *cells), (_, *below) in zip(values.itertuples(), spread.itertuples(), strict=True):
        lines.append(_latex_row([escape_latex(label), *cells]))
        if any(below):
            lines.append(_latex_row(["", *below]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _latex_row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


_LATEX = {
    **{character: "\\" + character for character in "_%&#${}"},
    "\\": r"\textbackslash{}",
    "~": r"$\approx$",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
}


def escape_latex(text: str) -> str:
    """Return LaTeX that shows the text, with a leading `<=` as one sign."""
    at_most = text.startswith("<=")
    rest = "".join(_LATEX.get(character, character) for character in text[2 * at_most :])
    return r"$\leq$" + rest if at_most else rest


def print_report(report: Report, form: str) -> None:
    """Print a report on stdout as `form`: table, json, csv, markdown or latex."""
    if form == "table":
        print_tables(report, console_of_stdout())
        return
    text = {"json": to_json, "csv": to_csv, "markdown": to_markdown, "latex": to_latex}[form]
    print(text(report).rstrip("\n"))


def print_summary(records: Sequence[Record], codes: Mapping[str, str]) -> None:
    """Print score and footprint of every method and budget, one table per task, on stdout.

    Only the current code of each method and task counts; see `kvbench.records.current_codes`.
    """
    console = console_of_stdout()
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
            means = group.cells.groupby("budget")[["score", "kv_footprint"]].mean()
            texts = {b: score_text(score, kv) for b, score, kv in means.itertuples()}
            table.add_row(escape(label), *(texts.get(budget, "") for budget in budgets))
        console.print(table)
