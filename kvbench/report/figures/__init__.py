"""Pictures of a report, as PNG and PDF: curves, prefill chunks, timelines and bytes.

`draw_pictures` decides which pictures there are; the other modules draw one kind each, in the style
of `style.py`. Sizes and fonts are for print: a grid is as wide as a paper's page (7 inches, no
letter below 6.5 points), legends are outside the axes, and colours can be told apart with any
colour vision.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain, count
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from kvbench import escape
from kvbench.files import write_together
from kvbench.report.build import Curve, Report, Setting
from kvbench.report.figures.bytes import draw_bytes
from kvbench.report.figures.chunks import draw_chunks
from kvbench.report.figures.curves import draw_grid, draw_task
from kvbench.report.figures.style import (
    CurvesBySetting,
    Styles,
    choose_styles,
    chunk_sizes,
    with_chunk,
)
from kvbench.report.figures.timeline import draw_timeline

DOTS = 160  # per inch
RC = {"pdf.fonttype": 42, "svg.fonttype": "none"}  # fonts that publishers accept


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and a caption that says what it shows."""

    stem: str
    caption: str
    figure: Figure
    setting: Setting | None = None  # None if it shows several tasks

    def files(self) -> dict[str, bytes]:
        """Return the figure as STEM.png and STEM.pdf.

        `Figure.savefig` would lay out and draw everything twice for each format. Here the layout is
        computed once, and each format draws once.
        """
        png, pdf = BytesIO(), BytesIO()
        with matplotlib.rc_context(RC), escape.drawing(self.figure):
            self.figure.set_dpi(DOTS)
            canvas = FigureCanvasAgg(self.figure)
            self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")
            canvas.print_png(png, metadata={"Software": None})
            FigureCanvasPdf(self.figure).print_pdf(pdf, metadata={"CreationDate": None})
        return {f"{self.stem}.png": png.getvalue(), f"{self.stem}.pdf": pdf.getvalue()}


def draw_pictures(report: Report) -> list[Picture]:
    """Return every picture that the records allow: one per task, then those over all tasks."""
    settings = report.settings()
    styles = choose_styles(curve.method for curve in report.curves)
    pictures = []
    for setting in settings:
        curves = report.of(setting)
        alone = sum(other.task == setting.task for other in settings) == 1
        pictures.append(
            Picture(
                escape.file_name(setting.task + ("" if alone else _tail(setting))),
                f"{setting.task}: score against KV footprint. Lines are the fitted curves, marks "
                "are the measured means, bands their 95 % intervals. A stroke on the dashed line "
                f"is a critical footprint.{_on_reads(curves)}",
                draw_task(curves, setting, styles),
                setting,
            )
        )
    groups = list(dict.fromkeys((s.model, s.context, s.seed, s.compress) for s in settings))
    for group in groups:
        tasks = [s for s in settings if (s.model, s.context, s.seed, s.compress) == group]
        tail = "" if len(groups) == 1 else _tail(tasks[0])
        pictures += [
            Picture(escape.file_name(stem + tail), caption, figure)
            for stem, caption, figure in _over_tasks({s: report.of(s) for s in tasks}, styles)
        ]
    return list(_told_apart(pictures))


def _told_apart(pictures: Iterable[Picture]) -> Iterator[Picture]:
    """Yield pictures whose files differ in name, on file systems that ignore case too."""
    used: set[str] = set()
    for picture in pictures:
        stems = (f"{picture.stem}{tail}" for tail in chain([""], (f"-{n}" for n in count(2))))
        stem = next(stem for stem in stems if stem.lower() not in used)
        used.add(stem.lower())
        yield replace(picture, stem=stem)


def save_pictures(pictures: Sequence[Picture], folder: Path) -> list[Path]:
    """Write every picture as STEM.png and STEM.pdf and return the paths; raises OSError."""
    files = {name: data for picture in pictures for name, data in picture.files().items()}
    write_together({folder / name: data for name, data in files.items()})
    return [folder / name for name in files]


def _on_reads(curves: Iterable[Curve]) -> str:
    """Return a sentence for a caption if a curve is also drawn against its reads."""
    if not any(curve.fitted_reads for curve in curves):
        return ""
    return " A dashed line called reads shows the score of its method against reads."


def _tail(setting: Setting) -> str:
    compress = "" if setting.compress == "prompt" else f"-{setting.compress}"
    return f"-{setting.model}-{setting.context}-s{setting.seed}{compress}"


def _over_tasks(curves: CurvesBySetting, styles: Styles) -> Iterator[tuple[str, str, Figure]]:
    """Yield stem, caption and figure of each picture over the tasks of one model."""
    sizes = chunk_sizes(c for of_task in curves.values() for c in of_task)
    each: list[int | None] = [*sizes] or [None]
    shown = {size: {s: with_chunk(c, size) for s, c in curves.items()} for size in each}
    tails = {size: f"-chunk-{size}" if len(sizes) > 1 else "" for size in shown}
    for size, of_size in shown.items():
        words = f" with prefill chunks of {size:,} tokens" if size else ""
        shown_curves = [c for of_task in of_size.values() for c in of_task]
        question = next(iter(curves)).question
        caption = f"All tasks{words}{question}, for a paper's full width.{_on_reads(shown_curves)}"
        yield f"all-tasks{tails[size]}", caption, draw_grid(of_size, styles)
    if len(sizes) > 1:
        yield (
            "prefill-chunks",
            "Critical footprint against the size of the prefill chunk, with 95 % intervals.",
            draw_chunks(curves, styles),
        )
    for size, of_size in shown.items():
        figure = draw_timeline(of_size, styles)
        if figure is not None:
            yield (
                f"timeline{tails[size]}",
                "Resident entries while the rows of one sample are processed; the area is the KV "
                "footprint. The grey triangle is full attention.",
                figure,
            )
    if any(p.kv_bytes_peak for of_task in curves.values() for c in of_task for p in c.points):
        yield (
            "bytes",
            "KV footprint against the peak bytes of the KV cache, as measured.",
            draw_bytes(curves, styles),
        )
