"""The statistics of a report: fitted curves, critical points and their uncertainty.

`build.py` calls these functions with arrays; nothing here knows a record or a file.
`docs/statistics.md` defines the quantities. P is the number of points of a curve (one per budget,
in order of cost: KV footprint or peak), R the number of bootstrap resamples, S the number of
samples of a task. Costs and scores are fractions.

**A mean** of a task with several subtasks is the mean over its subtasks, as in HELMET, so a sample
of a larger subtask counts less.

**Intervals** come from a paired bootstrap over samples, or over clusters of samples where samples
share a question. If subtasks are of unequal sizes, each is drawn by itself. There are two
corrections for few samples:

- They are expanded percentile intervals (Hesterberg 2015, arXiv 1411.5279). A bootstrap estimates
  the spread from the samples' own variance as if that were known exactly, so its percentiles are
  moved outwards by the ratio of a t interval to a normal one.
- Every resample also contains imagined samples: a passed and a failed one, with random weights of
  half a trial each on average (Jeffreys' prior for a share). A trial is a score of 0 or 1; a graded
  score counts as a fraction of a trial. Without them, 32 passes out of 32 would leave no doubt,
  although the true share may well be 0.92. The baseline gets none, because the ratio of a method to
  its baseline would then hardly change.

Most of an imagined weight is common to all methods and budgets; a small part is drawn for each
alone. Without that part, two methods that agree on all samples would differ by exactly 0 in every
resample. `docs/statistics.md` says how often the intervals cover the truth, and what was tried.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from scipy.special import ndtr, stdtrit

Floats = NDArray[np.float64]

RESAMPLES = 1000
BOOTSTRAP_SEED = 0
IMAGINED = 1.0  # trials added to a resample, half of them passed
GRADED = 3 / 4  # a graded score's share of a trial is its share of the variance to this power
ALONE = 1 / 5  # share of an imagined weight that each method and budget draws alone
FEW = 36  # of n samples, fewer than this, that part is only n / FEW as large
OUTSIDE = 0.05  # share of the probability that an interval leaves outside
BLOCK = 4_000_000  # resampled samples in memory at once, a few arrays of 8 bytes each
ROUNDING = 1e-9  # tolerance for a mean that equals its target but for rounding


class Status(StrEnum):
    """How a critical point was found."""

    REACHED = "reached"  # the curve crosses the threshold between measured points
    AT_MOST = "at_most"  # every measured point reaches the threshold
    EXTRAPOLATED = "extrapolated"  # only the baseline itself does


@dataclass(frozen=True)
class Interval:
    """A 95 % interval."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float | int) and self.low <= value <= self.high


def fit(score: Floats, weight: Floats, baseline: float, at: float) -> Floats:
    """Return the scores of the fitted curve [P + 1]: at the points, then at full attention.

    This is isotonic regression with weights: `weight` [P] samples at each point, `at` samples at
    the baseline. Points that score above the baseline are pooled with it, so the curve ends at or
    above the baseline, and the threshold is always reached.
    """
    y, w = np.append(score, baseline), np.append(weight, at)
    return np.asarray(isotonic_regression(y, weights=w).x, dtype=float)


def fit_rows(scores: Floats, weights: Floats) -> Floats:
    """Return the isotonic regression of each row of scores and weights [R, P], as [R, P].

    Each row equals scipy's result; all rows together are much faster. The value at i is the maximum
    over starts j <= i of the minimum over ends k >= i of the mean of the points j..k (the max-min
    formula, Barlow et al. 1972). Weights are positive.
    """
    rows, count = scores.shape
    zero = np.zeros((rows, 1))
    total = np.concatenate([zero, np.cumsum(scores * weights, axis=1)], axis=1)
    mass = np.concatenate([zero, np.cumsum(weights, axis=1)], axis=1)
    start, end = np.indices((count, count))
    inside = end >= start
    weight = np.where(inside, mass[:, None, 1:] - mass[:, :-1, None], 1.0)
    means = np.where(inside, (total[:, None, 1:] - total[:, :-1, None]) / weight, np.inf)
    lowest = np.minimum.accumulate(means[:, :, ::-1], axis=2)[:, :, ::-1]
    return np.asarray(np.where(inside, lowest, -np.inf).max(axis=1))


def cross(cost: Floats, fitted: Floats, target: Floats) -> Floats:
    """Return the cost [R] at which each curve first reaches its target [R], linear between points.

    Costs [R, P] must not fall. A curve ends at a cost of 1, so `fitted` is [R, P + 1].
    """
    x = np.concatenate([cost, np.ones((len(cost), 1))], axis=1)
    first = (fitted >= (target - ROUNDING)[:, None]).argmax(axis=1)
    before = np.maximum(first - 1, 0)
    row = np.arange(len(x))
    x0, y0, x1, y1 = x[row, before], fitted[row, before], x[row, first], fitted[row, first]
    rise = np.where(y1 > y0, y1 - y0, 1.0)
    part = np.minimum((target - y0) / rise, 1.0)
    return np.asarray(np.where(first == 0, x1, x0 + (x1 - x0) * part))


def critical(
    cost: Floats, score: Floats, weight: Floats, baseline: float, at: float, threshold: float
) -> tuple[float, Status]:
    """Return the smallest cost at which the fitted curve keeps `threshold` of the baseline.

    Points [P] are in order of cost; the baseline is positive. A cost above 1 counts as 1 (patched
    tokens can raise a peak that far): with that much memory one would run full attention.
    """
    fitted = fit(score, weight, baseline, at)
    target = np.array([threshold * baseline])
    value = float(cross(_in_order(cost[None]), fitted[None], target)[0])
    reach = fitted[:-1] >= target - ROUNDING
    if reach.all():
        return value, Status.AT_MOST
    return value, Status.REACHED if reach.any() else Status.EXTRAPOLATED


def critical_rows(
    cost: Floats, score: Floats, weight: Floats, baseline: Floats, at: Floats, threshold: float
) -> Floats:
    """Return `critical` of R resamples, from [R, P] and [R]; NaN where the baseline is 0.

    Points stay in the order of the whole sample, so that rounding does not swap two budgets of
    equal cost.
    """
    scores = np.concatenate([score, baseline[:, None]], axis=1)
    weights = np.concatenate([weight, at[:, None]], axis=1)
    found = cross(_in_order(cost), fit_rows(scores, weights), threshold * baseline)
    return np.where(baseline > 0, found, np.nan)


def _in_order(cost: Floats) -> Floats:
    return np.maximum.accumulate(np.minimum(cost, 1.0), axis=1)


def weights_of(there: NDArray[np.bool_], subtasks: NDArray[np.intp] | None) -> Floats:
    """Return the weights [S, C] with which the mean of a column is the mean over its subtasks.

    `there` [S, C] says which samples a column has, `subtasks` [S] numbers the subtask of each. A
    sample of the largest subtask weighs 1, and one that is missing 0.
    """
    weights = there.astype(float)
    if subtasks is not None:
        _, members = np.unique(subtasks, return_inverse=True)
        sizes = by_cluster(weights, members)
        weights *= (sizes.max(axis=0) / np.maximum(sizes, 1.0))[members]
    return weights


def weighted_means(values: Floats, subtasks: NDArray[np.intp] | None) -> Floats:
    """Return the mean over subtasks of each column [S, C]; NaN marks a missing sample."""
    weights = weights_of(~np.isnan(values), subtasks)
    sums = (np.nan_to_num(values) * weights).sum(axis=0)
    return np.asarray(sums / np.maximum(weights.sum(axis=0), 1.0))


def parts_of(
    count: int, clusters: NDArray[np.intp] | None, subtasks: NDArray[np.intp] | None
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return what is resampled: the unit of each of `count` samples, and the part of each unit.

    A unit is a cluster, or a sample where there are none. Units are drawn within their part. A
    subtask is a part if subtasks are of unequal sizes, each has two clusters at least, and none
    shares one with another; otherwise all samples are one part, in which a resample's mean over
    subtasks is one over samples.
    """
    each = np.arange(count) if clusters is None else clusters
    part = np.zeros(count, dtype=np.intp)
    if subtasks is not None:
        rows = [np.flatnonzero(subtasks == name) for name in np.unique(subtasks)]
        unequal = len({len(inside) for inside in rows}) > 1
        found = [np.unique(each[inside]) for inside in rows]
        shared = sum(map(len, found)) > len(np.unique(each))
        if unequal and not shared and all(len(inside) > 1 for inside in found):
            for number, inside in enumerate(rows):
                part[inside] = number
    pairs, units = np.unique(np.stack([part, each]), axis=1, return_inverse=True)
    return units.reshape(-1), pairs[0]


def independent(
    there: NDArray[np.bool_],
    clusters: NDArray[np.intp] | None,
    subtasks: NDArray[np.intp] | None = None,
) -> list[tuple[int, ...]]:
    """Return how many units each part of each column [S, C] has, without parts that have none."""
    units, part = parts_of(len(there), clusters, subtasks)
    present = by_cluster(there.astype(float), units) > 0
    counts = np.stack([present[part == number].sum(axis=0) for number in np.unique(part)])
    return [tuple(column[column > 0].tolist()) for column in counts.T]


def resamples(
    samples: int, count: int = RESAMPLES, seed: int | Sequence[int] = BOOTSTRAP_SEED
) -> Iterator[Floats]:
    """Yield how often each resample draws each of `samples` samples, in blocks [rows, S].

    Equal arguments give equal resamples. Blocks keep memory small if there are many samples.
    """
    rng = np.random.default_rng(seed)
    rows = max(1, min(count, BLOCK // samples))
    for start in range(0, count, rows):
        size = min(rows, count - start)
        drawn = rng.integers(0, samples, (size, samples)) + samples * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * samples)
        yield counts.reshape(size, samples).astype(float)


def resampled_means(
    values: Floats,
    scores: NDArray[np.bool_],
    clusters: NDArray[np.intp] | None = None,
    subtasks: NDArray[np.intp] | None = None,
) -> tuple[Floats, Floats]:
    """Return the means of columns [S, C] in every resample, and their sample counts; both [R, C].

    NaN marks a sample that a column lacks. `clusters` [S] numbers the cluster of each sample, and
    clusters are drawn whole; without it, samples are drawn. With `subtasks` [S], means are means
    over subtasks, and `parts_of` says what is drawn apart; the count is then that of the samples of
    one task that tell as much. Columns that are `scores` [C] get the imagined samples that the
    module describes, as large as a mean cluster. A resample that draws none of a column's samples
    takes the column's overall mean, with a weight near zero.
    """
    there = ~np.isnan(values)
    weight = weights_of(there, subtasks)
    units, part = parts_of(len(values), clusters, subtasks)
    known = by_cluster(np.where(there, values, 0.0) * weight, units)
    size, samples = by_cluster(weight, units), by_cluster(there.astype(float), units)
    means, variance = np.zeros((RESAMPLES, 1)), np.zeros((RESAMPLES, 1))
    for number in np.unique(part).tolist():
        inside = part == number
        totals = [each[inside] for each in (known, size, samples)]
        seed = BOOTSTRAP_SEED if number == 0 else [BOOTSTRAP_SEED, 1, number]
        blocks = [
            [block @ total for total in totals] for block in resamples(len(totals[0]), seed=seed)
        ]
        sums, sizes, counts = (np.concatenate(drawn) for drawn in zip(*blocks, strict=True))
        whole, of_part = size.sum(axis=0), totals[1].sum(axis=0)
        overall = totals[0].sum(axis=0) / np.maximum(of_part, 1.0)
        share = of_part / np.maximum(whole, 1.0)
        means = means + share * np.where(counts > 0, sums / np.maximum(sizes, 1.0), overall)
        variance = variance + share**2 / np.maximum(counts, 1e-6)
    if part.any():
        counts = 1 / np.maximum(variance, 1e-6)
    known, size, samples = known[:, scores], size[:, scores], samples[:, scores]
    weights = imagined(trials_in_a_sample(known, size), len(known), (len(means), known.shape[1]))
    failed, passed = weights * samples.sum() / max(1, np.count_nonzero(samples))
    drawn = counts[:, scores]
    smoothed = (means[:, scores] * drawn + passed) / np.maximum(drawn + failed + passed, 1e-6)
    means[:, scores] = np.where(drawn > 0, smoothed, means[:, scores])
    return means, np.maximum(counts, 1e-6)


def by_cluster(values: Floats, clusters: NDArray[np.intp] | None) -> Floats:
    """Return the sums of rows [S, C] over each cluster; without clusters, the rows themselves."""
    if clusters is None:
        return values
    names, members = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, members, values)
    return sums


def imagined(trials: float, samples: int, shape: tuple[int, int]) -> Floats:
    """Return the weights [2, R, C] of failed and of passed imagined samples, for `shape` (R, C).

    Each weight is half of `trials` on average, in units of a sample: a gamma number that a
    resample's columns share, plus one that each column draws alone. With few `samples` the latter
    is made smaller, because it would carry a method across the threshold where it should only shift
    it a little. (Otherwise the sum has a gamma distribution too.)
    """
    rng = np.random.default_rng([BOOTSTRAP_SEED, 1])
    half = IMAGINED * trials / 2
    scale = min(1, samples / FEW)
    common = rng.gamma(half * (1 - ALONE * scale), size=(2, shape[0], 1))
    return np.asarray(common + scale * rng.gamma(half * ALONE, size=(2, *shape)))


def trials_in_a_sample(known: Floats, size: Floats) -> float:
    """Return how many samples carry as much information as one score of 0 or 1: from 0 to 1.

    `known` and `size` [S, C] are the sums and the numbers of scores in a sample, or in a cluster.
    Scores of 0 or 1 with mean m have the variance m (1 - m); graded scores and means of clusters
    have less. The result is 1 if all scores are 0 or all are 1, because nothing is known about
    their spread.
    """
    there = size > 0
    each = known / np.maximum(size, 1.0)
    count = np.maximum(there.sum(axis=0), 1)
    mean = each.sum(axis=0) / count
    spread = (each**2).sum(axis=0) / count - mean**2
    most = (mean * (1 - mean)).sum()
    return float(np.clip(spread.sum() / most, 0, 1) ** GRADED) if most > ROUNDING else 1.0


def interval(draws: Floats, samples: int | Sequence[int]) -> Interval | None:
    """Return the expanded 95 % percentile interval of bootstrap draws [R] over `samples` samples.

    With clusters, `samples` is how many clusters there are. With several numbers, the draws are
    means over parts of so many, each drawn by itself; parts are taken to vary alike (Welch). Draws
    that are NaN are left out. None if a part has fewer than two samples, or if there is no draw.
    """
    known = draws[~np.isnan(draws)]
    n = np.atleast_1d(samples)
    if not len(n) or n.min() < 2 or not len(known):
        return None
    widening, freedom = n[0] / (n[0] - 1), n[0] - 1
    if len(n) > 1:
        widening = (1 / n).sum() / ((n - 1) / n**2).sum()
        freedom = (1 / n).sum() ** 2 / (1 / (n**2 * (n - 1))).sum()
    further = np.sqrt(widening) * stdtrit(freedom, OUTSIDE / 2)
    outside = float(ndtr(further))
    return Interval(*np.quantile(known, [outside, 1 - outside]).tolist())
