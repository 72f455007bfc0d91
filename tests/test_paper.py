"""The paper's figure through the same fit, and its claims judged on made-up curves."""


import pytest

from kvbench.curves import Status
from kvbench.paper import is_lower_bound, paper_records, paper_report


def test_the_papers_figure_gives_the_papers_critical_footprints() -> None:
    found = {(c.setting.task, c.method): c for c in paper_report(0.9).curves}
    for method, percent, status in (
        ("prulong", 46.2, Status.REACHED),
        ("duoattention", 58.1, Status.REACHED),
        ("pyramidkv-patched", 63.7, Status.REACHED),
        ("pyramidkv-naive", 95.0, Status.EXTRAPOLATED),
    ):
        curve = found["recall", method]
        assert curve.footprint is not None
        assert 100 * curve.footprint.value == pytest.approx(percent, abs=0.5)
        assert curve.footprint.status is status
        assert curve.footprint.interval is None
        assert curve.peak is None
    # below DuoAttention's crossing the figure only says "below the axis"
    assert is_lower_bound(found["recall", "duoattention"])
    assert not is_lower_bound(found["recall", "pyramidkv-patched"])
    assert len({task for task, _ in found}) == 8
    assert len(paper_records()) == sum(1 for c in found.values() for _ in c.points)
