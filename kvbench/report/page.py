"""`report.html`: one file with a report's tables, pictures, settings and samples; no network.

Whatever a model wrote is data: the template escapes it, the drill-down's JSON cannot end its script
block, the page's script writes text and never markup, and a content security policy lets no other
script run and nothing be fetched.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from kvbench.records import BASELINE
from kvbench.report.build import Curve, Report, Setting, by_critical, difference
from kvbench.report.tables import critical_text, interval_text, legend, mark, percent, title

TEMPLATE = "report.html.jinja"
SCRIPT = "report.js"
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
    """The page as text."""
    home = Path(__file__).parent
    environment = Environment(
        autoescape=True,
        loader=FileSystemLoader(home),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (home / SCRIPT).read_text(encoding="utf-8")
    samples, shown, cut = _samples(report)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template(TEMPLATE).render(
        script=script,
        script_hash=f"sha256-{digest}",
        legend=legend(report),
        notes=report.notes,
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


def _budgets(curves: Sequence[Curve]) -> list[float]:
    return sorted({p.budget for c in curves if c.method != BASELINE for p in c.points})


def _rows(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """A setting's table: texts, and the numbers that its columns are sorted by."""
    best = next((c for c in curves if c.best), None)
    rows = []
    for curve in by_critical(curves):
        against = None if best is None or curve.method == BASELINE else difference(curve, best)
        ends = against.interval if against else None
        rows.append(
            {
                "curve": curve,
                "mark": mark(curve),
                "critical": critical_text(curve.footprint),
                "critical_value": curve.footprint.value if curve.footprint else "",
                "interval": interval_text(curve.footprint),
                "peak": critical_text(curve.peak),
                "peak_value": curve.peak.value if curve.peak else "",
                "peak_interval": interval_text(curve.peak),
                "behind": "" if against is None or curve.best else percent(against.value),
                "behind_value": "" if against is None else against.value,
                "behind_interval": ""
                if ends is None or curve.best
                else f"{percent(ends.low)} to {percent(ends.high)}",
                "points": {point.budget: point for point in curve.points},
            }
        )
    return rows


def _run(run: dict[str, Any]) -> dict[str, Any]:
    """What run.json says, as (name, text) pairs for each block."""
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
    """The drill-down's data, how much of the samples it holds, and whether texts were cut.

    Samples are taken in order of index, from every setting in turn and with all their cells, until
    the page has as much text as a browser opens at once.
    """
    settings = report.settings()
    order = {setting: _indices(report.of(setting)) for setting in settings}
    taken: dict[Setting, list[int]] = {setting: [] for setting in settings}
    room = MOST_TEXT
    for turn in range(max((len(indices) for indices in order.values()), default=0)):
        for setting, indices in order.items():
            if turn < len(indices) and room > 0:
                taken[setting].append(indices[turn])
                room -= _text_size(report.of(setting), indices[turn])
    count, total = sum(map(len, taken.values())), sum(map(len, order.values()))
    shown = f"all {total} samples" if count == total else f"the first {count} of {total} samples"
    cutter = _Cutter()
    data = {"settings": [_setting_data(report, s, taken[s], cutter) for s in settings]}
    return data, shown, cutter.used


def _indices(curves: Sequence[Curve]) -> list[int]:
    return sorted({index for c in curves for cells in c.cells.values() for index in cells})


def _text_size(curves: Sequence[Curve], index: int) -> int:
    cells = [cells[index] for c in curves for cells in c.cells.values() if index in cells]
    return sum(60 + min(len(r.prediction or ""), MOST_OF_A_TEXT) for r in cells) + 600


class _Cutter:
    """Cuts long texts, and remembers whether it had to."""

    used = False

    def __call__(self, text: str) -> str:
        if len(text) <= MOST_OF_A_TEXT:
            return text
        self.used = True
        return f"{text[:MOST_OF_A_TEXT]} [... {len(text) - MOST_OF_A_TEXT:,} more characters]"


def _setting_data(
    report: Report, setting: Setting, indices: Sequence[int], cut: _Cutter
) -> dict[str, Any]:
    curves = report.of(setting)
    wanted = set(indices)
    samples: dict[int, dict[str, Any]] = {}
    data = []
    for curve in curves:
        budgets = []
        for budget, cells in sorted(curve.cells.items()):
            rows = []
            for index in sorted(wanted & cells.keys()):
                record = cells[index]
                rows.append([index, record.score, cut(record.prediction or "")])
                reference = record.reference
                if not isinstance(reference, str):
                    reference = json.dumps(reference, ensure_ascii=False)
                samples.setdefault(
                    index,
                    {
                        "subtask": record.subtask,
                        "tail": record.prompt_tail,
                        "reference": cut(reference),
                    },
                )
            budgets.append({"budget": budget, "cells": rows})
        data.append({"label": curve.label, "budgets": budgets})
    return {"title": title(report, setting), "curves": data, "samples": samples}
