"""Resident entries over rows, one panel per method: the area under the line is the footprint."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from kvbench.records import BASELINE
from kvbench.report.build import Curve, Setting, known
from kvbench.report.figures.style import (
    BLACK,
    FONT,
    GREY,
    CurvesBySetting,
    label_axes,
    make_grid,
    style_of,
)

BUDGET = 0.3  # the measured budget nearest to it is drawn
ALIKE = 0.004  # of full attention's entries: nearer timelines are drawn as one
WIDTH, MOST_LINES = 33, 3  # of a panel's title, in characters and lines

Line = list[tuple[float, float]]  # (rows, share of what full attention holds at the end)


@dataclass
class Panel:
    """The timeline of methods that hold the same, with what was measured of the first."""

    curves: list[Curve]
    line: Line
    kv_footprint: float
    kv_peak: float | None


@dataclass(frozen=True)
class Timelines:
    """What the cache holds for one sample, under full attention and each method at one budget."""

    setting: Setting
    sample: int
    budget: float
    prompt: int | None  # tokens
    prefill_chunk: int | None
    full: Line
    panels: list[Panel]


def find_timelines(curves: CurvesBySetting) -> Timelines | None:
    """Return the timelines to draw: the first sample of the task with the longest answers.

    Methods whose caches hold the same share a panel. None if no timeline was recorded.
    """
    firsts = {s: timed.iloc[0] for s, c in curves.items() if len(timed := _timed(c[0]))}
    if not firsts:
        return None
    setting = max(firsts, key=lambda s: known(firsts[s]["new_tokens"], int) or 0)
    whole = firsts[setting]
    methods = [c for c in curves[setting] if c.method != BASELINE]
    budgets = sorted({p.budget for c in methods for p in c.points if p.budget < 1})
    if not budgets:
        return None
    budget = min(budgets, key=lambda b: abs(b - BUDGET))
    most = max(entries for _, entries in whole["timeline"])
    panels: list[Panel] = []
    for curve in methods:
        timed = _timed(curve)
        cells = timed[(timed["budget"] == budget) & (timed["sample"] == whole["sample"])]
        for cell in cells.itertuples():
            line = _line(cell.timeline, most)
            same = next((panel for panel in panels if _alike(panel.line, line)), None)
            if same is None:
                panels.append(Panel([curve], line, cell.kv_footprint, known(cell.kv_peak, float)))
            else:
                same.curves.append(curve)
    if not panels:
        return None
    return Timelines(
        setting,
        whole["sample"],
        budget,
        known(whole["prompt_tokens"], int),
        next((c.prefill_chunk for c in methods if c.prefill_chunk is not None), None),
        _line(whole["timeline"], most),
        sorted(panels, key=lambda panel: panel.kv_footprint),
    )


def _timed(curve: Curve) -> Any:
    """Return the cells of a curve that have a timeline, by sample."""
    return curve.cells[curve.cells["timeline"].astype(bool)].sort_values("sample")


def _line(timeline: Sequence[Sequence[int]], most: float) -> Line:
    return [(float(rows), entries / most) for rows, entries in timeline]


def _alike(left: Line, right: Line) -> bool:
    """Whether two timelines would be drawn on top of each other."""
    return len(left) == len(right) and all(
        a[0] == b[0] and abs(a[1] - b[1]) < ALIKE for a, b in zip(left, right, strict=True)
    )


def draw_timeline(lines: Timelines) -> Figure:
    """Draw one panel per timeline, with full attention's behind it."""
    figure, axes_of_panels = make_grid(len(lines.panels), 1.65, 1)
    rows = max(x for x, _ in lines.full)
    for axes, panel in zip(axes_of_panels, lines.panels, strict=True):
        colour = style_of(panel.curves[0].method).colour
        axes.fill_between(*_columns(lines.full), color="#E4E4E4", linewidth=0)
        axes.plot(*_columns(lines.full), color=GREY, linewidth=0.7)
        axes.fill_between(*_columns(panel.line), color=colour, alpha=0.35, linewidth=0)
        axes.plot(*_columns(panel.line), color=colour, linewidth=1.1)
        if lines.prompt is not None and lines.prompt < rows:
            axes.axvline(lines.prompt, color=BLACK, linewidth=0.7, linestyle=":")
        axes.set_xlim(0, rows)
        axes.set_ylim(0, 104)
        axes.yaxis.set_major_locator(MultipleLocator(25))
        axes.yaxis.set_major_formatter("{x:g} %")
        names = _wrapped([curve.name for curve in panel.curves])
        peak = f", peak {100 * panel.kv_peak:.0f} %" if panel.kv_peak is not None else ""
        axes.set_title(
            f"{names}\nfootprint {100 * panel.kv_footprint:.0f} %{peak}",
            fontsize=FONT - 0.5,
            loc="left",
        )
    label_axes(axes_of_panels, "rows (tokens processed)", "resident entries")
    chunk = f", prefill chunk {lines.prefill_chunk:,}" if lines.prefill_chunk else ""
    figure.suptitle(
        f"{lines.setting.task}, sample {lines.sample}, budget {lines.budget:g}{chunk} "
        f"({Path(lines.setting.model).name}). 100 %: full attention's last (grey); "
        "dotted: the prompt ends",
        fontsize=FONT + 0.5,
        x=0.01,
        ha="left",
    )
    return figure


def _columns(line: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return rows, and shares in per cent."""
    pairs = list(line)
    return [x for x, _ in pairs], [100 * y for _, y in pairs]


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
