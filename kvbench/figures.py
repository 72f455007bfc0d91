"""Pictures of a report: score against KV footprint, one per task, as PNG and PDF."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from kvbench.plan import BASELINE
from kvbench.report import Curve, Report, Setting

# Okabe and Ito's colours, told apart with every kind of colour vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"


@dataclass(frozen=True)
class Style:
    """How a method is drawn, in every picture alike."""

    colour: str
    marker: str
    line: str
    filled: bool = True


STYLES = {
    "recency": Style(GREY, "v", "-"),
    "random": Style(BLACK, "x", ":"),
    "knorm": Style(GREEN, "P", ":", filled=False),
    "quest": Style(ORANGE, "P", "-"),
    "snapkv": Style(SKY, "s", ":", filled=False),
    "snapkv-naive": Style(SKY, "D", "--", filled=False),
    "snapkv-patched": Style(BLUE, "s", "-"),
    "pyramidkv": Style(ORANGE, "^", ":", filled=False),
    "pyramidkv-naive": Style(ORANGE, ">", "--", filled=False),
    "pyramidkv-patched": Style(VERMILLION, "^", "-"),
    "duoattention": Style(PURPLE, "o", "-"),
    "prulong": Style(GREEN, "*", "-"),
}
_SPARE_COLOURS = (PURPLE, GREEN, BLUE, VERMILLION, ORANGE, SKY)
_SPARE_MARKERS = ("h", "p", "X", "<", "d", "H")
_CHUNK_LINES = ("-", "--", "-.", ":")


def style_of(method: str) -> Style:
    """The style of a method; one that is not in the table gets one from its name."""
    known = STYLES.get(method)
    if known is not None:
        return known
    draw = hashlib.sha256(method.encode()).digest()
    return Style(
        _SPARE_COLOURS[draw[0] % len(_SPARE_COLOURS)],
        _SPARE_MARKERS[draw[1] % len(_SPARE_MARKERS)],
        "-.",
    )


def save_pictures(report: Report, folder: Path) -> list[Path]:
    """Write TASK.png and TASK.pdf for every setting; OSError as it comes. Returns their paths.

    Where a task occurs in several settings its model, context and seed join the file name.
    """
    settings = report.settings()
    written = []
    for setting in settings:
        alone = sum(other.task == setting.task for other in settings) == 1
        tail = "" if alone else f"-{setting.model}-{setting.context}-s{setting.seed}"
        stem = (setting.task + tail).replace("/", "-")
        figure = draw(report.of(setting), setting)
        for suffix in ("png", "pdf"):
            path = folder / f"{stem}.{suffix}"
            dated = {"Software": None} if suffix == "png" else {"CreationDate": None}
            figure.savefig(path, dpi=160, metadata=dated)
            written.append(path)
    return written


def draw(curves: Sequence[Curve], setting: Setting) -> Figure:
    """Score against footprint, falling to the right; baseline and threshold as lines."""
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    baseline, threshold = curves[0].baseline, curves[0].threshold
    drawn = [curve for curve in curves if curve.method != BASELINE]
    handles: dict[str, list[Line2D]] = {}
    chunks: dict[tuple[str, str], int] = {}
    for curve in drawn:
        style = style_of(curve.method)
        variant = chunks.setdefault((curve.method, curve.label), 0)
        variant = sum(method == curve.method for method, _ in chunks) - 1
        line = style.line if variant == 0 else _CHUNK_LINES[variant % len(_CHUNK_LINES)]
        points = [(100 * p.kv_footprint, p.score) for p in curve.points]
        if points[-1][0] < 100:
            points.append((100, baseline))
        (handle,) = axes.plot(
            *zip(*points, strict=True),
            color=style.colour,
            linestyle=line,
            linewidth=1.4,
            marker=style.marker,
            markersize=8 if style.marker == "*" else 5.5,
            markerfacecolor=style.colour if style.filled else "white",
            markevery=range(len(curve.points)),
            label=curve.label,
            clip_on=False,
            zorder=3,
        )
        handles.setdefault(curve.family, []).append(handle)
    rule = axes.axhline(baseline, color=BLACK, linewidth=1, label="full attention")
    keep = axes.axhline(
        threshold * baseline,
        color=BLACK,
        linewidth=0.9,
        linestyle=(0, (5, 3)),
        label=f"{100 * threshold:g} % of it",
    )
    axes.axhspan(threshold * baseline, max(1.0, baseline), color=GREEN, alpha=0.07, linewidth=0)
    axes.set_xlim(101, 0)
    axes.set_ylim(0, 1.0)
    axes.xaxis.set_major_locator(MultipleLocator(20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    axes.set_xlabel("KV footprint (share of full attention's)")
    axes.set_ylabel("score")
    samples = max((curve.points[0].samples for curve in curves), default=0)
    axes.set_title(
        f"{setting.task} ({setting.model}, {setting.context:,} tokens, {samples} samples)",
        loc="left",
        fontsize=11,
    )
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, {"baseline": [rule, keep], **handles})
    return figure


def _legend(figure: Figure, groups: dict[str, list[Line2D]]) -> None:
    """A legend beside the axes, the methods under the headings of their families."""
    entries: list[Line2D] = []
    labels: list[str] = []
    headings = []
    for heading, lines in groups.items():
        headings.append(len(entries))
        entries.append(Line2D([], [], linestyle="none"))
        labels.append(heading)
        entries += lines
        labels += [str(line.get_label()) for line in lines]
    legend = figure.legend(
        entries,
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        handlelength=2.8,
        labelspacing=0.35,
    )
    for index in headings:
        legend.get_texts()[index].set_fontweight("bold")
