"""Records of several seeds in one report: pooled, paired by seed and sample, in clusters."""

import numpy as np
import pytest
from helpers.records import record

from kvbench.records import Record
from kvbench.report.build import Curve, Report, differences, report_records
from kvbench.report.page import render


def of(report: Report, method: str) -> Curve:
    (curve,) = [curve for curve in report.curves if curve.method == method]
    return curve


def made(seeds: range, samples: int) -> list[Record]:
    """The baseline passes all; the method's scores rise with seed and sample."""
    return [
        record(method, budget, sample, score, sample_seed=seed)
        for seed in seeds
        for sample in range(samples)
        for method, budget, score in (
            ("full", 1.0, 1.0),
            ("snapkv", 0.5, (seed + sample) % 2),
            ("snapkv", 0.25, float(seed == 2)),
        )
    ]


def test_means_and_critical_footprints_are_over_all_seeds() -> None:
    report = report_records(made(range(3), 2), threshold=0.5)
    (setting,) = report.settings()
    assert (setting.seed, setting.seeds) == ("0,1,2", "seeds 0,1,2")
    curve = of(report, "snapkv")
    # budget 0.5: seeds 0, 1, 2 with samples 0, 1 score 0 1, 1 0, 0 1; budget 0.25: 0 0, 0 0, 1 1
    assert [(p.budget, p.score, p.samples) for p in curve.points] == [
        (0.25, 1 / 3, 6),
        (0.5, 0.5, 6),
    ]
    assert curve.samples == 6
    assert curve.footprint is not None
    assert curve.footprint.value == 0.5
    assert curve.footprint.independent == (6,)
    assert report.critical["seed"].unique().tolist() == ["0,1,2"]


def test_seeds_of_several_runs_are_pooled_too_and_one_seed_stays_a_number() -> None:
    several = made(range(3), 2)
    alone = [r for r in several if r.sample_seed == 1]
    report = report_records(alone)
    assert report.settings()[0].seed == 1
    assert report.critical["seed"].dtype == "int64"
    renamed = [record(r.method, r.budget, r.sample, r.score, sample_seed=0) for r in alone]
    other = report_records(renamed)
    for left, right in zip(report.curves, other.curves, strict=True):
        assert left.points == right.points
        assert left.footprint == right.footprint


def read(seeds: range, **changes: object) -> list[Record]:
    """Eight samples of a file; the method draws nothing, so every seed gives the same."""
    scores = [1, 0, 1, 1, 0, 1, 1, 1]
    return [
        record(method, budget, sample, score, sample_seed=seed, sample_code=f"c{sample}", **changes)
        for seed in seeds
        for sample, passed in enumerate(scores)
        for method, budget, score in (("full", 1.0, 1.0), ("snapkv", 0.5, float(passed)))
    ]


def test_a_question_that_is_read_is_one_cluster_under_all_seeds() -> None:
    once, thrice = report_records(read(range(1))), report_records(read(range(3)))
    one, three = of(once, "snapkv"), of(thrice, "snapkv")
    assert (one.samples, three.samples) == (8, 24)
    assert one.footprint is not None
    assert three.footprint is not None
    # rows that only repeat others say nothing more: eight questions, and the same interval
    assert one.footprint.independent == three.footprint.independent == (8,)
    assert three.footprint.value == pytest.approx(one.footprint.value)
    assert three.footprint.draws == pytest.approx(one.footprint.draws)
    assert one.points[0].score_interval is not None
    assert three.points[0].score_interval is not None
    assert three.points[0].score_interval.low == pytest.approx(one.points[0].score_interval.low)
    assert any("intervals of 8 clusters of samples are rough" in note for note in thrice.notes)


def test_clusters_that_a_file_names_hold_the_rows_of_all_seeds() -> None:
    named = [
        record(r.method, r.budget, r.sample, r.score, **{**changed, "cluster": f"q{r.sample // 4}"})
        for r in read(range(3))
        for changed in [{"sample_seed": r.sample_seed, "sample_code": r.sample_code}]
    ]
    curve = of(report_records(named), "snapkv")
    assert curve.footprint is not None
    assert curve.footprint.independent == (2,)


def test_clusters_of_samples_that_are_made_are_apart_under_each_seed() -> None:
    rows = [
        record(method, budget, sample, 1.0, sample_seed=seed, cluster=f"q{sample // 2}")
        for seed in range(3)
        for sample in range(4)
        for method, budget in (("full", 1.0), ("snapkv", 0.5))
    ]
    curve = of(report_records(rows), "snapkv")
    assert curve.footprint is not None
    assert curve.footprint.independent == (6,)  # two clusters of each of three seeds


def test_methods_are_paired_by_seed_and_sample() -> None:
    """Two methods of equal scores by sample, but of other seeds, would differ if paired wrongly."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(4):
        for sample in range(10):
            score = float(rng.random() < 0.5)
            rows += [record("full", 1.0, sample, 1.0, sample_seed=seed)]
            rows += [record(m, 0.5, sample, score, sample_seed=seed) for m in ("snapkv", "knorm")]
    report = report_records(rows[::-1])  # in any order
    (found,) = differences(report.curves)
    assert found.value == 0
    assert found.interval is not None
    assert 0 in found.interval
    wide = of(report, "snapkv").footprint
    assert wide is not None
    assert wide.interval is not None
    assert found.interval.high - found.interval.low < 0.5 * (wide.interval.high - wide.interval.low)


def test_a_sample_that_one_seed_lacks_is_left_out_of_that_seed_only() -> None:
    rows = [r for r in made(range(2), 3) if (r.method, r.sample_seed, r.sample) != ("full", 1, 2)]
    report = report_records(rows)
    assert of(report, "snapkv").samples == 5
    assert any("2 cells of samples that the baseline lacks" in note for note in report.notes)


def test_the_page_names_seed_and_sample() -> None:
    page = render(report_records(made(range(2), 2)), [])
    assert "m, 100 tokens, seeds 0,1" in page
    assert '"1, seed 0"' in page
    assert '"1, seed 1"' in page
