"""Writes a report to a folder: tables for programs, pictures, and the page.

Nothing is drawn if the folder holds the same report already: `.report.json` says what its files
were made from (records, settings, threshold, code) and their hashes.
"""

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import kvbench.escape
import kvbench.records
import kvbench.run_folder
from kvbench import escape
from kvbench.errors import InputError
from kvbench.files import as_bytes, read_regular, write_together
from kvbench.report.build import Report
from kvbench.report.figures import draw_pictures
from kvbench.report.page import Image, render
from kvbench.report.tables import to_csv

STAMP = ".report.json"
LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib", "jinja2")  # whose versions change the files


@dataclass(frozen=True)
class Published:
    """The files of a report, and whether they were written now or were there already."""

    folder: Path
    files: list[Path]
    written: bool

    @property
    def message(self) -> str:
        """One line for the user."""
        if not self.written:
            return f"{self.folder} is up to date: {len(self.files)} files, nothing was drawn again"
        return f"wrote {', '.join(path.name for path in self.files)} to {self.folder}"


def publish(report: Report, folder: Path) -> Published:
    """Write critical.csv, differences.csv, the pictures and report.html, unless they are there.

    Raises InputError if the folder cannot be written to.
    """
    made_from = _made_from(report)
    there = _up_to_date(folder, made_from)
    if there is not None:
        return Published(folder, there, written=False)
    files = _files(report)
    hashes = {name: hashlib.sha256(as_bytes(data)).hexdigest() for name, data in files.items()}
    stamp = json.dumps({"made_from": made_from, "files": hashes}, indent=1) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_together({folder / name: data for name, data in {**files, STAMP: stamp}.items()})
    except OSError as error:
        raise InputError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    return Published(folder, [folder / name for name in files], written=True)


def _files(report: Report) -> dict[str, str | bytes]:
    """Return the contents of every file of a report."""
    tables = {"critical.csv": to_csv(report), "differences.csv": escape.csv(report.differences)}
    files: dict[str, str | bytes] = dict(tables)
    images = []
    for picture in draw_pictures(report):
        drawn = picture.files()
        images.append(Image(drawn[f"{picture.stem}.png"], picture.caption, picture.setting))
        files |= drawn
    return {**files, "report.html": render(report, images)}


def _made_from(report: Report) -> str | None:
    """Return a hash of everything that could change a report's files, None if that is unknown."""
    if not report.source:
        return None
    total = hashlib.sha256(report.source.encode())
    modules = (kvbench.escape, kvbench.records, kvbench.run_folder)
    code = [Path(str(module.__file__)) for module in modules]
    code += Path(__file__).parent.rglob("*.*")
    for path in sorted(path for path in code if path.suffix in (".py", ".jinja", ".js")):
        total.update(path.name.encode() + path.read_bytes())
    for library in LIBRARIES:
        total.update(f"{library} {version(library)}".encode())
    return total.hexdigest()


def _up_to_date(folder: Path, made_from: str | None) -> list[Path] | None:
    """Return the files of a folder if they are a report made from the same, else None."""
    try:
        stamp = json.loads(read_regular(folder / STAMP))
        if made_from is None or stamp["made_from"] != made_from:
            return None
        files = {folder / str(name): digest for name, digest in stamp["files"].items()}
        unchanged = all(
            hashlib.sha256(read_regular(path)).hexdigest() == digest
            for path, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return list(files) if unchanged else None
