"""Pictures of a report, as PNG and PDF: curves, prefill chunks, timelines and bytes.

Sizes and fonts are for print: a grid is as wide as a paper's page (7 inches, no letter below 6.5
points), legends stand outside the axes, and colours are told apart with any colour vision.
"""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator

from kvbench.records import BASELINE, Record
from kvbench.report.build import Curve, Report, Setting

# Okabe and Ito's colours.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"

PAGE = 7.0  # inches, the width of a paper's text
FONT, SMALL = 7.5, 6.5  # points, in a grid
DOTS = 160  # an inch
TIMELINE_BUDGET = 0.3  # the timeline shows the measured budget nearest to it
MOST_CURVES_WITH_BANDS = 16  # more bands on one another are mud
RC = {"pdf.fonttype": 42, "svg.fonttype": "none"}  # fonts that a publisher's checks accept


@dataclass(frozen=True)
class Style:
    """How a method is drawn, in every picture alike."""

    colour: str
    marker: str
    line: str
    filled: bool = True


STYLES = {
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
    "random-heads": Style(PURPLE, "<", ":", filled=False),
}
_SPARE_COLOURS = (PURPLE, GREEN, BLUE, VERMILLION, ORANGE, SKY)
_SPARE_MARKERS = ("h", "p", "X", "<", "d", "H")
_SPARE_LINES = ("-", "--", "-.", ":")


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


@dataclass(frozen=True)
class Picture:
    """A figure, what its file is called, and what a reader is told it shows."""

    stem: str
    caption: str
    figure: Figure
    setting: Setting | None = None  # None for one that shows several tasks


def draw_pictures(report: Report) -> list[Picture]:
    """Every picture that the records allow: one a task, then those over all tasks."""
    settings = report.settings()
    pictures = []
    for setting in settings:
        alone = sum(other.task == setting.task for other in settings) == 1
        stem = setting.task + ("" if alone else _tail(setting))
        pictures.append(
            Picture(
                _file_name(stem),
                f"{setting.task}: score against KV footprint. Lines are the fitted curves, marks "
                "what was measured, bands 95 % intervals of it, strokes on the dashed line "
                "critical footprints.",
                draw_task(report.of(setting), setting),
                setting,
            )
        )
    groups = list(dict.fromkeys((s.model, s.context, s.seed) for s in settings))
    for group in groups:
        tasks = [s for s in settings if (s.model, s.context, s.seed) == group]
        tail = "" if len(groups) == 1 else _tail(tasks[0])
        curves = {setting: report.of(setting) for setting in tasks}
        pictures += [
            Picture(_file_name(stem + tail), caption, figure)
            for stem, caption, figure in _over_tasks(curves)
        ]
    return pictures


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write every picture as STEM.png and STEM.pdf; OSError as it comes. Returns their paths.

    `Figure.savefig` would lay out and draw everything twice for each format; here the layout is
    found once and each format draws once.
    """
    written = []
    for picture in pictures:
        figure = picture.figure
        png, pdf = (folder / f"{picture.stem}.{suffix}" for suffix in ("png", "pdf"))
        with matplotlib.rc_context(RC):
            figure.set_dpi(DOTS)
            canvas = FigureCanvasAgg(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            canvas.print_png(png, metadata={"Software": None})
            FigureCanvasPdf(figure).print_pdf(pdf, metadata={"CreationDate": None})
        written += [png, pdf]
    return written


def _tail(setting: Setting) -> str:
    return f"-{setting.model}-{setting.context}-s{setting.seed}"


def _file_name(stem: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "picture"


def _over_tasks(curves: dict[Setting, list[Curve]]) -> Iterable[tuple[str, str, Figure]]:
    """Stem, caption and figure of each picture over the tasks of one model, context and seed."""
    sizes = _chunk_sizes(c for of_task in curves.values() for c in of_task)
    shown_sizes: list[int | None] = [*sizes] or [None]
    for size in shown_sizes:
        tail = f"-chunk-{size}" if len(sizes) > 1 else ""
        shown = {s: _with_chunk(of_task, size) for s, of_task in curves.items()}
        words = f" with prefill chunks of {size:,} tokens" if size else ""
        yield f"all-tasks{tail}", f"All tasks{words}, for a paper's full width.", draw_grid(shown)
    if len(sizes) > 1:
        yield (
            "prefill-chunks",
            "Critical footprint against the size of the prefill chunk, with 95 % intervals.",
            draw_chunks(curves),
        )
    for size in shown_sizes:
        lines = _timelines({s: _with_chunk(of_task, size) for s, of_task in curves.items()})
        if lines is not None:
            tail = f"-chunk-{size}" if len(sizes) > 1 else ""
            yield (
                f"timeline{tail}",
                "What the KV footprint is the area of: resident entries while rows go by. The "
                "grey triangle is full attention.",
                draw_timeline(lines),
            )
    if any(p.kv_bytes_peak for of_task in curves.values() for c in of_task for p in c.points):
        yield (
            "bytes",
            "KV footprint against the peak bytes of the KV cache, as measured.",
            draw_bytes(curves),
        )


def _chunk_sizes(curves: Iterable[Curve]) -> list[int]:
    """The prefill chunks of curves that depend on one, the largest first."""
    return sorted({c.prefill_chunk for c in curves if c.prefill_chunk is not None}, reverse=True)


def _with_chunk(curves: Sequence[Curve], size: int | None) -> list[Curve]:
    """The curves of one prefill chunk, and those that do not depend on it."""
    return [c for c in curves if c.prefill_chunk in (size, None)]


def draw_task(curves: Sequence[Curve], setting: Setting) -> Figure:
    """Score against footprint, falling to the right; a panel for each prefill chunk."""
    sizes: list[int | None] = list(_chunk_sizes(curves)) or [None]
    figure = Figure(figsize=(3.0 + 4.6 * len(sizes), 4.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    names = _names(curves)
    entries: dict[str, Line2D] = {}
    families: dict[str, list[str]] = {}
    for axes, size in zip(panels, sizes, strict=True):
        shown = [c for c in _with_chunk(curves, size) if c.method != BASELINE]
        for name, handle in _draw_curves(axes, shown, curves[0], names, scale=1.0).items():
            entries.setdefault(name, handle)
        for curve in shown:
            group = families.setdefault(curve.family, [])
            if names[id(curve)] not in group:
                group.append(names[id(curve)])
        axes.set_xlabel("KV footprint (share of full attention's)")
        if len(sizes) > 1:
            axes.set_title(f"prefill chunk {size:,}", fontsize=10, loc="left")
    panels[0].set_ylabel("score")
    model = Path(setting.model).name
    samples = f"{curves[0].samples} samples" if curves[0].samples > 1 else "1 sample"
    figure.suptitle(
        f"{setting.task} ({model}, {setting.context:,} tokens, {samples})",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    groups = {"baseline": _baseline_handles(curves[0].threshold)}
    groups |= {family: [entries[name] for name in names] for family, names in families.items()}
    _legend_beside(figure, groups)
    return figure


def _names(curves: Iterable[Curve]) -> dict[int, str]:
    """A curve's label less its prefill chunk, which its panel names; by the curve's id."""
    names = {}
    for curve in curves:
        chunk = f"chunk {curve.prefill_chunk}"
        names[id(curve)] = (
            curve.label.replace(f", {chunk})", ")").replace(f" ({chunk})", "")
            if curve.prefill_chunk is not None
            else curve.label
        )
    return names


def _draw_curves(
    axes: Axes, shown: Sequence[Curve], any_curve: Curve, names: dict[int, str], scale: float
) -> dict[str, Line2D]:
    """Curves with bands, the baseline, the threshold and critical footprints; legend handles."""
    baseline, threshold = any_curve.baseline, any_curve.threshold
    handles: dict[str, Line2D] = {}
    seen: dict[str, list[str]] = {}
    for curve in shown:
        style = style_of(curve.method)
        name = names[id(curve)]
        variants = seen.setdefault(curve.method, [])
        variants.append(name)
        variant = len(variants) - 1
        line = style.line if variant == 0 else _SPARE_LINES[variant % len(_SPARE_LINES)]
        look: dict[str, Any] = {
            "color": style.colour,
            "marker": style.marker,
            "markersize": (8 if style.marker == "*" else 5) * scale,
            "markerfacecolor": style.colour if style.filled else "white",
            "markeredgewidth": 0.9 * scale,
        }
        axes.plot(
            *_columns(curve.fitted), color=style.colour, linestyle=line, linewidth=1.3 * scale
        )
        measured = [(p.kv_footprint, p.score) for p in curve.points]
        axes.plot(*_columns(measured), **look, linestyle="none", clip_on=False, zorder=4)
        if len(shown) <= MOST_CURVES_WITH_BANDS:
            _draw_band(axes, curve, style)
        if curve.footprint is not None:
            axes.plot(
                100 * curve.footprint.value,
                threshold * baseline,
                color=style.colour,
                marker="|",
                markersize=11 * scale,
                markeredgewidth=2.2 * scale,
                zorder=5,
            )
        handles[name] = Line2D([], [], **look, linestyle=line, linewidth=1.3 * scale, label=name)
    axes.axhline(baseline, color=BLACK, linewidth=1 * scale, zorder=1)
    axes.axhline(
        threshold * baseline, color=BLACK, linewidth=0.9 * scale, linestyle=(0, (5, 3)), zorder=1
    )
    axes.axhspan(threshold * baseline, max(1.0, baseline), color=GREEN, alpha=0.07, linewidth=0)
    top = max([baseline, *(p.score for c in shown for p in c.points)])
    axes.set_xlim(101, 0)
    axes.set_ylim(0, 1.0 if top > 0.4 else max(0.05, 1.15 * top))
    axes.xaxis.set_major_locator(MultipleLocator(20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
    _bare(axes)
    return handles


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Footprints in per cent, and scores."""
    pairs = list(points)
    return [100 * x for x, _ in pairs], [y for _, y in pairs]


def _draw_band(axes: Axes, curve: Curve, style: Style) -> None:
    known = [(p.kv_footprint, i) for p in curve.points if (i := p.score_interval) is not None]
    if len(known) > 1:
        axes.fill_between(
            [100 * x for x, _ in known],
            [i.low for _, i in known],
            [i.high for _, i in known],
            color=style.colour,
            alpha=0.10,
            linewidth=0,
            zorder=0.5,
        )


def _baseline_handles(threshold: float) -> list[Line2D]:
    return [
        Line2D([], [], color=BLACK, linewidth=1, label="full attention"),
        Line2D(
            [],
            [],
            color=BLACK,
            linewidth=0.9,
            linestyle=(0, (5, 3)),
            label=f"{100 * threshold:g} % of it",
        ),
        Line2D(
            [],
            [],
            color=GREY,
            linestyle="none",
            marker="|",
            markersize=9,
            markeredgewidth=2.2,
            label="critical footprint",
        ),
    ]


def _bare(axes: Axes) -> None:
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend_beside(figure: Figure, groups: dict[str, list[Line2D]]) -> None:
    """A legend beside the axes, the methods under the headings of their families."""
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


def _panels(count: int, height: float, legend_rows: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure of a page's width with `count` panels of a height in inches, and its axes."""
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
    return figure, every[:count]


def _label(panels: Sequence[Axes], x: str, y: str) -> None:
    """Name the axes: x below the lowest panel of each column, y beside the leftmost ones."""
    grid = panels[0].get_gridspec()
    across = grid.ncols if grid is not None else 1
    for index, axes in enumerate(panels):
        if index + across >= len(panels):
            axes.set_xlabel(x, fontsize=FONT)
        if index % across == 0:
            axes.set_ylabel(y, fontsize=FONT)


def _legend_below(figure: Figure, entries: Sequence[Line2D | Patch], across: int = 4) -> None:
    figure.legend(
        handles=list(entries),
        loc="outside lower center",
        ncols=across,
        frameon=False,
        fontsize=FONT - 0.5,
        handlelength=2.6,
        labelspacing=0.3,
        columnspacing=1.2,
    )


def draw_grid(curves: dict[Setting, list[Curve]]) -> Figure:
    """All tasks of one prefill chunk, for a paper's full width."""
    every = [c for of_task in curves.values() for c in of_task if c.method != BASELINE]
    names = _names(every)
    figure, panels = _panels(len(curves), 2.0, 2 + math.ceil(len(set(names.values())) / 4))
    entries: dict[str, Line2D] = {}
    for axes, (setting, of_task) in zip(panels, curves.items(), strict=True):
        shown = [c for c in of_task if c.method != BASELINE]
        entries |= _draw_curves(axes, shown, of_task[0], names, scale=0.62)
        axes.set_title(setting.task, fontsize=FONT + 0.5, loc="left")
    _label(panels, "KV footprint (share of full attention's)", "score")
    threshold = every[0].threshold if every else 0.9
    _legend_below(figure, [*_baseline_handles(threshold), *entries.values()])
    return figure


def draw_chunks(curves: dict[Setting, list[Curve]]) -> Figure:
    """Critical footprint against prefill chunk, for the methods that depend on it."""
    figure, panels = _panels(len(curves), 1.9)
    entries: dict[str, Line2D] = {}
    for axes, (setting, of_task) in zip(panels, curves.items(), strict=True):
        sizes = _chunk_sizes(of_task)
        names = _names(of_task)
        lines: dict[str, list[Curve]] = {}
        for curve in of_task:
            if curve.prefill_chunk is not None and curve.footprint is not None:
                lines.setdefault(names[id(curve)], []).append(curve)
        for index, (name, line) in enumerate(lines.items()):
            line.sort(key=lambda c: c.prefill_chunk or 0)
            entries[name] = _draw_chunk_line(axes, line, index / max(1, len(lines) - 1) - 0.5)
        axes.set_xscale("log", base=2)
        axes.set_xlim(min(sizes, default=1) / 1.35, max(sizes, default=2) * 1.35)
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        axes.set_title(setting.task, fontsize=FONT + 0.5, loc="left")
        _bare(axes)
    _label(panels, "prefill chunk (tokens)", "critical KV footprint")
    _legend_below(figure, list(entries.values()))
    return figure


def _draw_chunk_line(axes: Axes, line: Sequence[Curve], aside: float) -> Line2D:
    """One method's critical footprints, moved `aside` a little so that intervals stand apart."""
    style = style_of(line[0].method)
    x = [(c.prefill_chunk or 1) * 2 ** (0.22 * aside) for c in line]
    found = [c.footprint for c in line if c.footprint is not None]
    y = [100 * f.value for f in found]
    for at, one in zip(x, found, strict=True):
        if one.interval is not None:
            ends = [100 * one.interval.low, 100 * one.interval.high]
            axes.plot([at, at], ends, color=style.colour, linewidth=0.9)
    look: dict[str, Any] = {
        "color": style.colour,
        "linestyle": style.line,
        "linewidth": 0.9,
        "marker": style.marker,
        "markersize": 5.5 if style.marker == "*" else 3.6,
        "markerfacecolor": style.colour if style.filled else "white",
        "markeredgewidth": 0.7,
    }
    axes.plot(x, y, **look)
    return Line2D([], [], **look, label=line[0].method)


@dataclass(frozen=True)
class Timelines:
    """What one sample's cache holds under full attention and under every method at one budget.

    A timeline is the corners (rows, share of what full attention holds at the end).
    """

    setting: Setting
    sample: int
    budget: float
    prompt: int | None  # tokens
    prefill_chunk: int | None
    full: tuple[tuple[float, float], ...]
    methods: tuple[tuple[tuple[str, ...], tuple[tuple[float, float], ...], Record], ...]


def _timelines(curves: dict[Setting, list[Curve]]) -> Timelines | None:
    """The timelines to draw: of the task with the longest answers, its first sample.

    Methods whose caches hold the same are drawn together. None where no timeline was recorded.
    """
    best: tuple[int, Setting, Record] | None = None
    for setting, of_task in curves.items():
        full = next((c for c in of_task if c.method == BASELINE), None)
        if full is None:
            continue
        for _, record in sorted(full.cells[1.0].items()):
            if getattr(record, "timeline", None):
                if best is None or (record.new_tokens or 0) > best[0]:
                    best = record.new_tokens or 0, setting, record
                break
    if best is None:
        return None
    _, setting, whole = best
    methods = [c for c in curves[setting] if c.method != BASELINE]
    budgets = sorted({p.budget for c in methods for p in c.points if p.budget < 1})
    if not budgets:
        return None
    budget = min(budgets, key=lambda b: abs(b - TIMELINE_BUDGET))
    most = max(entries for _, entries in _timeline(whole))
    groups: list[tuple[list[str], tuple[tuple[float, float], ...], Record]] = []
    names = _names(methods)
    for curve in methods:
        one = curve.cells.get(budget, {}).get(whole.sample)
        if one is None or not getattr(one, "timeline", None):
            continue
        line = tuple((rows, entries / most) for rows, entries in _timeline(one))
        same = next((g for g in groups if _alike(g[1], line)), None)
        if same is None:
            groups.append(([names[id(curve)]], line, one))
        else:
            same[0].append(names[id(curve)])
    if not groups:
        return None
    groups.sort(key=lambda group: group[2].kv_footprint or 0)
    return Timelines(
        setting,
        whole.sample,
        budget,
        whole.prompt_tokens,
        next((c.prefill_chunk for c in methods if c.prefill_chunk is not None), None),
        tuple((rows, entries / most) for rows, entries in _timeline(whole)),
        tuple((tuple(names), line, record) for names, line, record in groups),
    )


def _timeline(record: Record) -> list[tuple[float, float]]:
    """A record's corners: rows processed, and entries resident over layers and KV heads."""
    return [(float(rows), float(entries)) for rows, entries in getattr(record, "timeline", ())]


def _alike(
    left: Sequence[tuple[float, float]], right: Sequence[tuple[float, float]], by: float = 0.004
) -> bool:
    """Whether two timelines would be drawn on one another."""
    return len(left) == len(right) and all(
        a[0] == b[0] and abs(a[1] - b[1]) < by for a, b in zip(left, right, strict=True)
    )


def draw_timeline(lines: Timelines) -> Figure:
    """Resident entries over rows, a panel for each method: the area is the footprint."""
    figure, panels = _panels(len(lines.methods), 1.65, 1)
    rows = max(x for x, _ in lines.full)
    for axes, (names, line, record) in zip(panels, lines.methods, strict=True):
        colour = style_of(names[0].split(" (")[0]).colour
        axes.fill_between(*_shares(lines.full), color="#E4E4E4", linewidth=0)
        axes.plot(*_shares(lines.full), color=GREY, linewidth=0.7)
        axes.fill_between(*_shares(line), color=colour, alpha=0.35, linewidth=0)
        axes.plot(*_shares(line), color=colour, linewidth=1.1)
        if lines.prompt is not None and lines.prompt < rows:
            axes.axvline(lines.prompt, color=BLACK, linewidth=0.7, linestyle=":")
        axes.set_xlim(0, rows)
        axes.set_ylim(0, 104)
        axes.yaxis.set_major_locator(MultipleLocator(25))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} %"))
        peak = f", peak {100 * record.kv_peak:.0f} %" if record.kv_peak is not None else ""
        heading = _wrapped(names)
        axes.set_title(
            f"{heading}\nfootprint {100 * (record.kv_footprint or 0):.0f} %{peak}",
            fontsize=FONT - 0.5,
            loc="left",
        )
        _bare(axes)
    _label(panels, "rows (tokens processed)", "resident entries")
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


def _shares(line: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Rows, and shares in per cent."""
    pairs = list(line)
    return [x for x, _ in pairs], [100 * y for _, y in pairs]


def _wrapped(names: Sequence[str], width: int = 33, most: int = 3) -> str:
    """Names with commas, on as many lines as they need; where that is too many, counted."""
    lines = [""]
    for index, name in enumerate(names):
        text = name + ("," if index < len(names) - 1 else "")
        if lines[-1] and len(lines[-1]) + 1 + len(text) > width:
            lines.append(text)
        else:
            lines[-1] = f"{lines[-1]} {text}".strip()
    if len(lines) > most:
        return f"{names[0]} and {len(names) - 1} more"
    return "\n".join(lines)


def draw_bytes(curves: dict[Setting, list[Curve]]) -> Figure:
    """Peak bytes of the KV cache against KV footprint; what lies on the line follows it."""
    names = _names(c for of_task in curves.values() for c in of_task)
    figure, panels = _panels(len(curves), 2.0, 1 + math.ceil(len(set(names.values())) / 4))
    entries: dict[str, Line2D] = {}
    for axes, (setting, of_task) in zip(panels, curves.items(), strict=True):
        full = next(c.points[0].kv_bytes_peak for c in of_task if c.method == BASELINE)
        scale, unit = (100 / full, "%") if full else (2**-20, "MiB")
        axes.plot([0, 100], [0, 100] if full else [0, 0], color=GREY, linewidth=0.8, zorder=1)
        for curve in of_task:
            if curve.method == BASELINE:
                continue
            style = style_of(curve.method)
            known = [(p.kv_footprint, b) for p in curve.points if (b := p.kv_bytes_peak)]
            marker: dict[str, Any] = {
                "color": style.colour,
                "linestyle": "none",
                "marker": style.marker,
                "markersize": 5 if style.marker == "*" else 3.3,
                "markerfacecolor": style.colour if style.filled else "none",
                "markeredgewidth": 0.7,
            }
            axes.plot([100 * x for x, _ in known], [scale * b for _, b in known], **marker)
            name = names[id(curve)]
            entries.setdefault(name, Line2D([], [], **marker, label=name))
        axes.set_xlim(101, 0)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MultipleLocator(20))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} %"))
        axes.yaxis.set_major_formatter(FuncFormatter(_with_unit(unit)))
        axes.set_title(setting.task, fontsize=FONT + 0.5, loc="left")
        _bare(axes)
    _label(panels, "KV footprint (share of full attention's)", "peak KV bytes (share of full)")
    equal = Line2D([], [], color=GREY, linewidth=0.8, label="bytes equal footprint")
    _legend_below(figure, [equal, *entries.values()])
    return figure


def _with_unit(unit: str) -> Callable[[float, float], str]:
    return lambda value, _: f"{value:g} {unit}"
