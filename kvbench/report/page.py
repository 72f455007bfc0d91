"""`report.html`: one file with a report's tables, pictures, settings and samples; no network.

Text that a model wrote is data. The templates escape it, the JSON of the samples cannot end its
script block, the page's script writes text and never markup, and a content security policy allows
no other script and no request. A notebook shows the overview of the same page.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pandas import concat

from kvbench.escape import plain
from kvbench.records import BASELINE
from kvbench.report.build import Curve, Report, Setting, by_critical, difference
from kvbench.report.tables import (
    costs,
    critical_text,
    interval_text,
    legend,
    mark,
    overview,
    percent,
    title,
)

HOME = Path(__file__).parent
MOST_TEXT = 4_000_000  # characters of samples in a page; a browser opens that at once
MOST_OF_A_TEXT = 2_000  # characters of one prediction or reference


@dataclass(frozen=True)
class Image:
    """A picture as the page shows it; `setting` is None for one over several tasks."""

    png: bytes
    caption: str
    setting: Setting | None

    @property
    def source(self) -> str:
        """The picture as a data URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def render(report: Report, images: Sequence[Image]) -> str:
    """Return the page."""
    script = (HOME / "report.js").read_text(encoding="utf-8")
    samples, shown, cut = _samples(report)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return _fill(
        "report.html.jinja",
        report,
        script=script,
        script_hash=f"sha256-{digest}",
        sections=[
            {
                "title": title(report, setting),
                "rows": _rows(report.of(setting)),
                "budgets": _budgets(report.of(setting)),
                "images": [image for image in images if image.setting == setting],
            }
            for setting in report.settings()
        ],
        images=[image for image in images if image.setting is None],
        runs=[_run(run) for run in report.runs],
        samples=samples,
        shown=shown,
        cut=cut,
        most=MOST_OF_A_TEXT,
    )


def render_notebook(report: Report) -> str:
    """Return HTML for a notebook: the overview, and the curves of all tasks."""
    from kvbench.report.figures import draw_pictures

    pictures = draw_pictures(report)
    if len(report.settings()) > 1:
        pictures = [p for p in pictures if p.setting is None and p.stem.startswith("all-tasks")]
    else:
        pictures = [p for p in pictures if p.setting is not None]
    images = [Image(p.files()[f"{p.stem}.png"], p.caption, None) for p in pictures]
    return _fill("notebook.html.jinja", report, images=images)


def _fill(template: str, report: Report, **values: Any) -> str:
    """Return a template with the overview of a report and further values."""
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(HOME),
        undefined=StrictUndefined,
        finalize=_plain,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        BASELINE=BASELINE,
        critical_text=critical_text,
        interval_text=interval_text,
        percent=percent,
    )
    grid = overview(report, lambda curve: curve)
    order = report.critical.groupby("label")["critical_footprint"].mean().sort_values().index
    rows = [(label, list(grid.loc[label])) for label in order]
    return environment.get_template(template).render(
        tasks=list(grid.columns), rows=rows, legend=legend(report), notes=report.notes, **values
    )


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _budgets(curves: Sequence[Curve]) -> list[float]:
    return sorted({p.budget for c in curves if c.method != BASELINE for p in c.points})


def _rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Return a setting's table: each curve, and by how much it is behind the best."""
    best = next((c for c in curves if c.best), None)
    curves = by_critical(curves)
    columns = costs(curves)
    rows = []
    for number, curve in enumerate(curves):
        against = None if best is None or curve.method == BASELINE else difference(curve, best)
        ends = against.interval if against else None
        rows.append(
            {
                "curve": curve,
                "mark": mark(curve),
                "behind": "" if against is None or curve.best else percent(against.value),
                "behind_value": "" if against is None else against.value,
                "behind_interval": ""
                if ends is None or curve.best
                else f"{percent(ends.low)} to {percent(ends.high)}",
                "costs": [(column.header, *column.cells[number]) for column in columns],
                "points": {point.budget: point for point in curve.points},
            }
        )
    return rows


def _run(run: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of run.json as (name, text) pairs for each block."""
    return {
        "folder": run["folder"],
        "common": _pairs(run["common"]),
        "invocations": [_pairs(invocation) for invocation in run["invocations"]],
    }


def _pairs(values: dict[str, Any], under: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _pairs(value, f"{under}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            pairs.append((under + name, text))
    return pairs


def _samples(report: Report) -> tuple[dict[str, Any], str, bool]:
    """Return the samples of the page, how many that are in words, and whether texts were cut.

    Samples are taken in order of index, one of each setting in turn and with all their cells, until
    the page has as much text as a browser opens at once.
    """
    settings = report.settings()
    sizes = []
    for number, setting in enumerate(settings):
        cells = concat([curve.cells[["drawn", "prediction"]] for curve in report.of(setting)])
        length = cells["prediction"].fillna("").str.len().clip(upper=MOST_OF_A_TEXT) + 60
        size = (length.groupby(cells["drawn"]).sum() + 600).reset_index(name="size")
        sizes.append(size.assign(setting=number, turn=range(len(size))))
    order = concat(sizes).sort_values(["turn", "setting"])
    taken = order[order["size"].cumsum() - order["size"] < MOST_TEXT]
    total = len(order)
    shown = f"all {total} samples"
    if len(taken) < total:
        shown = f"the first {len(taken)} of {total} samples"
    cutter = _Cutter()
    data = [
        _setting_data(report, setting, set(taken.loc[taken["setting"] == number, "drawn"]), cutter)
        for number, setting in enumerate(settings)
    ]
    return {"settings": data}, shown, cutter.used


class _Cutter:
    """Cuts long texts, and remembers whether it had to."""

    used = False

    def __call__(self, text: str) -> str:
        if len(text) <= MOST_OF_A_TEXT:
            return text
        self.used = True
        return f"{text[:MOST_OF_A_TEXT]} [... {len(text) - MOST_OF_A_TEXT:,} more characters]"


def _setting_data(
    report: Report, setting: Setting, wanted: set[int], cut: _Cutter
) -> dict[str, Any]:
    samples: dict[int | str, dict[str, Any]] = {}
    data = []
    names = ["budget", "sample", "seed", "score", "prediction", "subtask", "prompt_tail"]
    names.append("reference")
    for curve in report.of(setting):
        rows: dict[float, list[Any]] = {point.budget: [] for point in curve.points}
        cells = curve.cells[curve.cells["drawn"].isin(wanted)].sort_values("drawn")[names]
        for cell in cells.itertuples(False, None):
            budget, index, seed, score, text, subtask, tail, reference = cell
            index = index if isinstance(setting.seed, int) else f"{index}, seed {seed}"
            rows[budget].append([index, score, cut(text)])
            if index not in samples:
                if not isinstance(reference, str):
                    reference = json.dumps(reference, ensure_ascii=False)
                texts = {"tail": tail, "reference": cut(reference)}
                samples[index] = {"subtask": plain(subtask), **texts}
        budgets = [{"budget": budget, "cells": rows[budget]} for budget in sorted(rows)]
        data.append({"label": plain(curve.label), "budgets": budgets})
    return {"title": plain(title(report, setting)), "curves": data, "samples": samples}
