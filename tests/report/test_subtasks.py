"""Tasks with subtasks, whose scores count equally, and clusters of samples within them."""

from typing import Any

import numpy as np
import pytest
from helpers.records import record
from numpy.typing import NDArray
from scipy.special import ndtr

from kvbench.report.build import report_records
from kvbench.report.frames import frame_of
from kvbench.report.statistics import independent, interval, resampled_means, weighted_means

Group = tuple[int, int, float]  # questions, samples of each, mean score


def drawn(rng: np.random.Generator, groups: list[Group]) -> NDArray[np.float64]:
    """Scores [S, 1] of 0 or 1: samples of a question mostly share their fate."""
    parts = []
    for questions, depths, mean in groups:
        shared = rng.normal(size=questions).repeat(depths)
        luck = np.sqrt(0.8) * shared + np.sqrt(0.2) * rng.normal(size=len(shared))
        parts.append(ndtr(luck) < mean)
    return np.concatenate(parts).astype(float)[:, None]


@pytest.mark.parametrize(
    "groups",
    [
        [(40, 6, 0.7)],
        [(20, 6, 0.7), (12, 3, 0.5)],
        [(20, 6, 0.8), (20, 3, 0.3), (30, 1, 0.5)],
    ],
)
def test_intervals_of_questions_at_several_depths_cover_the_truth(groups: list[Group]) -> None:
    depths = [depth for questions, depth, _ in groups for _ in range(questions)]
    clusters = np.arange(len(depths)).repeat(depths)
    subtasks = np.arange(len(groups)).repeat([n * depth for n, depth, _ in groups])
    truth = float(np.mean([mean for *_, mean in groups]))
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        scores = drawn(rng, groups)
        units = independent(~np.isnan(scores), clusters, subtasks)[0]
        assert sum(units) == len(depths)
        means, _ = resampled_means(scores, np.array([True]), clusters, subtasks)
        found = interval(means[:, 0], units)
        covered += found is not None and truth in found
    assert 372 <= covered <= 388  # 93 to 97 %


def test_a_cluster_in_two_subtasks_of_unequal_sizes_is_drawn_once() -> None:
    """The same questions at two lengths, one of them with a question more."""
    subtasks = np.array([0, 0, 0, 1, 1, 1, 1])
    clusters = np.array([0, 1, 2, 0, 1, 2, 3])
    there = np.ones((7, 1), dtype=bool)
    assert independent(there, clusters, subtasks) == [(4,)]
    assert independent(there, np.arange(7), subtasks) == [(3, 4)]


def test_two_questions_at_six_depths_are_two_clusters() -> None:
    """Twelve rows of two questions say as much as two samples, and no more."""

    def ends(depths: int, named: bool) -> Any:
        rows = []
        for sample in range(2 * depths):
            question = sample // depths
            rows += [record("full", 1.0, sample, 1.0), record("snapkv", 0.5, sample, question)]
        frame = frame_of(rows)
        if named:
            frame["cluster"] = [f"question {sample // depths}" for sample in frame["sample"]]
        point = report_records(frame).points.iloc[1]
        return [point["score"], point["score_low"], point["score_high"]]

    two = ends(1, named=False)
    assert ends(6, named=True) == pytest.approx(two, abs=1e-12)
    score, low, high = ends(6, named=False)
    assert score == two[0]
    assert high - low < 0.7 * (two[2] - two[1])


def test_subtasks_count_equally_whatever_their_sizes() -> None:
    """Twelve samples of one subtask that pass, and three of another that fail."""
    rows = []
    for sample in range(15):
        passes = sample < 12
        subtask = "large" if passes else "small"
        rows += [
            record("full", 1.0, sample, 1.0, subtask=subtask),
            record("snapkv", 0.5, sample, float(passes), subtask=subtask),
        ]
    point = report_records(frame_of(rows)).points.iloc[1]
    assert point["score"] == 0.5
    assert point["samples"] == 15


def test_equal_subtasks_are_drawn_as_one_task() -> None:
    scores = np.random.default_rng(3).random((12, 3)).round(1)
    mask = np.array([True, True, False])
    subtasks = np.arange(12) % 4
    for alone, apart in zip(
        resampled_means(scores, mask), resampled_means(scores, mask, None, subtasks), strict=True
    ):
        assert (alone == apart).all()
    assert independent(scores > -1, None, subtasks) == [(12,)] * 3


def test_unequal_subtasks_are_drawn_apart() -> None:
    """Each resample holds as many samples of a subtask as there are; none mixes two."""
    values = np.repeat([0.2, 0.9], [3, 9])[:, None]
    subtasks = np.repeat([0, 1], [3, 9])
    means, counts = resampled_means(values, np.array([False]), None, subtasks)
    np.testing.assert_allclose(means, 0.55)
    np.testing.assert_allclose(counts, 4 / (1 / 3 + 1 / 9))
    assert weighted_means(values, subtasks) == pytest.approx(0.55)
    assert independent(values > 0, None, subtasks) == [(3, 9)]


def test_a_subtask_of_one_sample_is_drawn_with_the_others() -> None:
    values = np.repeat([0.0, 1.0], [1, 5])[:, None]
    subtasks = np.repeat([0, 1], [1, 5])
    means, _ = resampled_means(values, np.array([False]), None, subtasks)
    assert independent(values > -1, None, subtasks) == [(6,)]
    assert 0.0 <= means.min() < 0.5 < means.max() == 1.0
    assert weighted_means(values, subtasks) == pytest.approx(0.5)


def test_a_budget_without_a_sample_of_a_subtask_is_the_mean_of_the_others() -> None:
    values = np.array([[0.2, 0.2], [0.4, 0.4], [1.0, np.nan], [1.0, np.nan], [1.0, np.nan]])
    assert weighted_means(values, np.array([0, 0, 1, 1, 1])) == pytest.approx([0.65, 0.3])
