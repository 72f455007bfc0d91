"""From records to curves, critical footprints and what tells methods apart. Needs no torch.

What a run directory holds becomes curves here; the statistics are in `curves.py`. Tables, pictures
and the page are made from a `Report` by `tables.py`, `figures.py` and `html.py`.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.errors import InputError
from kvbench.records import BASELINE, Record, find_runs, is_run, read_records, read_settings
from kvbench.report.statistics import (
    Floats,
    Interval,
    Status,
    critical,
    critical_rows,
    fit,
    interval,
    intervals,
    resampled_means,
)

FEWEST_SHARE = 0.5  # of a curve's samples that a budget needs to count as a point of it
FEW_SAMPLES = 10  # an interval from fewer is rough
FILE_HASH = " sha256:"  # before the hash, in an option of a record that is a file

SeriesKey = tuple[
    "Setting", str, str, int | None
]  # setting, method, options as JSON, prefill chunk
Series = dict[float, dict[int, Record]]  # budget -> sample index -> record


@dataclass(frozen=True)
class Point:
    """One budget of a curve: means over its samples, costs as fractions of full attention's."""

    budget: float
    kv_footprint: float
    score: float
    score_interval: Interval | None
    kv_peak: float | None
    kv_reads: float | None
    kv_bytes_peak: float | None  # bytes
    samples: int


@dataclass(frozen=True)
class Critical:
    """The smallest cost that keeps the threshold, and its bootstrap draws [R]."""

    value: float
    status: Status
    interval: Interval | None
    draws: Floats = field(repr=False, compare=False)


@dataclass(frozen=True)
class Setting:
    """What the curves of one picture share."""

    model: str
    task: str
    context: int  # tokens
    seed: int


@dataclass(frozen=True)
class Curve:
    """A method on a task, from its smallest footprint to its largest, and what follows from it.

    Both critical values are None where the baseline is 0 (there is nothing to lose); the peak's
    also where no peak was measured.
    """

    setting: Setting
    method: str
    family: str
    options: dict[str, Any]
    prefill_chunk: int | None
    label: str  # the method, with whatever tells it from another curve of the same method
    baseline: float
    threshold: float
    samples: int
    points: tuple[Point, ...]
    fitted: tuple[tuple[float, float], ...]  # (footprint, score), the last at full attention
    footprint: Critical | None
    peak: Critical | None
    cells: Series = field(repr=False, compare=False)
    best: bool = False  # of its setting, by critical footprint
    tied: bool = False  # not distinguishable from the best

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
            **_critical_dict(self.footprint, "critical_footprint", ""),
            **_critical_dict(self.peak, "critical_peak", "peak_"),
            "best": self.best,
            "tied_with_best": self.tied,
            "samples": self.samples,
            "points": [_point_dict(point) for point in self.points],
        }


@dataclass(frozen=True)
class Difference:
    """By how much the critical footprint of `left` is larger than that of `right`, of a setting."""

    left: Curve
    right: Curve
    value: float
    interval: Interval | None

    @property
    def distinct(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.interval is not None and 0 not in self.interval


@dataclass(frozen=True)
class Report:
    """All curves of some runs, by setting, and what a reader should know beside them."""

    curves: tuple[Curve, ...]
    threshold: float
    notes: tuple[str, ...]
    runs: tuple[dict[str, Any], ...] = ()  # the contents of each run.json, with its folder's name

    def settings(self) -> list[Setting]:
        """The settings in order of first appearance: one table and one picture each."""
        return list(dict.fromkeys(curve.setting for curve in self.curves))

    def of(self, setting: Setting) -> list[Curve]:
        """The curves of a setting."""
        return [curve for curve in self.curves if curve.setting == setting]


def _critical_dict(found: Critical | None, name: str, prefix: str) -> dict[str, Any]:
    ends = found.interval if found else None
    return {
        name: found.value if found else None,
        f"{prefix}ci_low": ends.low if ends else None,
        f"{prefix}ci_high": ends.high if ends else None,
        f"{prefix}status": found.status if found else None,
    }


def _point_dict(point: Point) -> dict[str, Any]:
    values = dict(vars(point))
    ends = values.pop("score_interval")
    return {
        **values,
        "score_low": ends.low if ends else None,
        "score_high": ends.high if ends else None,
    }


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
    names = ", ".join(str(folder) for folder in folders)
    if not records:
        raise InputError(f"{names}: no sample is finished yet; continue it with 'kvbench run'")
    runs = tuple(
        {"folder": folder.name, **settings}
        for folder in folders
        if (settings := read_settings(folder)) is not None
    )
    report = report_records(records, threshold, runs)
    if not report.curves:
        raise InputError(f"{names}: nothing to report; " + "; ".join(report.notes))
    return report


def report_records(
    records: Sequence[Record], threshold: float, runs: tuple[dict[str, Any], ...] = ()
) -> Report:
    """The curves of records, and notes on what was left out; no curve where no baseline is."""
    notes = _notes_on_runs(runs)
    measured = [record for record in records if record.error is None]
    if len(measured) < len(records):
        notes.append(
            f"{len(records) - len(measured)} of {len(records)} cells failed and are left out; "
            "'kvbench run' with the same settings measures them again"
        )
    series, repeated = _group(measured)
    if repeated:
        notes.append(f"{repeated} cells were measured more than once; the latest counts")
    curves: list[Curve] = []
    for setting in sorted({key[0] for key in series}, key=lambda s: (s.task, s.model, s.context)):
        keys = [key for key in series if key[0] == setting]
        curves += _curves_of(setting, {key: series[key] for key in keys}, threshold, notes)
    return Report(tuple(curves), threshold, tuple(notes), runs)


def difference(left: Curve, right: Curve) -> Difference | None:
    """Of two critical footprints of one setting, paired over samples; None if either is unknown."""
    if left.footprint is None or right.footprint is None:
        return None
    if left.setting != right.setting:
        raise ValueError("differences are paired over samples, so within one setting")
    found = interval(left.footprint.draws - right.footprint.draws, min(left.samples, right.samples))
    return Difference(left, right, left.footprint.value - right.footprint.value, found)


def differences(curves: Sequence[Curve]) -> list[Difference]:
    """Between every two of a setting's curves but full attention's, the smaller one at the right.

    The same numbers as `difference` pair by pair, faster.
    """
    known = [c for c in by_critical(curves) if c.footprint is not None and c.method != BASELINE]
    found = []
    for index, right in enumerate(known):
        lefts = known[index + 1 :]
        by_count: dict[int, list[Curve]] = defaultdict(list)
        for left in lefts:
            by_count[min(left.samples, right.samples)].append(left)
        ends: dict[int, Interval] = {}
        for count, group in by_count.items():
            draws = np.stack([_draws(left) - _draws(right) for left in group], axis=1)
            both = intervals(draws, count)
            if both is not None:
                for left, low, high in zip(group, *both.tolist(), strict=True):
                    ends[id(left)] = Interval(low, high)
        found += [
            Difference(left, right, _value(left) - _value(right), ends.get(id(left)))
            for left in lefts
        ]
    return found


def _notes_on_runs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What runs that are reported together differ in, beyond what the report keeps apart."""
    kept_apart = {"model", "context", "seed"}
    commons = [run["common"] for run in runs]
    keys = dict.fromkeys(key for common in commons for key in common if key not in kept_apart)
    different = [
        key for key in keys if len({json.dumps(c.get(key), sort_keys=True) for c in commons}) > 1
    ]
    if not different:
        return []
    return [f"the runs differ in {', '.join(different)}; cells that both have: the latest counts"]


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


def _labels(keys: Iterable[SeriesKey]) -> dict[SeriesKey, str]:
    """Names for curves: the method's, and where needed the options or prefill chunk that differ."""
    by_method: dict[str, list[SeriesKey]] = defaultdict(list)
    for key in keys:
        by_method[key[1]].append(key)
    labels = {}
    for method, same in by_method.items():
        options: dict[SeriesKey, dict[str, Any]] = {key: json.loads(key[2]) for key in same}
        names = dict.fromkeys(name for values in options.values() for name in values)
        differing = [n for n in names if len({json.dumps(v.get(n)) for v in options.values()}) > 1]
        for key in same:
            parts = [f"{name}={_short(options[key].get(name))}" for name in differing]
            if len({k[3] for k in same}) > 1:
                parts.append(f"chunk {key[3]}")
            labels[key] = f"{method} ({', '.join(parts)})" if parts else method
    return labels


def _short(value: Any) -> str:
    """An option's value in a label; of a file the beginning of its hash, which tells it apart."""
    text = str(value)
    return text.rpartition(FILE_HASH)[2][:6] if FILE_HASH in text else text


def _curves_of(
    setting: Setting, series: dict[SeriesKey, Series], threshold: float, notes: list[str]
) -> list[Curve]:
    """The curves of one setting, from one bootstrap of its samples."""
    where = f"{setting.model}/{setting.task}"
    baseline_key = next((key for key in series if key[1] == BASELINE), None)
    if baseline_key is None:
        notes.append(
            f"{where}: full attention has not been measured, so there is no baseline; continue "
            "the run with 'kvbench run'"
        )
        return []
    full = series[baseline_key][1.0]
    if not any(record.score for record in full.values()):
        notes.append(f"{where}: full attention scores 0, so there is nothing to lose")
    if len(full) < FEW_SAMPLES:
        notes.append(f"{where}: {_few(len(full))}")
    labels = _labels(series)
    kept: dict[SeriesKey, dict[float, list[int]]] = {}
    for key in sorted(series, key=lambda k: (k[1] != BASELINE, k[1], k[2], k[3] or 0)):
        samples = _usable(series[key], full, f"{where}/{labels[key]}", notes)
        if samples:
            kept[key] = samples
    rows = {sample: row for row, sample in enumerate(sorted(full))}
    tables = {key: _table(series[key], samples, full, rows) for key, samples in kept.items()}
    scores = [
        np.arange(table.shape[1]) < len(kept[key]) for key, table in tables.items()
    ]  # a table's first columns
    means, counts = resampled_means(
        np.concatenate(list(tables.values()), axis=1), np.concatenate(scores)
    )
    curves, start = [], 0
    for key, table in tables.items():
        part = slice(start, start + table.shape[1])
        start = part.stop
        curves.append(
            _curve(
                key,
                labels[key],
                {budget: series[key][budget] for budget in kept[key]},
                _Resampled(table, means[:, part], counts[:, part]),
                threshold,
            )
        )
    return _mark_best(curves)


def _few(samples: int) -> str:
    if samples == 1:
        return "one sample only, so there are no intervals"
    return f"intervals of {samples} samples are rough"


def _usable(
    series: Series, full: dict[int, Record], where: str, notes: list[str]
) -> dict[float, list[int]]:
    """The samples of each budget that the baseline has too; budgets that have too few are out."""
    shared = {b: sorted(cells.keys() & full.keys()) for b, cells in sorted(series.items())}
    most = max(len(samples) for samples in shared.values())
    if most == 0:
        notes.append(f"{where}: no sample that the baseline has too, left out")
        return {}
    kept = {b: s for b, s in shared.items() if s and len(s) >= FEWEST_SHARE * most}
    left_out = ", ".join(f"{b:g}" for b in shared if b not in kept)
    if left_out:
        notes.append(f"{where}: too few samples at budget {left_out}, left out")
    fewest = min(len(s) for s in kept.values())
    if fewest < most:
        notes.append(f"{where}: unfinished, {fewest} to {most} samples a budget")
    elif most < len(full):
        notes.append(f"{where}: unfinished, {most} of {len(full)} samples")
    alone = sum(len(series[b]) - len(s) for b, s in kept.items())
    if alone:
        notes.append(f"{where}: {alone} cells of samples that the baseline lacks are left out")
    return kept


def _table(
    series: Series, kept: dict[float, list[int]], full: dict[int, Record], rows: dict[int, int]
) -> Floats:
    """A curve's samples as a table [S, 3 P + 1]: scores, footprints, peaks, then the baseline's.

    The baseline is taken over the samples that any point of the curve has. NaN where a point lacks
    a sample.
    """

    def column(records: dict[int, Record], samples: Iterable[int], name: str) -> Floats:
        values = np.full(len(rows), np.nan)
        for sample in samples:
            value = getattr(records[sample], name)
            values[rows[sample]] = np.nan if value is None else value
        return values

    columns = [
        column(series[budget], samples, name)
        for name in ("score", "kv_footprint", "kv_peak")
        for budget, samples in kept.items()
    ]
    everywhere = set().union(*kept.values())
    return np.stack([*columns, column(full, everywhere, "score")], axis=1)


@dataclass(frozen=True)
class _Resampled:
    """A curve's table [S, 3 P + 1] with the means and counts [R, 3 P + 1] of its resamples."""

    table: Floats
    means: Floats
    counts: Floats


def _curve(
    key: SeriesKey, label: str, cells: Series, resampled: _Resampled, threshold: float
) -> Curve:
    """The curve of one series; of what `resampled` holds, see `_table`."""
    setting, method, options, chunk = key
    table, means, counts = resampled.table, resampled.means, resampled.counts
    there = (~np.isnan(table)).sum(axis=0)
    mean = np.nansum(table, axis=0) / np.maximum(there, 1)
    count = len(cells)
    samples = int(there[-1])
    baseline = float(mean[-1])

    def points_by(first: int) -> NDArray[np.intp]:
        """Columns of the scores, in order of the cost whose columns start at `first`."""
        return np.argsort(mean[first : first + count], kind="stable")

    def find(first: int) -> Critical | None:
        cost = first + points_by(first)
        score = cost - first
        if baseline <= 0 or not there[cost].all():
            return None
        if method == BASELINE:
            return Critical(1.0, Status.REACHED, Interval(1.0, 1.0), np.ones(len(means)))
        value, status = critical(
            mean[cost], mean[score], there[score].astype(float), baseline, samples, threshold
        )
        draws = critical_rows(
            means[:, cost],
            means[:, score],
            counts[:, score],
            means[:, -1],
            counts[:, -1],
            threshold,
        )
        return Critical(value, status, interval(draws, samples), draws)

    order = points_by(count)
    budgets = list(cells)
    points = tuple(
        Point(
            budget=budgets[i],
            kv_footprint=float(mean[count + i]),
            score=float(mean[i]),
            score_interval=interval(means[:, i], int(there[i])),
            kv_peak=float(mean[2 * count + i]) if there[2 * count + i] else None,
            kv_reads=_mean(r.kv_reads for r in cells[budgets[i]].values()),
            kv_bytes_peak=_mean(r.kv_bytes_peak for r in cells[budgets[i]].values()),
            samples=int(there[i]),
        )
        for i in order.tolist()
    )
    scores = fit(mean[order], there[order].astype(float), baseline, samples)
    footprints = [*np.minimum(mean[count + order], 1.0).tolist(), 1.0]
    return Curve(
        setting=setting,
        method=method,
        family=next(iter(next(iter(cells.values())).values())).family,
        options=json.loads(options),
        prefill_chunk=chunk,
        label=label,
        baseline=baseline,
        threshold=threshold,
        samples=samples,
        points=points,
        fitted=tuple(zip(footprints, scores.tolist(), strict=True)),
        footprint=find(count),
        peak=find(2 * count),
        cells=cells,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _value(curve: Curve) -> float:
    return curve.footprint.value if curve.footprint else float("nan")


def _draws(curve: Curve) -> Floats:
    return curve.footprint.draws if curve.footprint else np.empty(0)


def by_critical(curves: Iterable[Curve]) -> list[Curve]:
    """Curves from the smallest critical footprint to the largest, unknown ones last."""
    return sorted(curves, key=lambda c: (c.footprint is None, _value(c), c.label))


def _mark_best(curves: list[Curve]) -> list[Curve]:
    """Mark the smallest critical footprint of a setting, and those not distinguishable from it.

    That is where the interval of the difference includes 0; where there is no interval; and where
    a footprint is only known to be at most something, which may hide a smaller one. Full attention
    takes no part.
    """
    known = [c for c in by_critical(curves) if c.footprint is not None and c.method != BASELINE]
    if not known:
        return curves
    best = known[0]
    tied = {id(curve) for curve in known[1:] if _may_equal(curve, best)}
    return [replace(c, best=c is best, tied=id(c) in tied) for c in curves]


def _may_equal(curve: Curve, best: Curve) -> bool:
    found = difference(curve, best)
    hidden = curve.footprint is not None and curve.footprint.status is Status.AT_MOST
    return hidden or found is None or not found.distinct
