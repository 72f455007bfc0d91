"""Score against KV footprint: one picture per task, and one grid over all tasks."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from kvbench.records import BASELINE
from kvbench.report.build import Curve, Setting
from kvbench.report.figures.style import (
    BLACK,
    GREEN,
    GREY,
    CurvesBySetting,
    Style,
    Styles,
    chunk_sizes,
    footprint_axis,
    label_axes,
    legend_below,
    legend_beside,
    light_axes,
    make_panels,
    with_chunk,
)

MOST_CURVES_WITH_BANDS = 16  # more bands cannot be told apart
_LINES = ("-", "--", "-.", ":")  # of further variants of a method
_DASHES = (0, (5, 3))  # of the threshold
_READS = (0, (2, 1.5))  # dashes of the curve against reads
Y_LABEL = "score"


def draw_task(curves: Sequence[Curve], setting: Setting, styles: Styles) -> Figure:
    """Draw one task, with a panel for each prefill chunk."""
    sizes: list[int | None] = list(chunk_sizes(curves)) or [None]
    figure = Figure(figsize=(3.0 + 4.6 * len(sizes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    entries: dict[str, Line2D] = {}
    families: dict[str, dict[str, None]] = {}
    for axes, size in zip(panels, sizes, strict=True):
        light_axes(axes)
        shown = [c for c in with_chunk(curves, size) if c.method != BASELINE]
        entries = _draw_curves(axes, shown, curves[0], styles, scale=1.0) | entries
        for curve in shown:
            names = families.setdefault(curve.family, {})
            names |= dict.fromkeys(_names(curve))
        axes.set_xlabel(_x_label(shown))
        if len(sizes) > 1:
            axes.set_title(f"prefill chunk {size:,}", fontsize=10, loc="left")
    panels[0].set_ylabel(Y_LABEL)
    samples = f"{curves[0].samples} samples" if curves[0].samples > 1 else "1 sample"
    figure.suptitle(
        f"{setting.task} ({Path(setting.model).name}, {setting.context:,} tokens"
        f"{setting.question}, {samples})",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    groups = {"baseline": _baseline_handles(curves[0].threshold)}
    groups |= {family: [entries[name] for name in names] for family, names in families.items()}
    legend_beside(figure, groups)
    return figure


def draw_grid(curves: CurvesBySetting, styles: Styles) -> Figure:
    """Draw all tasks of one prefill chunk, for a paper's full width."""
    shown = {s: [c for c in of_task if c.method != BASELINE] for s, of_task in curves.items()}
    names = {name for of_task in shown.values() for curve in of_task for name in _names(curve)}
    figure, panels = make_panels(curves, 2.0, 2 + math.ceil(len(names) / 4))
    entries: dict[str, Line2D] = {}
    for axes, (setting, of_task) in zip(panels, curves.items(), strict=True):
        entries |= _draw_curves(axes, shown[setting], of_task[0], styles, scale=0.62)
    label_axes(panels, _x_label(c for of_task in shown.values() for c in of_task), Y_LABEL)
    threshold = next(iter(curves.values()))[0].threshold
    legend_below(figure, [*_baseline_handles(threshold), *entries.values()])
    return figure


def _draw_curves(
    axes: Axes, shown: Sequence[Curve], full: Curve, styles: Styles, scale: float
) -> dict[str, Line2D]:
    """Draw curves, the baseline, the threshold and critical footprints; return legend handles."""
    baseline, target = full.baseline, full.threshold * full.baseline
    handles: dict[str, Line2D] = {}
    variants: Counter[str] = Counter()
    for curve in shown:
        style = styles[curve.method]
        variant = variants[curve.method]
        variants[curve.method] += 1
        line = style.line if variant == 0 else _LINES[variant % len(_LINES)]
        width = 1.3 * scale
        marks = style.marks(5 * scale, 0.9 * scale)
        axes.plot(*_in_percent(curve.fitted), color=style.colour, linestyle=line, linewidth=width)
        measured = _in_percent([(p.kv_footprint, p.score) for p in curve.points])
        axes.plot(*measured, **marks, linestyle="none", clip_on=False, zorder=4)
        if len(shown) <= MOST_CURVES_WITH_BANDS:
            _draw_band(axes, curve, style)
        if curve.footprint is not None:
            axes.plot(
                100 * curve.footprint.value,
                target,
                color=style.colour,
                marker="|",
                markersize=11 * scale,
                markeredgewidth=2.2 * scale,
                zorder=5,
            )
        handles[curve.name] = Line2D(
            [], [], **marks, linestyle=line, linewidth=width, label=curve.name
        )
        if curve.fitted_reads:
            dashed: dict[str, Any] = {"linestyle": _READS, "linewidth": width}
            axes.plot(*_in_percent(curve.fitted_reads), color=style.colour, **dashed)
            read = [(p.kv_reads, p.score) for p in curve.points if p.kv_reads is not None]
            axes.plot(*_in_percent(read), **marks, linestyle="none", clip_on=False, zorder=4)
            _, name = _names(curve)
            handles[name] = Line2D([], [], **marks, **dashed, label=name)
    axes.axhline(baseline, color=BLACK, linewidth=1 * scale, zorder=1)
    axes.axhline(target, color=BLACK, linewidth=0.9 * scale, linestyle=_DASHES, zorder=1)
    axes.axhspan(target, max(1.0, baseline), color=GREEN, alpha=0.07, linewidth=0)
    top = max([baseline, *(p.score for c in shown for p in c.points)])
    axes.set_ylim(0, 1.0 if top > 0.4 else max(0.05, 1.15 * top))
    footprint_axis(axes)
    return handles


def _x_label(curves: Iterable[Curve]) -> str:
    cost = "KV footprint or reads" if any(c.fitted_reads for c in curves) else "KV footprint"
    return f"{cost} (share of full attention's)"


def _names(curve: Curve) -> list[str]:
    """Return the names of a curve's lines: against its footprint, and its reads if these differ."""
    return [curve.name, f"{curve.name}, reads"] if curve.fitted_reads else [curve.name]


def _in_percent(points: Sequence[tuple[float, ...]]) -> NDArray[np.float64]:
    """Return the columns of points as rows, the first (a footprint) in per cent."""
    columns = np.array(points).T
    columns[0] *= 100
    return columns


def _draw_band(axes: Axes, curve: Curve, style: Style) -> None:
    known = [
        (p.kv_footprint, i.low, i.high) for p in curve.points if (i := p.score_interval) is not None
    ]
    if len(known) > 1:
        band = _in_percent(known)
        axes.fill_between(*band, color=style.colour, alpha=0.10, linewidth=0, zorder=0.5)


def _baseline_handles(threshold: float) -> list[Line2D]:
    stroke: dict[str, Any] = {"color": GREY, "linestyle": "none", "marker": "|", "markersize": 9}
    of_it = f"{100 * threshold:g} % of it"
    return [
        Line2D([], [], color=BLACK, linewidth=1, label="full attention"),
        Line2D([], [], color=BLACK, linewidth=0.9, linestyle=_DASHES, label=of_it),
        Line2D([], [], **stroke, markeredgewidth=2.2, label="critical footprint"),
    ]
