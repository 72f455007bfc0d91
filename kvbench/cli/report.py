"""`kvbench report`: tables, figures and a page of one or more runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from kvbench.cli import complete, options
from kvbench.cli.messages import say
from kvbench.cli.options import FOLDER, OUTPUT, opt
from kvbench.errors import BAD_INPUT
from kvbench.files import check_folder
from kvbench.sweep.command import RUNS

Form = Literal["table", "json", "csv", "markdown", "latex"]
EXAMPLES = options.examples(
    "kvbench report",
    "kvbench report results/runs/demo --threshold 0.95",
    "kvbench report first-run second-run --format markdown --out results/both",
)


def report(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            show_default="the latest run",
            help="Run folders, folders of runs, or names of runs in results/runs.",
            autocompletion=complete.runs,
        ),
    ] = None,
    threshold: options.Threshold = 0.9,
    latest: Annotated[
        bool,
        opt(OUTPUT, "Leave out records of older code of a method.", names=["--latest"], metavar=""),
    ] = False,
    form: Annotated[Form, opt(OUTPUT, "What to print.", names=["--format"])] = "table",
    out: Annotated[
        Path | None,
        opt(OUTPUT, "Folder for tables, figures and the page.", "the run's own", metavar=FOLDER),
    ] = None,
) -> int:
    """Show critical footprints; write tables, figures and a page."""
    from kvbench.run_folder import find_run_folders

    folders = find_run_folders(runs or (), RUNS)
    return write_report(folders, threshold=threshold, latest=latest, form=form, out=out)


def write_report(
    folders: Sequence[Path],
    *,
    threshold: float,
    latest: bool = False,
    form: Form = "table",
    out: Path | None = None,
) -> int:
    """Write the report of run folders and print it; the exit code, 2 if records are damaged."""
    from kvbench.report.build import make_report
    from kvbench.report.publish import publish
    from kvbench.report.tables import print_report

    folder = out or (folders[0] if len(folders) == 1 else RUNS.parent / "report")
    check_folder(folder)
    found = make_report(folders, threshold, latest=latest)
    published = publish(found, folder)
    print_report(found, form)
    for note in found.notes:
        say(note, name="note: ")
    say(published.message, name="")
    return BAD_INPUT if found.damaged else 0
