"""What pictures there are for which records, and that timelines show what was held."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.records import record
from matplotlib.text import Text

from kvbench.engine.accounting import full_rows
from kvbench.records import Record
from kvbench.report.build import report_records
from kvbench.report.figures import draw_pictures, save_pictures
from kvbench.report.figures.style import choose_styles


def timed(method: str, budget: float, sample: int, corners: list[list[int]], **more: Any) -> Record:
    """A record with a timeline, whether or not records have that field."""
    made = record(method, budget, sample, budget, kv_bytes_peak=1000, **more)
    object.__setattr__(made, "timeline", corners)
    return made


def rows_of(chunks: tuple[int | None, ...], timeline: bool = True) -> list[Record]:
    """Eight rows and two decoded tokens, one KV head; a method keeps four entries of a chunk."""
    held = [[0, 0], [8, 8], [8, 4], [10, 6]]
    whole = [[0, 0], [10, 10]]
    rows = []
    for task in ("recall", "rag/hard"):
        for i in range(12):
            same: dict[str, Any] = {"task": task, "prompt_tokens": 8, "new_tokens": 2}
            rows.append(timed("full", 1.0, i, whole if timeline else [], **same))
            for method in ("snapkv-naive", "prulong"):
                for chunk in chunks:
                    for budget in (0.3, 0.6):
                        corners = held if timeline else []
                        rows.append(timed(method, budget, i, corners, prefill_chunk=chunk, **same))
    return rows


@pytest.mark.parametrize(
    ("chunks", "timeline", "stems"),
    [
        ((8,), False, {"all-tasks", "bytes"}),
        ((8,), True, {"all-tasks", "bytes", "timeline"}),
        (
            (8, 4),
            True,
            {"all-tasks-chunk-8", "all-tasks-chunk-4", "bytes", "prefill-chunks"}
            | {"timeline-chunk-8", "timeline-chunk-4"},
        ),
    ],
)
def test_there_is_a_picture_for_all_that_was_measured(
    chunks: tuple[int, ...], timeline: bool, stems: set[str], tmp_path: Path
) -> None:
    pictures = draw_pictures(report_records(rows_of(chunks, timeline), 0.9))
    assert {picture.stem for picture in pictures} == stems | {"recall", "rag-hard"}
    written = save_pictures(pictures[:1], tmp_path)
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert written[1].read_bytes().startswith(b"%PDF")


def test_a_timeline_is_drawn_as_recorded_and_equal_ones_once() -> None:
    pictures = draw_pictures(report_records(rows_of((8,)), 0.9))
    figure = next(p.figure for p in pictures if p.stem == "timeline")
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 1  # both methods hold the same
    assert "prulong, snapkv-naive" in panels[0].get_title(loc="left")
    full, method, prompt = (np.asarray(line.get_xydata()).tolist() for line in panels[0].lines)
    assert full == [[0, 0], [10, 100]]
    assert method == [[0, 0], [8, 80], [8, 40], [10, 60]]
    assert prompt[0][0] == 8
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(method))
    assert area == 420
    assert full_rows(10, 0) == 55  # the triangle of 500 counted in whole entries


def test_letters_are_large_enough_for_print() -> None:
    for picture in draw_pictures(report_records(rows_of((8, 4)), 0.9)):
        figure = picture.figure
        figure.draw_without_rendering()
        texts = [t for t in figure.findobj() if isinstance(t, Text) and t.get_text()]
        assert min(float(text.get_fontsize()) for text in texts) >= 6.5
        if picture.setting is None:
            assert figure.get_figwidth() == 7


def test_legends_stand_beside_the_axes() -> None:
    for picture in draw_pictures(report_records(rows_of((8, 4)), 0.9)):
        figure = picture.figure
        figure.draw_without_rendering()
        for legend in figure.legends:
            box = legend.get_window_extent()
            for axes in figure.axes:
                assert not box.overlaps(axes.get_window_extent())
                for label in (axes.xaxis.label, axes.yaxis.label):
                    assert not label.get_text() or not box.overlaps(label.get_window_extent())


def test_methods_of_plug_ins_look_different() -> None:
    ours = [f"plug{i}" for i in range(8)]
    styles = choose_styles([*ours, "full", "snapkv", "prulong"])
    looks = [(style.colour, style.marker) for style in styles.values()]
    assert len(set(looks)) == len(looks)
    few = choose_styles(["snapkv", "prulong", "b", "a"])
    assert len({style.colour for style in few.values()}) == 4
    assert few == choose_styles(["a", "b", "prulong", "snapkv"])


def test_no_picture_overwrites_another() -> None:
    rows = [
        record(method, budget, i, budget, task=task, model=model)
        for i in range(3)
        for method, budget in (("full", 1.0), ("snapkv", 0.5))
        for task in ("bytes", "Bytes", "a b", "a-b")
        for model in ("org/m", "org-m")
    ]
    stems = [picture.stem.lower() for picture in draw_pictures(report_records(rows, 0.9))]
    assert len(set(stems)) == len(stems) == 8 + 2


def test_a_dollar_in_a_label_starts_no_formula(tmp_path: Path) -> None:
    rows = [timed("full", 1.0, i, [], task="a $x^^$ b") for i in range(4)]
    rows += [timed("cost$_$", b, i, [], task="a $x^^$ b") for i in range(4) for b in (0.3, 0.6)]
    assert save_pictures(draw_pictures(report_records(rows, 0.9)), tmp_path)
