"""What a Python user gets: a report that writes itself to a folder and shows itself in a notebook.

This is the door from Python, as `kvbench.cli.report` is the door from the command line.
"""

from dataclasses import fields
from pathlib import Path

from kvbench.arguments import check_paths, check_share
from kvbench.report import build
from kvbench.report.page import render_notebook
from kvbench.report.publish import publish
from kvbench.run_folder import find_run_folders
from kvbench.sweep.command import RUNS


class Report(build.Report):
    """Curves, critical footprints and differences of some runs; see `kvbench.report.build`."""

    def save(self, folder: str | Path) -> list[Path]:
        """Write tables, figures and `report.html` to a folder, unless they are there already.

        Returns the paths of the files. Raises InputError if the folder cannot be written to.
        """
        return publish(self, Path(folder)).files

    def _repr_html_(self) -> str:
        """Return the table and the figures that a notebook shows."""
        return render_notebook(self)


def report(*folders: str | Path, threshold: float = 0.9, latest: bool = False) -> Report:
    """Compute the report of run folders, or of folders of run folders.

    Args:
        folders: paths, or names in `results/runs`; without any, the run written to last.
        threshold: share of the baseline's score to keep, above 0 and at most 1.
        latest: leave out older code of each method instead of making it a curve of its own.

    Raises:
        InputError: there is no run, no measured cell, no baseline, or a record is damaged.
    """
    check_paths("report", folders)
    check_share("threshold", threshold)
    found = build.make_report(find_run_folders(folders, RUNS), threshold, latest=latest)
    return Report(**{each.name: getattr(found, each.name) for each in fields(found)})
