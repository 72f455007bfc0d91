"""Fitted curves, critical points and the coverage of their intervals, against slow and known."""

from typing import Any

import numpy as np
import pytest
from helpers.records import record
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import expit, ndtr

from kvbench.report.build import report_records
from kvbench.report.frames import frame_of
from kvbench.report.statistics import (
    Status,
    by_cluster,
    critical,
    critical_rows,
    fit,
    fit_rows,
    interval,
    resampled_means,
    resamples,
)

Floats = NDArray[np.float64]


def found(
    points: list[tuple[float, float]], baseline: float, threshold: float = 0.9
) -> tuple[Any, Status]:
    cost, score = np.array(points, dtype=float).T
    return critical(cost, score, np.ones(len(cost)), baseline, 1, threshold)


def test_a_crossing_between_two_points() -> None:
    # from (0.4, 0.5) to (0.6, 1.0): 0.9 is reached four fifths of the way
    assert found([(0.2, 0.1), (0.4, 0.5), (0.6, 1.0)], 1.0) == (
        pytest.approx(0.56),
        Status.REACHED,
    )


def test_every_point_reaches_and_none_does() -> None:
    assert found([(0.3, 0.95), (0.5, 1.0)], 1.0) == (pytest.approx(0.3), Status.AT_MOST)
    assert found([(0.2, 0.1), (0.6, 0.5)], 1.0) == (
        pytest.approx(0.6 + 0.4 * 0.8),
        Status.EXTRAPOLATED,
    )


def test_a_dip_is_pooled_with_what_stands_before_it() -> None:
    # 0.9 at 0.4 and 0.7 at 0.6 become 0.8 at both; 0.9 lies halfway from there to (1, 1)
    assert found([(0.2, 0.1), (0.4, 0.9), (0.6, 0.7)], 1.0) == (
        pytest.approx(0.8),
        Status.EXTRAPOLATED,
    )
    # with three times the samples at 0.4 they become 0.85: a third of the way
    cost, score = np.array([0.2, 0.4, 0.6]), np.array([0.1, 0.9, 0.7])
    assert critical(cost, score, np.array([3.0, 3.0, 1.0]), 1.0, 3, 0.9)[0] == pytest.approx(
        0.6 + 0.4 / 3
    )


def test_points_above_the_baseline_lift_the_end_of_the_curve() -> None:
    score = np.array([0.2, 0.9])
    assert fit(score, np.ones(2), 0.5, 1).tolist() == pytest.approx([0.2, 0.7, 0.7])
    value, status = found([(0.2, 0.2), (0.4, 0.9)], 0.5)
    assert (value, status) == (pytest.approx(0.2 + 0.2 * 0.25 / 0.5), Status.REACHED)


def test_a_cost_above_full_attention_counts_as_full_attention() -> None:
    assert found([(0.5, 0.2), (1.04, 0.3)], 1.0) == (1.0, Status.EXTRAPOLATED)
    assert found([(1.0, 0.2), (1.0, 0.95)], 1.0) == (1.0, Status.REACHED)


curves = st.lists(st.tuples(st.floats(0.01, 1.1), st.floats(0, 1)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(curves, st.floats(0.05, 1), st.floats(0.1, 1))
def test_the_critical_point_is_where_the_curve_is_first_high_enough(
    points: list[tuple[float, float]], baseline: float, threshold: float
) -> None:
    points = sorted({round(x, 3): y for x, y in points}.items())
    value, status = found(points, baseline, threshold)
    knots = [*(min(x, 1) for x, _ in points), 1.0]
    heights = fit(np.array([y for _, y in points]), np.ones(len(points)), baseline, 1)
    for x in np.linspace(knots[0], 1, 201):
        height = np.interp(x, knots, heights)
        if x < value - 1e-6:
            assert height < threshold * baseline + 1e-6
        elif x > value + 1e-6:
            assert height > threshold * baseline - 1e-6
    assert (status is Status.AT_MOST) == (heights[0] >= threshold * baseline - 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32))
def test_rows_are_fitted_as_scipy_fits_each(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.random((20, count)), int(rng.integers(1, 6)))
    weights = rng.integers(1, 9, (20, count)).astype(float)
    each = [isotonic_regression(y, weights=w).x for y, w in zip(scores, weights, strict=True)]
    np.testing.assert_allclose(fit_rows(scores, weights), each, atol=1e-12)
    cost = np.sort(rng.random((20, count)), axis=1)
    baseline = rng.random(20) + 0.01
    at = np.full(20, 3.0)
    np.testing.assert_allclose(
        critical_rows(cost, scores, weights, baseline, at, 0.8),
        [
            critical(x, y, w, float(b), 3, 0.8)[0]
            for x, y, w, b in zip(cost, scores, weights, baseline, strict=True)
        ],
        atol=1e-9,
    )


def test_resamples_are_equal_draws_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(resamples(7, 50)))
    assert whole.shape == (50, 7)
    assert (whole.sum(axis=1) == 7).all()
    monkeypatch.setattr("kvbench.report.statistics.BLOCK", 70)
    blocks = list(resamples(7, 50))
    assert len(blocks) == 5
    np.testing.assert_array_equal(np.concatenate(blocks), whole)


def test_means_of_resamples_leave_out_what_is_missing() -> None:
    values = np.array([[1.0, 5.0], [0.0, np.nan], [0.5, np.nan]])
    means, counts = resampled_means(values, np.array([False, False]))
    weights = np.concatenate(list(resamples(3)))
    np.testing.assert_allclose(means[:, 0], weights @ [1, 0, 0.5] / 3)
    np.testing.assert_allclose(means[:, 1], 5)
    np.testing.assert_allclose(counts[:, 0], 3)
    np.testing.assert_allclose(counts[:, 1], np.maximum(weights[:, 0], 1e-6))


def test_scores_get_imagined_samples_and_the_rest_does_not() -> None:
    passes = np.ones((32, 2))
    means, _ = resampled_means(passes, np.array([True, False]))
    assert (means[:, 1] == 1).all()
    # 32 passes of 32: Jeffreys' interval for the share begins at 0.925
    assert np.quantile(means[:, 0], 0.025) == pytest.approx(0.925, abs=0.01)
    assert np.mean(means[:, 0]) == pytest.approx(32.5 / 33, abs=0.003)
    # scores without any spread, but not at an end, are taken as they are
    means, _ = resampled_means(passes / 2, np.array([True, True]))
    np.testing.assert_allclose(means, 0.5)


def test_no_interval_from_one_sample_or_from_no_draw() -> None:
    assert interval(np.arange(10.0), 1) is None
    assert interval(np.full(10, np.nan), 5) is None
    ends = interval(np.arange(1001.0), 10_000)
    assert ends is not None
    assert [ends.low, ends.high] == pytest.approx([25, 975], abs=0.1)


def simulate(rng: np.random.Generator, samples: int, expected: str, middle: float) -> Floats:
    """Scores [S, 7] at six budgets and under full attention, of samples of unlike difficulty.

    The expected score rises over budgets as a logistic curve that a sample's difficulty shifts.
    `bernoulli` scores are 0 or 1, `paired` ones share half of their luck over a sample's budgets,
    `graded` ones are means of eight parts.
    """
    difficulty = rng.normal(size=(samples, 1))
    chance = 0.97 * expit((BUDGETS - middle) / 0.1 + difficulty)
    if expected == "graded":
        return np.asarray(rng.binomial(8, chance) / 8)
    luck = rng.normal(size=chance.shape)
    if expected == "paired":
        luck = (luck + rng.normal(size=(samples, 1))) / np.sqrt(2)
    return np.asarray(ndtr(luck) < chance, dtype=float)


BUDGETS = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])


def draws_of(scores: Floats, cost: Floats) -> Floats:
    means, counts = resampled_means(scores, np.arange(scores.shape[1]) < len(cost))
    costs = np.broadcast_to(cost, (len(means), len(cost)))
    return critical_rows(costs, means[:, :-1], counts[:, :-1], means[:, -1], counts[:, -1], 0.9)


@pytest.mark.parametrize(
    ("kind", "samples", "middle"),
    [("bernoulli", 64, 0.35), ("paired", 48, 0.45), ("graded", 32, 0.4), ("paired", 64, 0.6)],
)
def test_intervals_cover_the_truth_as_often_as_they_say(
    kind: str, samples: int, middle: float
) -> None:
    cost = 0.12 + 0.85 * BUDGETS[:-1]
    grid = np.random.default_rng(1).normal(size=(200_000, 1))
    truth_scores = (0.97 * expit((BUDGETS - middle) / 0.1 + grid)).mean(axis=0)
    truth, _ = critical(cost, truth_scores[:-1], np.ones(6), float(truth_scores[-1]), 1, 0.9)
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(1000):
        ends = interval(draws_of(simulate(rng, samples, kind, middle), cost), samples)
        covered += ends is not None and truth in ends
    assert 930 <= covered <= 970


def test_intervals_of_differences_cover_too() -> None:
    """Two methods and one baseline on the same samples, with known critical footprints."""
    cost = 0.12 + 0.85 * BUDGETS[:-1]
    middles = (0.35, 0.45)

    def chances(difficulty: Floats) -> list[Floats]:
        """Of the methods at each budget, then of full attention, [S, 6] and [S, 1]."""
        places = [BUDGETS[:-1] - middle for middle in middles]
        return [0.97 * expit(p / 0.1 + difficulty) for p in [*places, np.array([0.6])]]

    *truth, full = (
        c.mean(axis=0) for c in chances(np.random.default_rng(1).normal(size=(200_000, 1)))
    )
    places = [critical(cost, t, np.ones(6), float(full[0]), 1, 0.9)[0] for t in truth]
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(1000):
        *scores, full = (rng.binomial(8, c) / 8 for c in chances(rng.normal(size=(48, 1))))
        left, right = (draws_of(np.concatenate([s, full], axis=1), cost) for s in scores)
        ends = interval(right - left, 48)
        covered += ends is not None and places[1] - places[0] in ends
    assert 930 <= covered <= 970


def test_a_cluster_per_sample_is_no_cluster() -> None:
    values = np.random.default_rng(5).random((9, 4)).round(1)
    values[2, 1] = np.nan
    scores = np.array([True, True, True, False])
    for alone, clustered in zip(
        resampled_means(values, scores), resampled_means(values, scores, np.arange(9)), strict=True
    ):
        np.testing.assert_allclose(alone, clustered, atol=1e-12)


def test_copies_of_a_sample_in_a_cluster_tell_no_more_than_the_sample() -> None:
    scores = (np.random.default_rng(6).random((8, 3)) < 0.7).astype(float)
    mask = np.ones(3, dtype=bool)
    means, counts = resampled_means(scores, mask)
    copied, more = resampled_means(scores.repeat(6, axis=0), mask, np.arange(8).repeat(6))
    np.testing.assert_allclose(copied, means, atol=1e-12)
    np.testing.assert_allclose(more, 6 * counts)


def test_samples_of_a_cluster_are_not_taken_for_independent() -> None:
    """The mean of 12 questions at six depths each, which mostly share their fate."""
    clusters = np.arange(12).repeat(6)
    covered = np.zeros(2)
    rng = np.random.default_rng(8)
    for _ in range(200):
        luck = np.sqrt(0.8) * rng.normal(size=12).repeat(6) + np.sqrt(0.2) * rng.normal(size=72)
        scores = (ndtr(luck) < 0.7).astype(float)[:, None]
        for i, known in enumerate((clusters, None)):
            means, _ = resampled_means(scores, np.array([True]), known)
            ends = interval(means[:, 0], len(by_cluster(scores, known)))
            covered[i] += ends is not None and 0.7 in ends
    assert covered[0] >= 184  # 92 %
    assert covered[1] <= 140  # 70 %


def test_a_report_draws_the_clusters_that_records_name() -> None:
    """Six copies of each sample: with clusters the intervals stay, without they shrink."""

    def report_of(copies: int, named: bool) -> Any:
        rows = []
        for question in range(8):
            for copy in range(copies):
                sample = question * copies + copy
                rows.append(record("full", 1.0, sample, 1.0))
                rows += [record("snapkv", b, sample, float(question < 10 * b)) for b in (0.2, 0.7)]
        frame = frame_of(rows)
        if named:
            frame["cluster"] = [f"question {sample // copies}" for sample in frame["sample"]]
        curve = report_records(frame).critical.iloc[1]
        return [curve["critical_footprint"], curve["ci_low"], curve["ci_high"]]

    alone = report_of(1, named=False)
    assert report_of(6, named=True) == pytest.approx(alone)
    value, low, high = report_of(6, named=False)
    assert value == pytest.approx(alone[0])
    assert high - low < 0.7 * (alone[2] - alone[1])


def test_methods_that_never_differed_may_yet_differ() -> None:
    """Columns share most of their imagined samples; each by itself is as it was alone."""
    passes = np.ones((32, 6))
    means, _ = resampled_means(passes, np.ones(6, dtype=bool))
    assert 0.01 < np.quantile(means[:, 0] - means[:, 1], 0.975) < 0.05
    for column in range(6):
        assert np.quantile(means[:, column], 0.025) == pytest.approx(0.925, abs=0.015)


@pytest.mark.parametrize("samples", [8, 16])
def test_differences_of_nearly_equal_methods_cover_at_a_perfect_baseline(samples: int) -> None:
    """Binary scores that mostly agree; with common imagined samples 80 to 90 % were covered."""
    cost = 0.05 + 0.9 * BUDGETS[:-1]
    means = [expit((BUDGETS[:-1] - middle) / 0.09) for middle in (0.40, 0.42)]
    truths = [critical(cost, mean, np.ones(6), 1.0, 1, 0.9)[0] for mean in means]
    rng = np.random.default_rng(4)
    columns = np.concatenate([[*means[0], 1], [*means[1], 1]])
    mask = np.tile(BUDGETS < 1, 2)
    covered = 0
    for _ in range(200):
        luck = np.sqrt(0.6) * rng.normal(size=(samples, 1))
        luck = luck + np.sqrt(0.4) * rng.normal(size=(samples, 14))
        scores = (ndtr(luck) < columns).astype(float)
        drawn, counts = resampled_means(scores, mask)
        costs = np.broadcast_to(cost, (len(drawn), 6))
        left, right = (
            critical_rows(costs, m[:, :-1], n[:, :-1], m[:, -1], n[:, -1], 0.9)
            for m, n in zip(np.split(drawn, 2, axis=1), np.split(counts, 2, axis=1), strict=True)
        )
        ends = interval(right - left, samples)
        covered += ends is not None and truths[1] - truths[0] in ends
    assert covered >= 186  # 93 %
