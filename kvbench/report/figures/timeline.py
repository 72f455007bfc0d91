"""Resident entries over rows, one panel per method: the area under the line is the footprint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from kvbench.records import BASELINE
from kvbench.report.build import Curve, known
from kvbench.report.figures.style import (
    BLACK,
    FONT,
    GREY,
    CurvesBySetting,
    Styles,
    chunk_sizes,
    label_axes,
    make_grid,
)
from kvbench.report.tables import percent

BUDGET = 0.3  # the measured budget nearest to it is drawn
ALIKE = 0.4  # per cent of full attention's entries: nearer timelines are drawn as one
WIDTH, MOST_LINES = 33, 3  # of a panel's title, in characters and lines

Line = list[tuple[float, float]]  # (rows, per cent of what full attention holds at the end)


@dataclass
class Panel:
    """The timeline of methods that hold the same, with what was measured of the first."""

    curves: list[Curve]
    line: Line
    kv_footprint: float
    kv_peak: float | None


def draw_timeline(curves: CurvesBySetting, styles: Styles) -> Figure | None:
    """Draw the first sample of the task with the longest answers, None if no timeline is recorded.

    Each panel shows full attention behind the methods whose caches hold the same.
    """
    firsts = {s: timed.iloc[0] for s, c in curves.items() if len(timed := _timed(c[0]))}
    if not firsts:
        return None
    setting = max(firsts, key=lambda s: known(firsts[s]["new_tokens"], int) or 0)
    whole = firsts[setting]
    methods = [c for c in curves[setting] if c.method != BASELINE]
    budgets = sorted({p.budget for c in methods for p in c.points if p.budget < 1})
    budget = min(budgets, key=lambda b: abs(b - BUDGET), default=BUDGET)
    most = max([1, *(entries for _, entries in whole["timeline"])])
    panels = _find_panels(methods, budget, whole["drawn"], most)
    if not panels:
        return None
    figure, axes_of_panels = make_grid(len(panels), 1.65, 1)
    prompt = known(whole["prompt_tokens"], int)
    full = np.array(_line(whole["timeline"], most)).T
    for axes, panel in zip(axes_of_panels, panels, strict=True):
        colour = styles[panel.curves[0].method].colour
        line = np.array(panel.line).T
        axes.fill_between(*full, color="#E4E4E4", linewidth=0)
        axes.plot(*full, color=GREY, linewidth=0.7)
        axes.fill_between(*line, color=colour, alpha=0.35, linewidth=0)
        axes.plot(*line, color=colour, linewidth=1.1)
        if prompt is not None and prompt < full[0].max():
            axes.axvline(prompt, color=BLACK, linewidth=0.7, linestyle=":")
        axes.set_xlim(0, full[0].max())
        axes.set_ylim(0, 104)
        axes.yaxis.set_major_locator(MultipleLocator(25))
        axes.yaxis.set_major_formatter("{x:g} %")
        names = _wrapped([curve.name for curve in panel.curves])
        peak = f", peak {percent(panel.kv_peak)} %" if panel.kv_peak is not None else ""
        axes.set_title(
            f"{names}\nfootprint {percent(panel.kv_footprint)} %{peak}",
            fontsize=FONT - 0.5,
            loc="left",
        )
    label_axes(axes_of_panels, "rows (tokens processed)", "resident entries")
    sizes = chunk_sizes(methods)
    chunk = f", prefill chunk {sizes[0]:,}" if sizes else ""
    seed = "" if isinstance(setting.seed, int) else f", seed {whole['seed']}"
    figure.suptitle(
        f"{setting.task}, sample {whole['sample']}{seed}, budget {budget:g}{chunk} "
        f"({Path(setting.model).name}). 100 %: full attention's last (grey); "
        "dotted: the prompt ends",
        fontsize=FONT + 0.5,
        x=0.01,
        ha="left",
    )
    return figure


def _find_panels(methods: Sequence[Curve], budget: float, drawn: int, most: float) -> list[Panel]:
    """Return the timelines of one sample at one budget, from the smallest footprint up."""
    panels: list[Panel] = []
    for curve in methods:
        timed = _timed(curve)
        cells = timed[(timed["budget"] == budget) & (timed["drawn"] == drawn)]
        for cell in cells.itertuples():
            line = _line(cell.timeline, most)
            same = next((panel for panel in panels if _alike(panel.line, line)), None)
            if same is None:
                peak = known(cell.kv_peak, float)
                panels.append(Panel([curve], line, cell.kv_footprint, peak))
            else:
                same.curves.append(curve)
    return sorted(panels, key=lambda panel: panel.kv_footprint)


def _timed(curve: Curve) -> Any:
    """Return the cells of a curve that have a timeline, by sample."""
    return curve.cells[curve.cells["timeline"].astype(bool)].sort_values("drawn")


def _line(timeline: Sequence[Sequence[int]], most: float) -> Line:
    return [(float(rows), 100 * entries / most) for rows, entries in timeline]


def _alike(left: Line, right: Line) -> bool:
    """Whether two timelines would be drawn on top of each other."""
    return len(left) == len(right) and all(
        a[0] == b[0] and abs(a[1] - b[1]) < ALIKE for a, b in zip(left, right, strict=True)
    )


def _wrapped(names: Sequence[str]) -> str:
    """Return names with commas, in lines; if that takes too many lines, the first and a count."""
    lines = [""]
    for name in [*(f"{name}," for name in names[:-1]), names[-1]]:
        if lines[-1] and len(lines[-1]) + 1 + len(name) > WIDTH:
            lines.append(name)
        else:
            lines[-1] = f"{lines[-1]} {name}".strip()
    if len(lines) > MOST_LINES:
        return f"{names[0]} and {len(names) - 1} more"
    return "\n".join(lines)
