"""What all pictures share: how each method looks, panels, labels and legends."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MultipleLocator

from kvbench.report.build import Curve, Setting

# The colours of Okabe and Ito.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"

PAGE = 7.0  # inches, the width of a paper's text
FONT, SMALL = 7.5, 6.5  # points, in a grid

CurvesBySetting = dict[Setting, list[Curve]]


@dataclass(frozen=True)
class Style:
    """How a method is drawn, the same in every picture."""

    colour: str
    marker: str
    line: str
    filled: bool = True

    def marks(self, size: float, edge: float, hollow: str = "white") -> dict[str, Any]:
        """Return matplotlib's arguments for markers; `size` and `edge` in points."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": size * (1.6 if self.marker == "*" else 1),
            "markerfacecolor": self.colour if self.filled else hollow,
            "markeredgewidth": edge,
        }


Styles = dict[str, Style]  # by method

STYLES: Styles = {
    "full": Style(BLACK, "", "-"),
    "recency": Style(GREY, "v", "-"),
    "random": Style(BLACK, "x", ":"),
    "random-naive": Style(BLACK, "+", "--"),
    "knorm": Style(GREEN, "P", ":", filled=False),
    "knorm-naive": Style(GREEN, "X", "--", filled=False),
    "quest": Style(VERMILLION, "d", "-", filled=False),
    "snapkv": Style(SKY, "s", ":", filled=False),
    "snapkv-naive": Style(SKY, "D", "--", filled=False),
    "snapkv-patched": Style(BLUE, "s", "-"),
    "pyramidkv": Style(ORANGE, "^", ":", filled=False),
    "pyramidkv-naive": Style(ORANGE, ">", "--", filled=False),
    "pyramidkv-patched": Style(VERMILLION, "^", "-"),
    "duoattention": Style(PURPLE, "o", "-"),
    "prulong": Style(GREEN, "*", "-"),
    "saliency-heads": Style(GREEN, "<", ":", filled=False),
    "random-heads": Style(PURPLE, "<", ":", filled=False),
}
_SPARE_COLOURS = (PURPLE, GREEN, BLUE, VERMILLION, ORANGE, SKY)
_SPARE_MARKERS = ("h", "p", "X", "<", "d", "H")


def choose_styles(methods: Iterable[str]) -> Styles:
    """Return a style for each method of a report.

    A method that is not in the table gets the colour and the marker that the report uses least.
    """
    names = set(methods)
    styles = {name: STYLES[name] for name in names & set(STYLES)}
    taken: Counter[Any] = Counter()  # how often a colour, a marker or a pair of both is used
    for style in styles.values():
        taken.update([style.colour, style.marker, (style.colour, style.marker)])
    for name in sorted(names - set(STYLES)):
        pairs = product(_SPARE_COLOURS, _SPARE_MARKERS)
        colour, marker = min(pairs, key=lambda pair: (taken[pair], taken[pair[0]], taken[pair[1]]))
        taken.update([colour, marker, (colour, marker)])
        styles[name] = Style(colour, marker, "-.")
    return styles


def chunk_sizes(curves: Iterable[Curve]) -> list[int]:
    """Return the prefill chunks of curves that depend on one, the largest first."""
    return sorted({c.prefill_chunk for c in curves if c.prefill_chunk is not None}, reverse=True)


def with_chunk(curves: Sequence[Curve], size: int | None) -> list[Curve]:
    """Return the curves of one prefill chunk, and those that do not depend on it."""
    return [c for c in curves if c.prefill_chunk in (size, None)]


def make_panels(
    curves: CurvesBySetting, height: float, legend_rows: int = 4
) -> tuple[Figure, list[Axes]]:
    """Return a figure with one panel per setting, named by its task, and the panels' axes."""
    figure, panels = make_grid(len(curves), height, legend_rows)
    for axes, setting in zip(panels, curves, strict=True):
        axes.set_title(setting.task, fontsize=FONT + 0.5, loc="left")
    return figure, panels


def make_grid(count: int, height: float, legend_rows: int) -> tuple[Figure, list[Axes]]:
    """Return a figure as wide as a page with `count` panels of a height in inches, and its axes."""
    across = 2 if count in (2, 4) else min(3, count)
    down = math.ceil(count / across)
    figure = Figure(figsize=(PAGE, 0.35 + height * down + 0.14 * legend_rows), layout="constrained")
    with matplotlib.rc_context({"font.size": FONT}):
        grid = figure.subplots(down, across, squeeze=False)
    every: list[Axes] = list(grid.flat)
    for axes in every[count:]:
        axes.set_axis_off()
    for axes in every[:count]:
        axes.tick_params(labelsize=SMALL, length=2.5)
        light_axes(axes)
    return figure, every[:count]


def light_axes(axes: Axes) -> None:
    """Give axes a light grid, and no frame at the top and right."""
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def footprint_axis(axes: Axes) -> None:
    """Let the x axis show footprints in per cent, falling to the right."""
    axes.set_xlim(101, 0)
    axes.xaxis.set_major_locator(MultipleLocator(20))
    axes.xaxis.set_major_formatter("{x:g} %")


def label_axes(panels: Sequence[Axes], x: str, y: str) -> None:
    """Label x below the lowest panel of each column, and y beside the leftmost panels."""
    grid = panels[0].get_gridspec()
    across = grid.ncols if grid is not None else 1
    for index, axes in enumerate(panels):
        if index + across >= len(panels):
            axes.set_xlabel(x, fontsize=FONT)
        if index % across == 0:
            axes.set_ylabel(y, fontsize=FONT)


def legend_below(figure: Figure, entries: Sequence[Line2D]) -> None:
    """Put a legend of four columns below the panels."""
    figure.legend(
        handles=list(entries),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=FONT - 0.5,
        handlelength=2.6,
        labelspacing=0.3,
        columnspacing=1.2,
    )


def legend_beside(figure: Figure, groups: dict[str, list[Line2D]]) -> None:
    """Put a legend beside the axes, with the groups' names as headings."""
    entries: list[Line2D] = []
    headings = []
    for heading, lines in groups.items():
        headings.append(len(entries))
        entries += [Line2D([], [], linestyle="none", label=heading), *lines]
    legend = figure.legend(
        entries,
        [str(entry.get_label()) for entry in entries],
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        handlelength=2.8,
        labelspacing=0.35,
    )
    for index in headings:
        legend.get_texts()[index].set_fontweight("bold")
