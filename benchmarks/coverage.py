"""How often the intervals of a report hold the truth, and how wide they are, on made-up samples.

    python benchmarks/coverage.py [--replicates 200] [--samples 8,16,32,100] [--only perfect]

Every replicate draws the scores of S samples under full attention and under two methods at six
budgets, from distributions whose means are known, and computes what a report computes of them:
the critical footprint of each method, their difference, and the 95 % interval of each. The truth
is the critical footprint of the true means, by the same fit. `cover` is the share of replicates
whose interval holds the truth, in per cent, of the first method's critical footprint, and of the
difference; `width` is the mean width of those intervals in percentage points of the footprint.
With 200 replicates a share of 95 % has a standard error of 1.5, with 1,000 of 0.7. All scenarios of
a size are drawn from the same random numbers, so what one of them shows too high, others do too.

How scores are drawn: every cell (sample, method, budget) has a luck, a standard normal number that
is a sum of three: one of the sample, shared by all methods and budgets (`shared` of the variance),
one of the sample under this method, shared by its budgets (`own`), and one of the cell. Full
attention is a method by itself. The luck's rank is looked up in the score distribution of the cell:
0 or 1 (binary), or parts of eight from a beta-binomial distribution (graded; its variance is
`spread` of the binary one's, at least an eighth). So methods are paired over samples, easy samples
are easy for all, and the means are exact. With clusters, `tied` of every part's variance is common
to the samples of a cluster, as where one question is asked at several depths.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, ndtr
from scipy.stats import betabinom

from kvbench.report.statistics import (
    Floats,
    Interval,
    by_cluster,
    critical,
    critical_rows,
    interval,
    resampled_means,
)

BUDGETS = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
THRESHOLD = 0.9
LEVELS = 20_000  # ranks that a score distribution is tabulated at
PARTS = 8  # of a graded score


@dataclass(frozen=True)
class Scenario:
    """Two methods on one task, and how their samples' scores hang together."""

    name: str
    baseline: float = 1.0  # mean score of full attention
    curve: str = "rising"  # see `shape`
    apart: float = 0.0  # by how much more budget the second method needs
    dearer: float = 0.0  # by how much its footprint is larger at every budget
    graded: bool = False
    spread: float = 0.4  # variance of a graded score, over p (1 - p)
    shared: float = 0.6
    own: float = 0.2
    depths: int = 1  # samples of a cluster
    tied: float = 0.8


def shape(curve: str, budget: Floats) -> Floats:
    """Mean score at each budget, as a share of the baseline's."""
    if curve == "rising":  # crosses the threshold between 0.5 and 0.7
        return np.asarray(expit((budget - 0.4) / 0.09))
    if curve == "early":  # crosses between 0.2 and 0.3, and is flat afterwards
        return np.asarray(0.99 * expit((budget - 0.15) / 0.05))
    if curve == "flat":  # comes near the threshold soon, and crosses it late
        return np.asarray(0.8 + 0.12 * budget)
    if curve == "close":  # ends at 0.87 at the largest budget
        return np.asarray(0.8 + 0.08 * budget)
    if curve == "short":  # ends at 0.70
        return np.asarray(0.25 + 0.5 * budget)
    if curve == "nearly":  # ends at 0.85
        return np.asarray(0.40 + 0.5 * budget)
    raise ValueError(f"no curve '{curve}'")


class Made:
    """A scenario with its score distributions tabulated, and the true values."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.costs = [0.05 + 0.9 * BUDGETS + more for more in (0.0, scenario.dearer)]
        means = [
            scenario.baseline * shape(scenario.curve, BUDGETS - apart)
            for apart in (0.0, scenario.apart)
        ]
        columns = np.concatenate([*means, [scenario.baseline]])
        self.tables = np.stack([self._table(mean) for mean in columns])
        *scores, full = np.split(self.tables.mean(axis=1), [len(BUDGETS), 2 * len(BUDGETS)])
        ones = np.ones(len(BUDGETS))
        found = [
            critical(cost, score, ones, float(full[0]), 1, THRESHOLD)
            for cost, score in zip(self.costs, scores, strict=True)
        ]
        self.truths = [value for value, _ in found]
        self.statuses = [status for _, status in found]

    def _table(self, mean: float) -> Floats:
        """Scores of a cell with this mean at evenly spaced ranks, from the lowest [LEVELS]."""
        ranks = (np.arange(LEVELS) + 0.5) / LEVELS
        if not self.scenario.graded or mean >= 1:
            return np.asarray(ranks > 1 - mean, dtype=float)
        # of n parts with beta weight k the variance is p (1 - p) (k + n) / (n (k + 1))
        weight = (1 - self.scenario.spread) / (self.scenario.spread - 1 / PARTS)
        law = betabinom(PARTS, mean * weight, (1 - mean) * weight)
        return np.asarray(np.searchsorted(law.cdf(np.arange(PARTS)), ranks) / PARTS, dtype=float)

    def draw(self, rng: np.random.Generator, samples: int) -> Floats:
        """Scores [samples, 13]: of the first method, the second, and full attention."""
        made, count = self.scenario, len(BUDGETS)
        clusters = -(-samples // made.depths)

        def luck(columns: int) -> Floats:
            mine = rng.normal(size=(samples, columns))
            if made.depths == 1:
                return mine
            ours = rng.normal(size=(clusters, columns)).repeat(made.depths, axis=0)[:samples]
            both = np.sqrt(made.tied) * ours + np.sqrt(1 - made.tied) * mine
            return np.asarray(both, dtype=float)

        method = luck(3).repeat([count, count, 1], axis=1)
        cell = luck(2 * count + 1)
        rest = 1 - made.shared - made.own
        total = np.sqrt(made.shared) * luck(1) + np.sqrt(made.own) * method + np.sqrt(rest) * cell
        ranks = np.minimum((ndtr(total) * LEVELS).astype(int), LEVELS - 1)
        return np.asarray(self.tables[np.arange(2 * count + 1), ranks], dtype=float)

    def clusters(self, samples: int) -> NDArray[np.intp] | None:
        """The cluster of each sample, or None where samples are independent."""
        depths = self.scenario.depths
        return None if depths == 1 else np.arange(samples) // depths


def intervals_of(made: Made, values: Floats) -> list[Interval | None]:
    """Of the first critical footprint, the second, and second minus first, as a report does."""
    count, clusters = len(BUDGETS), made.clusters(len(values))
    full = values[:, -1:]
    table = np.concatenate([values[:, :count], full, values[:, count:]], axis=1)
    scores = np.tile(np.arange(count + 1) < count, 2)
    means, counts = resampled_means(table, scores, clusters)
    draws = []
    for cost, part in zip(made.costs, (slice(0, count + 1), slice(count + 1, None)), strict=True):
        mean, weight = means[:, part], counts[:, part]
        costs = np.broadcast_to(cost, (len(mean), count))
        draws.append(
            critical_rows(
                costs, mean[:, :-1], weight[:, :-1], mean[:, -1], weight[:, -1], THRESHOLD
            )
        )
    samples = len(by_cluster(full, clusters))
    return [interval(found, samples) for found in (*draws, draws[1] - draws[0])]


def scenarios() -> Iterator[Scenario]:
    """All that is tabulated."""
    for baseline, name in ((1.0, "perfect"), (0.9, "at 0.9"), (0.7, "at 0.7")):
        for graded in (False, True):
            made = Scenario(
                f"{name}, {'graded' if graded else 'binary'}, ", baseline, graded=graded
            )

            def named(text: str, made: Scenario = made, **changes: Any) -> Scenario:
                return replace(made, name=made.name + text, **changes)

            yield named("far apart", apart=0.30)
            yield named("apart", apart=0.10)
            for curve in ("rising", "early", "flat"):
                yield named(f"near, {curve}", curve=curve, apart=0.01)
            yield named("nearer", apart=0.01, dearer=0.01, shared=0.85, own=0.05)
            for curve in ("close", "nearly", "short"):
                yield named(f"none reaches, {curve}", curve=curve, apart=0.02)
            if baseline == 1 and not graded:
                same: dict[str, Any] = {"apart": 0.04, "shared": 0.97, "own": 0.01}
                for curve in ("rising", "flat", "short"):
                    yield named(f"alike, {curve}", curve=curve, **same)
    for depths in (3, 6):
        for graded in (False, True):
            kind = "graded" if graded else "binary"
            name = f"at 0.9, {kind}, {depths} depths"
            yield Scenario(name, 0.9, graded=graded, apart=0.02, depths=depths)


def measure(made: Made, samples: int, replicates: int, seed: int) -> Floats:
    """Coverage, then mean width, of the three intervals, as shares [2, 3].

    NaN where samples are of a single cluster: there are no intervals.
    """
    rng = np.random.default_rng([seed, samples])
    truths = np.array([*made.truths, made.truths[1] - made.truths[0]])
    inside, widths = np.zeros(3), np.zeros(3)
    for _ in range(replicates):
        found = intervals_of(made, made.draw(rng, samples))
        ends = np.array([(i.low, i.high) if i else (np.nan, np.nan) for i in found])
        inside += (ends[:, 0] - 1e-9 <= truths) & (truths <= ends[:, 1] + 1e-9)
        widths += ends[:, 1] - ends[:, 0]
    return np.stack([inside, widths]) / replicates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=200)
    parser.add_argument("--samples", default="8,16,32,100")
    parser.add_argument("--only", default="", help="scenarios whose name holds this text")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.samples.split(",")]
    print(f"{'':38} {'truth':>12} " + "".join(f"{f'{s} samples':>30}" for s in sizes))
    head = f"{'cover':>14} {'width':>14} "
    print(f"{'scenario':38} {'crit':>5} {'diff':>6} " + head * len(sizes))
    print(f"{'':38} {'':12} " + f"{'crit':>8} {'diff':>5} {'crit':>8} {'diff':>5} " * len(sizes))
    for scenario in scenarios():
        if arguments.only not in scenario.name:
            continue
        made = Made(scenario)
        first, second = made.truths
        text = f"{scenario.name:38} {100 * first:5.1f} {100 * (second - first):6.2f} "
        for size in sizes:
            inside, widths = 100 * measure(made, size, arguments.replicates, arguments.seed)
            text += f"{inside[0]:8.1f} {inside[2]:5.1f} {widths[0]:8.1f} {widths[2]:5.1f} "
        print(text, flush=True)


if __name__ == "__main__":
    main()
