"""`kvbench reproduce`: the paper's table and claims, next to the paper's own values.

It runs a sweep, makes a report of it, and compares the report with the paper's Table 2. At small
scale the embedded model measures what `kvbench run` measures by default, on the generated tasks.
At full scale it measures what `full-scale.yaml` describes on task files (`full.py`); a rehearsal
does the same on a CPU with small made-up ones (`rehearsal.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pandas import DataFrame
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvbench import escape
from kvbench.errors import BAD_INPUT, InputError
from kvbench.files import write_together
from kvbench.models.card import EMBEDDED, read_card
from kvbench.records import BASELINE
from kvbench.registry import tasks as task_registry
from kvbench.report.build import Curve, Report, make_report
from kvbench.report.publish import publish
from kvbench.report.tables import (
    critical_text,
    interval_text,
    legend,
    mark,
    markdown_table,
)
from kvbench.reproduce.claims import Claim, Verdict, judge
from kvbench.reproduce.paper import THRESHOLD, paper_report, paper_table
from kvbench.sweep.command import COMPARED, Choices, default_tasks
from kvbench.sweep.progress import Listener
from kvbench.sweep.start import start

BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CHUNKS = (4, 8)  # the context is divided by these into prefill chunks; the paper uses a quarter
PAPER = {name: f"paper_{name}" for name in ("critical_footprint", "bound", "baseline")}
RUN = "run"  # the folder of the records, inside the output folder


@dataclass(frozen=True)
class Reproduction:
    """The result of a reproduction; all but the exit code is empty if the sweep was not made."""

    code: int  # exit code of the sweep
    out: Path
    report: Report | None = None
    table: DataFrame = field(default_factory=DataFrame)  # see `compare`
    claims: tuple[Claim, ...] = ()
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader must know first
    paper: str = "paper"  # heading of the paper's column


def reproduce_small(
    out: Path,
    *,
    samples: int,
    seed: int,
    threshold: float,
    workers: int = 1,
    listener: Listener | None = None,
) -> Reproduction:
    """Sweep the embedded model, or continue a sweep, and report it as `reproduced`."""
    choices = small_choices(out / RUN, samples=samples, seed=seed, workers=workers)
    return reproduced(choices, out, threshold, listener)


def reproduced(
    choices: Choices,
    out: Path,
    threshold: float,
    listener: Listener | None,
    notes: Sequence[str] = (),
    paper: str = "paper",
) -> Reproduction:
    """Make a sweep, or continue it, and write tables, claims, pictures and page to `out`.

    The records are in a folder in `out`, so that the same command continues an unfinished sweep.
    Nothing is written if the sweep is interrupted. Raises InputError.
    """
    result = start(choices, listener)
    if result.interrupted:
        return Reproduction(result.exit_code, out)
    report = make_report([result.folder], threshold, latest=True)
    report = replace(report, notes=(*notes, *report.notes))
    table = compare(report, paper_report(threshold))
    claims = judge(report)
    head = "".join(f"**{escape.markdown(note)}**\n\n" for note in (*notes, *report.damaged))
    texts = {
        "table.csv": table_csv(table),
        "table.md": head + table_markdown(table, report, paper),
        "claims.md": head + claims_markdown(claims, report),
    }
    published = publish(report, out)
    try:
        write_together({out / name: text for name, text in texts.items()})
    except OSError as error:
        raise InputError(
            f"cannot write to {out}: {error.strerror}; choose another --out"
        ) from error
    files = (*(out / name for name in texts), *published.files)
    code = result.exit_code or (BAD_INPUT if report.damaged else 0)
    return Reproduction(code, out, report, table, tuple(claims), files, tuple(notes), paper)


def small_choices(run: Path, *, samples: int, seed: int, workers: int = 1) -> Choices:
    """Return the choices of the sweep: what a run measures by default, and tasks that ship."""
    tasks = (
        n for n in default_tasks() if task_registry.get(n).__module__.startswith("kvbench.tasks.")
    )
    context = read_card(EMBEDDED["tiny"]).context
    return Choices(
        method=COMPARED,
        task=tuple(tasks),
        budgets=BUDGETS,
        samples=samples,
        prefill_chunk=tuple(context // part for part in CHUNKS),
        seed=seed,
        out=run,
        device="cpu",
        workers=workers,
    )


def compare(report: Report, paper: Report) -> DataFrame:
    """Return our methods and the paper's, one row per task, method and prefill chunk of ours.

    `paper` gives full attention's scores; critical footprints are those that the paper prints. The
    columns are those of table.csv (footprints in 0..1), and the texts `ours` and `theirs`.
    """
    ours = report.critical.assign(ours=[_ours_text(curve) for curve in report.curves])
    theirs = paper_table(report.threshold)
    printed = zip(theirs["critical_footprint"], theirs["bound"], strict=True)
    theirs = theirs.assign(theirs=[_paper_text(value, bound) for value, bound in printed])
    scores = paper.critical.groupby("task", as_index=False)["baseline"].first()
    theirs = theirs.merge(scores, on="task").rename(columns=PAPER)
    table = ours.merge(theirs, on=["task", "method"], how="outer")
    table = table[table["method"] != BASELINE]
    table = table.assign(
        not_ours=~table["task"].isin(ours["task"]),
        order=-table["prefill_chunk"].fillna(0),
        ours=table["ours"].fillna(""),
        theirs=table["theirs"].astype(object).fillna(""),
        samples=table["samples"].astype("Int64"),
    )
    return table.sort_values(["not_ours", "task", "method", "order"])


def table_csv(table: DataFrame) -> str:
    """Return one line per method, task and prefill chunk."""
    ours = ["critical_footprint", "ci_low", "ci_high", "status", "baseline", "samples"]
    return escape.csv(table[["task", "method", "prefill_chunk", *ours, *PAPER.values()]])


def _paper_text(critical_footprint: float, bound: str) -> str:
    """Return a value of the paper as it is printed."""
    return {"above": ">", "below": "<"}.get(bound, "") + f"{100 * critical_footprint:.0f}"


def _ours_text(curve: Curve) -> str:
    found = curve.footprint
    if found is None:
        return "not measurable"
    return f"{critical_text(found)} ({interval_text(found)}) {mark(curve)}".strip()


def _cells(table: DataFrame, task: str, paper: str) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of one task's table: a row per method, a column per prefill chunk."""
    of_task = table[table["task"] == task]
    chunks = sorted(of_task["prefill_chunk"].dropna().unique(), reverse=True)
    rows = []
    for method, cells in of_task.groupby("method"):
        by_chunk = dict(zip(cells["order"], cells["ours"], strict=True))
        ours = [by_chunk.get(-chunk, by_chunk.get(0, "")) for chunk in chunks]
        rows.append([str(method), *ours, cells["theirs"].iloc[0]])
    return ["method", *(f"ours, chunk {chunk}" for chunk in chunks), paper], rows


def table_markdown(table: DataFrame, report: Report, paper: str = "paper") -> str:
    """Return the paper's table of critical footprints with ours next to it, as Markdown."""
    parts = [
        "# Critical KV footprints, ours and the paper's\n",
        f"{_setting_text(report)} Per cent of full attention's footprint; in brackets the 95 % "
        f"interval. {escape.markdown(paper_text(report.threshold))} Model, context and tasks' data "
        "differ, so orders are to be compared, not values.\n",
        escape.markdown(legend(report)) + "\n",
    ]
    for task in table["task"].unique():
        header, rows = _cells(table, task, paper)
        ours = next((c for c in report.curves if c.setting.task == task), None)
        scores = f"full attention scores {ours.baseline:.3f} here" if ours else "not measured here"
        if ours and ours.baseline <= 0:
            scores += ", so that no critical footprint is measurable"
        parts.append(f"## {escape.markdown(task)}\n\n{scores}\n")
        escaped = [[escape.markdown(cell) for cell in row] for row in rows]
        parts += [markdown_table(header, escaped), ""]
    return "\n".join(parts)


def paper_text(threshold: float) -> str:
    """Return what the paper's column holds, in a sentence or two."""
    if paper_table(threshold).empty:
        return (
            "The paper (arXiv 2506.17121) prints its values at a threshold of "
            f"{THRESHOLD:g} only, so its column is empty."
        )
    return (
        "The paper's values are those of its Table 2 (arXiv 2506.17121: Llama-3.1-8B-Instruct, "
        "inputs of up to 128K tokens, of 12K to 38K for html_to_tsv, prefill chunks of 32K), as "
        "printed: whole per cent, without intervals; > where none of its budgets reaches the "
        "threshold, < where all do."
    )


def claims_markdown(claims: Sequence[Claim], report: Report) -> str:
    """Return the claims as a checklist in Markdown, each with its findings."""
    parts = [
        "# The paper's claims, on our data\n",
        f"{_setting_text(report)} A claim is ticked where it is true of every finding (or, where "
        "its rule says so, of some).\n",
    ]
    for claim in claims:
        tick = "x" if claim.verdict is Verdict.TRUE else " "
        parts.append(f"- [{tick}] **{claim.text}: {claim.verdict}**")
        parts.append(f"  Judged by: {escape.markdown(claim.rule)}.")
        parts += [
            f"  - {finding.verdict}: {escape.markdown(f'{finding.where}: {finding.what}')}"
            for finding in claim.findings
        ]
    return "\n".join([*parts, ""])


def _setting_text(report: Report) -> str:
    setting = report.settings()[0]
    return (
        f"Model {escape.markdown(setting.model)}, {setting.context:,} tokens, "
        f"{max(c.samples for c in report.curves)} samples a task, seed {setting.seed}, threshold "
        f"{report.threshold:g}."
    )


def print_table(
    table: DataFrame, claims: Sequence[Claim], threshold: float, paper: str = "paper"
) -> None:
    """Print the table of each task, and the claims' verdicts, on stdout."""
    console = escape.console()
    for task in table.loc[~table["not_ours"], "task"].unique():
        header, rows = _cells(table, task, paper)
        shown = Table(
            box=SIMPLE_HEAD, title=f"{task}: critical KV footprint, %", title_justify="left"
        )
        for index, name in enumerate(header):
            shown.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    console.print(paper_text(threshold))
    console.print("Claims of the paper, on these data:")
    for claim in claims:
        console.print(f"  {claim.verdict:12} {claim.text}")
