"""Records as a pandas frame, and the rules for which of them count.

The report starts here: run folders become one frame of records, and `select` takes from it the
cells that curves are made of. The other frames (points, critical footprints, differences) are
properties of `kvbench.report.build.Report`, which documents their columns.

**Columns of the frame of records**, one row per cell: the fields of `kvbench.records.Record` under
their own names (see `docs/records.md`), except that `sample_seed` is called `seed` as in every
other frame, and `run`, the name of the run folder. Whole numbers that may be missing are `Int64`,
other numbers `float64`, and `options`, `reference` and `timeline` are Python objects.
"""

import gc
import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from pandas import DataFrame, Series

from kvbench.arguments import check_paths
from kvbench.errors import InputError
from kvbench.files import as_bytes
from kvbench.records import BASELINE, Damage, Record, read_folders, told
from kvbench.run_folder import END, find_run_folders, read_common

SETTING = ["model", "task", "context", "seed", "compress"]  # what the curves of one picture share
POOLED = [name for name in SETTING if name != "seed"]  # what their records share
CURVE = [*POOLED, "method", "options_text", "prefill_chunk", "method_code"]  # what a curve shares
SAMPLE = ["seed", "sample"]  # what is measured once for each budget of a curve
CODE_DIGITS = 4  # of a hash of a method's source, where a label names it

_ENCODER = json.JSONEncoder(sort_keys=True)
_TYPES: dict[Any, Any] = {
    int: "int64",
    float: "float64",
    int | None: "Int64",
    float | None: "float64",
    bool | None: object,
    str: None,  # whatever pandas takes for text
    str | None: None,
}


def load_records(*folders: str | Path) -> DataFrame:
    """Return the records of run folders, or of folders of run folders, as one frame.

    The module's docstring describes the columns. Failed cells are included; `error` is missing
    where a cell was measured. Damaged records are left out, with a warning that names their lines;
    of several records of a cell, the latest counts (`kvbench.records.read_folders`). Raises
    InputError if a folder holds no run.
    """
    check_paths("load_records", folders)
    if not folders:
        raise InputError("load_records: name at least one run folder")
    frame, damaged, notes = read_frame(folders)
    for text in (*told(damaged), *notes):
        warnings.warn(text, stacklevel=2)
    return frame


def read_frame(folders: Iterable[str | Path]) -> tuple[DataFrame, list[Damage], list[str]]:
    """As `load_records`; what is damaged is returned, and notes on cells that are there twice."""
    damaged: list[Damage] = []
    notes: list[str] = []
    collecting = gc.isenabled()
    gc.disable()  # the collector would walk over all rows again and again: a third of the time
    try:
        commons = {folder: read_common(folder) for folder in find_run_folders(folders, Path())}
        found = read_folders(commons, damaged, notes)
        runs = [as_bytes(file.parent.name).decode() for _, file in found]
        return _frame([record for record, _ in found], runs), damaged, notes
    finally:
        if collecting:
            gc.enable()


def frame_of(records: Iterable[Record]) -> DataFrame:
    """Return records that are in memory as such a frame; `run` is empty."""
    rows = list(records)
    return _frame(rows, [""] * len(rows))


def _frame(rows: list[Record], runs: list[str]) -> DataFrame:
    columns = {
        name: Series([getattr(row, name) for row in rows], dtype=_TYPES.get(kind, object))
        for name, kind in get_type_hints(Record).items()
    }
    return DataFrame({**columns, "run": runs}, copy=False).rename(columns={"sample_seed": "seed"})


def as_text(options: dict[str, Any]) -> str:
    """Return options as JSON with sorted keys: equal options give equal texts."""
    return _ENCODER.encode(options)


def select(
    records: DataFrame, latest: bool, codes: Mapping[str, str] | None = None
) -> tuple[DataFrame, list[str]]:
    """Return the cells that curves are made of, and notes on what was left out.

    Failed cells are left out. If a cell was measured more than once with the same code of its
    method, the latest counts. `codes` are the current codes of methods and tasks, as
    `kvbench.run_folder.current_codes` gives them; where they say nothing, the code that was
    measured last is current. Two columns are added: `options_text`, and `older`, whether a cell is
    of other than the current code of its method. Older cells are separate curves, or are left out
    if `latest`. Those of the baseline are always left out: a setting has one baseline. Cells of
    older code of a task are left out too: their samples or scores may differ.
    """
    notes = []
    cells = records[records["error"].isna()]
    failed = len(records) - len(cells)
    if failed:
        notes.append(
            f"{failed} of {len(records)} cells failed and are left out; "
            "'kvbench run' with the same settings measures them again"
        )
    # The latest first, so that the first row of a cell or of a method is its newest.
    cells = cells.sort_values("finished", ascending=False, kind="stable")
    cells["method_code"] = cells["method_code"].fillna("")
    cells["task_code"] = cells["task_code"].fillna("")
    changed = cells["task_code"] != _current(cells, "task", [], codes or {})
    for task, count in cells.loc[changed].groupby("task").size().items():
        notes.append(f"{task}: {count} cells of older code of this task are left out")
    cells = cells[~changed].copy()
    edited = _edited(cells, codes or {})
    for task, count in cells.loc[edited].groupby("task").size().items():
        notes.append(f"{task}: {count} cells of samples that were edited since are left out")
    cells = cells[~edited].copy()
    cells["older"] = cells["method_code"] != _current(cells, "method", ["method"], codes or {})
    left_out = cells["older"] & (latest | (cells["method"] == BASELINE))
    older = cells.loc[cells["older"], "method"].unique()
    for method in sorted(older):
        count = int((left_out & (cells["method"] == method)).sum())
        notes.append(
            f"{method}: {count} cells of older code of this method are left out"
            if count
            else f"{method}: measured with several versions of its code; each is a curve, the "
            "newest has the plain label (--latest shows it alone)"
        )
    cells = cells[~left_out]
    cells = cells.assign(options_text=cells["options"].map(as_text))
    again = cells.duplicated([*CURVE, "budget", *SAMPLE])
    if again.any():
        notes.append(f"{again.sum()} cells were measured more than once; the latest counts")
    return cells[~again].sort_index(), notes


def _current(
    cells: DataFrame, kind: str, keys: list[str], codes: Mapping[str, str]
) -> "Series[str]":
    """Return the current code of each cell's method or task (`kind`); the latest cells are first.

    The code that was asked for last counts only where it was measured.
    """
    by = [*POOLED, *keys]
    latest = cells.groupby(by)[f"{kind}_code"].transform("first")
    asked = cells[kind].map(lambda name: codes.get(f"{kind} {name}"))
    measured = cells.assign(same=cells[f"{kind}_code"] == asked).groupby(by)["same"]
    return asked.where(measured.transform("any"), latest)


def _edited(cells: DataFrame, codes: Mapping[str, str]) -> "Series[bool]":
    """Return whether each cell is of a sample that its task no longer reads as it was.

    The sample that was asked for last counts only where it was measured.
    """
    listed = {task: codes.get(f"samples {task}", "").split() for task in cells["task"].unique()}
    if not any(listed.values()):
        return Series(False, index=cells.index)
    wanted = Series(
        [
            each[sample] if sample < len(each) else END if END in each else None
            for each, sample in zip(cells["task"].map(listed), cells["sample"], strict=True)
        ],
        index=cells.index,
        dtype=object,
    )
    known = wanted.notna() & (cells["sample_code"].fillna("") != "")
    same = cells.assign(same=cells["sample_code"] == wanted)
    measured = same.groupby([*POOLED, "sample"])["same"].transform("any")
    gone = wanted == END
    return known & ~same["same"] & (measured | gone)


def code_name(method_code: str) -> str:
    """Return how a label names an older code of a method."""
    return f"older code {method_code[:CODE_DIGITS]}" if method_code else "no code recorded"
