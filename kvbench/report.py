"""From records to curves and critical footprints (ALGORITHMS, section 2). Needs no torch."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.errors import InputError
from kvbench.plan import BASELINE
from kvbench.results import Record, find_runs, is_run, read_records

Floats = NDArray[np.float64]

RESAMPLES = 1000
BOOTSTRAP_SEED = 0
INTERVAL = (2.5, 97.5)  # per cent
FEWEST_SHARE = 0.5  # of a curve's samples that a budget needs to count as a point of it


class Status(StrEnum):
    """How the critical footprint was found."""

    REACHED = "reached"  # the curve crosses the threshold between measured points
    AT_MOST = "at_most"  # every measured point reaches the threshold
    EXTRAPOLATED = "extrapolated"  # only the baseline itself does


@dataclass(frozen=True)
class Point:
    """One budget of a curve: means over the curve's samples, fractions of full attention's."""

    budget: float
    kv_footprint: float
    score: float
    kv_peak: float
    samples: int


@dataclass(frozen=True)
class Setting:
    """What the curves of one picture share."""

    model: str
    task: str
    context: int  # tokens
    seed: int


@dataclass(frozen=True)
class Curve:
    """A method on a task, from its smallest footprint to its largest, and what follows from it."""

    setting: Setting
    method: str
    family: str
    options: dict[str, Any]
    prefill_chunk: int | None
    label: str  # the method, with whatever tells it from another curve of the same method
    baseline: float
    threshold: float
    points: tuple[Point, ...]
    critical_footprint: float | None  # None where the baseline is 0: nothing to lose
    ci_low: float | None
    ci_high: float | None
    status: Status | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-serialisable; footprints and scores in 0..1."""
        return {
            "model": self.setting.model,
            "task": self.setting.task,
            "context": self.setting.context,
            "seed": self.setting.seed,
            "method": self.method,
            "family": self.family,
            "options": self.options,
            "prefill_chunk": self.prefill_chunk,
            "label": self.label,
            "baseline": self.baseline,
            "threshold": self.threshold,
            "critical_footprint": self.critical_footprint,
            "ci_low": self.ci_low,
            "ci_high": self.ci_high,
            "status": self.status,
            "samples": min(point.samples for point in self.points),
            "points": [vars(point) for point in self.points],
        }


@dataclass(frozen=True)
class Report:
    """All curves of some runs, by setting, and what a reader should know beside them."""

    curves: tuple[Curve, ...]
    notes: tuple[str, ...]

    def settings(self) -> list[Setting]:
        """The settings in order of first appearance: one table and one picture each."""
        return list(dict.fromkeys(curve.setting for curve in self.curves))

    def of(self, setting: Setting) -> list[Curve]:
        """The curves of a setting."""
        return [curve for curve in self.curves if curve.setting == setting]


SeriesKey = tuple[Setting, str, str, int | None]  # setting, method, options as JSON, prefill chunk
Series = dict[float, dict[int, Record]]  # budget -> sample index -> record


def find_run_folders(names: Sequence[str], home: Path) -> list[Path]:
    """The run directories a user names; without names, the one in `home` written to last.

    A name is a run directory, a folder of run directories, or a name inside `home`. Raises
    InputError where there is no run.
    """
    if not names:
        runs = find_runs(home)
        if not runs:
            raise InputError(f"no run in {home}; make one with 'kvbench run', or name one")
        return runs[-1:]
    folders: list[Path] = []
    for name in names:
        folder = Path(name)
        if not folder.exists() and (home / name).is_dir():
            folder = home / name
        if not folder.is_dir():
            known = ", ".join(run.name for run in find_runs(home)[-3:])
            raise InputError(
                f"no run directory '{name}'" + (f"; in {home} are: {known}" if known else "")
            )
        inside = [folder] if is_run(folder) else find_runs(folder)
        if not inside:
            raise InputError(f"{folder} holds no results of kvbench run")
        folders += inside
    return list(dict.fromkeys(folders))


def make_report(folders: Sequence[Path], threshold: float) -> Report:
    """Read runs and compute their curves; `threshold` is the share of the baseline to be kept.

    Raises InputError if there is nothing to report: no record, or no baseline for any.
    """
    records = [record for folder in folders for record in read_records(folder)]
    notes: list[str] = []
    names = ", ".join(str(folder) for folder in folders)
    if not records:
        raise InputError(f"{names}: no sample is finished yet; continue it with 'kvbench run'")
    measured = [record for record in records if record.error is None]
    if len(measured) < len(records):
        notes.append(f"{len(records) - len(measured)} cells failed and are left out")
    series, repeated = _group(measured)
    if repeated:
        notes.append(f"{repeated} cells were measured more than once; the latest counts")

    curves: list[Curve] = []
    for setting in sorted({key[0] for key in series}, key=lambda s: (s.task, s.model, s.context)):
        keys = [key for key in series if key[0] == setting]
        baseline_key = next((key for key in keys if key[1] == BASELINE), None)
        if baseline_key is None:
            notes.append(
                f"{setting.model}/{setting.task}: full attention has not been measured, so there "
                "is no baseline; continue the run with 'kvbench run'"
            )
            continue
        baseline = {i: r.score or 0.0 for i, r in series[baseline_key][1.0].items()}
        names_of = _labels(keys)
        for key in sorted(keys, key=lambda k: (k[1] != BASELINE, k[1], k[2], k[3] or 0)):
            curve = _curve(key, names_of[key], series[key], baseline, threshold, notes)
            if curve is not None:
                curves.append(curve)
    if not curves:
        raise InputError(f"{names}: nothing to report; " + "; ".join(notes))
    return Report(tuple(curves), tuple(notes))


def _group(records: Iterable[Record]) -> tuple[dict[SeriesKey, Series], int]:
    series: dict[SeriesKey, Series] = defaultdict(lambda: defaultdict(dict))
    repeated = 0
    for r in records:
        setting = Setting(r.model, r.task, r.context, r.sample_seed)
        options = json.dumps(r.options, sort_keys=True)
        cells = series[setting, r.method, options, r.prefill_chunk][r.budget]
        known = cells.get(r.sample)
        repeated += known is not None
        if known is None or known.finished < r.finished:
            cells[r.sample] = r
    return series, repeated


def _labels(keys: Sequence[SeriesKey]) -> dict[SeriesKey, str]:
    """Names for curves: the method's, and where needed the options or prefill chunk that differ."""
    labels = {}
    for key in keys:
        _, method, options, chunk = key
        same = [k for k in keys if k[1] == method]
        mine: dict[str, Any] = json.loads(options)
        others: list[dict[str, Any]] = [json.loads(k[2]) for k in same]
        differing = [
            f"{name}={value}"
            for name, value in mine.items()
            if any(other.get(name) != value for other in others)
        ]
        if len({k[3] for k in same}) > 1:
            differing.append(f"chunk {chunk}")
        labels[key] = f"{method} ({', '.join(differing)})" if differing else method
    return labels


def _curve(
    key: SeriesKey,
    label: str,
    series: Series,
    baseline: dict[int, float],
    threshold: float,
    notes: list[str],
) -> Curve | None:
    """The curve of one series over the samples that all its budgets and the baseline share."""
    setting, method, options, chunk = key
    family = next(iter(next(iter(series.values())).values())).family
    shared = {budget: cells.keys() & baseline.keys() for budget, cells in series.items()}
    most = max(len(samples) for samples in shared.values())
    kept = [b for b, samples in shared.items() if samples and len(samples) >= FEWEST_SHARE * most]
    left_out = sorted(set(series) - set(kept))
    where = f"{setting.model}/{setting.task}/{label}"
    if left_out:
        budgets = ", ".join(f"{b:g}" for b in left_out)
        notes.append(f"{where}: too few samples at budget {budgets}, left out")
    samples = sorted(set.intersection(*(set(shared[b]) for b in kept))) if kept else []
    if not samples:
        notes.append(f"{where}: no sample that the baseline has too, left out")
        return None
    unshared = len(set().union(*(series[b].keys() for b in kept))) - len(samples)
    if unshared:
        notes.append(f"{where}: {unshared} samples that not every budget has yet are left out")

    def table(value: Callable[[Record], float | None]) -> Floats:
        return np.array([[value(series[b][i]) for b in kept] for i in samples], dtype=float)

    footprints, scores = table(lambda r: r.kv_footprint), table(lambda r: r.score)
    peaks = table(lambda r: r.kv_peak)
    order = np.argsort(footprints.mean(axis=0), kind="stable")
    footprints, scores, peaks = footprints[:, order], scores[:, order], peaks[:, order]
    points = tuple(
        Point(kept[column], x, y, peak, len(samples))
        for column, x, y, peak in zip(
            order.tolist(),
            footprints.mean(axis=0).tolist(),
            scores.mean(axis=0).tolist(),
            peaks.mean(axis=0).tolist(),
            strict=True,
        )
    )
    full = np.array([baseline[i] for i in samples])
    value, status = critical(
        [(p.kv_footprint, p.score) for p in points], float(full.mean()), threshold
    )
    low, high = (None, None) if value is None else _interval(footprints, scores, full, threshold)
    return Curve(
        setting,
        method,
        family,
        json.loads(options),
        chunk,
        label,
        float(full.mean()),
        threshold,
        points,
        value,
        low,
        high,
        status,
    )


def critical(
    points: Sequence[tuple[float, float]], baseline: float, threshold: float
) -> tuple[float | None, Status | None]:
    """The smallest footprint at which the curve keeps `threshold` of the baseline's score.

    `points` are (footprint, score) pairs in order of footprint. The curve is linear between them
    and ends in (1, baseline). (None, None) where the baseline is 0.
    """
    if baseline <= 0:
        return None, None
    x, y = np.array(points, dtype=float).T
    value = float(_crossing(x[None], y[None], np.array([baseline]), threshold)[0])
    reach = y >= _target(np.array(baseline), threshold)
    if reach.all():
        return value, Status.AT_MOST
    return value, Status.REACHED if reach.any() else Status.EXTRAPOLATED


def _target(baseline: Floats, threshold: float) -> Floats:
    """The score to reach, less what rounding of a mean may take away."""
    return np.asarray(threshold * baseline - 1e-9)


def _crossing(x: Floats, y: Floats, baseline: Floats, threshold: float) -> Floats:
    """For each of R curves x, y [R, P], in order of footprint, the first crossing; [R]."""
    ends = np.maximum(x[:, -1:], 1.0)
    x = np.concatenate([x, ends], axis=1)
    y = np.concatenate([y, baseline[:, None]], axis=1)
    target = _target(baseline, threshold)
    first = (y >= target[:, None]).argmax(axis=1)
    row = np.arange(len(x))
    before = np.maximum(first - 1, 0)
    x0, y0, x1, y1 = x[row, before], y[row, before], x[row, first], y[row, first]
    rise = np.where(y1 > y0, y1 - y0, 1.0)
    found = np.where(first == 0, x1, x0 + (x1 - x0) * (target - y0) / rise)
    return np.asarray(found)


def _interval(
    footprints: Floats, scores: Floats, baseline: Floats, threshold: float
) -> tuple[float, float]:
    """95 % percentile bootstrap over samples, tables [S, P] and baseline [S].

    The seed is fixed and the samples are in order of index, so curves over equal samples see equal
    resamples: their differences are paired. Resamples in which the baseline is 0 are left out.
    """
    count = len(baseline)
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    resampled = weights @ baseline
    weights, resampled = weights[resampled > 0], resampled[resampled > 0]
    x = np.sort(weights @ footprints, axis=1)
    found = _crossing(x, weights @ scores, resampled, threshold)
    low, high = np.percentile(found, INTERVAL)
    return float(low), float(high)
