"""Writes all of a report to a folder: tables for programs, pictures, and the page."""

from pathlib import Path

from kvbench.errors import InputError
from kvbench.records import write_atomically
from kvbench.report.build import Report
from kvbench.report.figures import draw_pictures, save_pictures
from kvbench.report.page import Image, render
from kvbench.report.tables import differences_csv, to_csv


def publish(report: Report, folder: Path) -> list[Path]:
    """Write critical.csv, differences.csv, the pictures and report.html; return their paths.

    Raises InputError where the folder cannot be written to.
    """
    pictures = draw_pictures(report)
    tables = {"critical.csv": to_csv(report), "differences.csv": differences_csv(report)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in tables.items():
            write_atomically(folder / name, text)
        drawn = save_pictures(pictures, folder)
        images = [
            Image((folder / f"{p.stem}.png").read_bytes(), p.caption, p.setting) for p in pictures
        ]
        write_atomically(folder / "report.html", render(report, images))
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    return [*(folder / name for name in tables), *drawn, folder / "report.html"]
