"""Peak bytes of the KV cache against KV footprint: points on the line take what they should."""

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvbench.records import BASELINE
from kvbench.report.figures.style import (
    GREY,
    CurvesBySetting,
    Styles,
    footprint_axis,
    label_axes,
    legend_below,
    make_panels,
)


def draw_bytes(curves: CurvesBySetting, styles: Styles) -> Figure:
    """Draw one panel per task; bytes in per cent of full attention's, or in MiB if unknown."""
    names = {curve.name for of_task in curves.values() for curve in of_task}
    figure, panels = make_panels(curves, 2.0, 1 + math.ceil(len(names) / 4))
    entries: dict[str, Line2D] = {}
    for axes, of_task in zip(panels, curves.values(), strict=True):
        full = next(c.points[0].kv_bytes_peak for c in of_task if c.method == BASELINE)
        scale, unit = (100 / full, "%") if full else (2**-20, "MiB")
        axes.plot([0, 100], [0, 100] if full else [0, 0], color=GREY, linewidth=0.8, zorder=1)
        for curve in of_task:
            if curve.method == BASELINE:
                continue
            known = [(p.kv_footprint, b) for p in curve.points if (b := p.kv_bytes_peak)]
            marks = {**styles[curve.method].marks(3.3, 0.7, "none"), "linestyle": "none"}
            axes.plot([100 * x for x, _ in known], [scale * b for _, b in known], **marks)
            entries.setdefault(curve.name, Line2D([], [], **marks, label=curve.name))
        footprint_axis(axes)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(f"{{x:g}} {unit}")
    label_axes(panels, "KV footprint (share of full attention's)", "peak KV bytes (share of full)")
    equal = Line2D([], [], color=GREY, linewidth=0.8, label="bytes equal footprint")
    legend_below(figure, [equal, *entries.values()])
    return figure
