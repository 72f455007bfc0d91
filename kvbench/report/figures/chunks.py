"""Critical footprint against the size of the prefill chunk, for the methods that depend on it."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from kvbench.report.build import Curve
from kvbench.report.figures.style import (
    CurvesBySetting,
    Style,
    Styles,
    chunk_sizes,
    label_axes,
    legend_below,
    make_panels,
)


def draw_chunks(curves: CurvesBySetting, styles: Styles) -> Figure:
    """Draw one panel per task, with one line per method."""
    figure, panels = make_panels(curves, 1.9)
    entries: dict[str, Line2D] = {}
    for axes, of_task in zip(panels, curves.values(), strict=True):
        sizes = chunk_sizes(of_task)
        lines: dict[str, list[Curve]] = {}
        for curve in of_task:
            if curve.prefill_chunk is not None and curve.footprint is not None:
                lines.setdefault(curve.name, []).append(curve)
        for index, (name, line) in enumerate(lines.items()):
            line.sort(key=lambda c: c.prefill_chunk or 0)
            style, aside = styles[line[0].method], index / max(1, len(lines) - 1) - 0.5
            entries[name] = _draw_line(axes, line, style, aside)
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(sizes, default=1) / 1.35, max(sizes, default=2) * 1.35)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g} %")
    label_axes(panels, "prefill chunk (tokens)", "critical KV footprint")
    legend_below(figure, list(entries.values()))
    return figure


def _draw_line(axes: Axes, line: Sequence[Curve], style: Style, aside: float) -> Line2D:
    """Draw one method's critical footprints, moved sideways a little so that intervals differ."""
    x = [(c.prefill_chunk or 1) * 2 ** (0.22 * aside) for c in line]
    found = [c.footprint for c in line if c.footprint is not None]
    for at, one in zip(x, found, strict=True):
        if one.interval is not None:
            ends = [100 * one.interval.low, 100 * one.interval.high]
            axes.plot([at, at], ends, color=style.colour, linewidth=0.9)
    look = {**style.marks(3.6, 0.7), "linestyle": style.line, "linewidth": 0.9}
    axes.plot(x, [100 * one.value for one in found], **look)
    return Line2D([], [], **look, label=line[0].name)
