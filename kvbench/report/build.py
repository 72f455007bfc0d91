"""From records to curves, critical footprints and the differences between methods.

`frames.py` reads the records and selects those that count; here they become a `Report`, with the
statistics of `statistics.py`. `tables.py`, `figures/` and `page.py` present it. Needs no torch.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame, Series, concat, isna

from kvbench.errors import InputError
from kvbench.files import as_bytes, open_regular
from kvbench.records import BASELINE, SAMPLE_FILES, Record, told
from kvbench.report.frames import (
    POOLED,
    SAMPLE,
    SETTING,
    code_name,
    frame_of,
    read_frame,
    select,
)
from kvbench.report.sources import task_names
from kvbench.report.statistics import (
    ROUNDING,
    Floats,
    Interval,
    Status,
    critical,
    critical_rows,
    fit,
    independent,
    interval,
    resampled_means,
    weighted_means,
)
from kvbench.run_folder import (
    INVOCATION_FILES,
    RUN_FILE,
    current_codes,
    find_run_folders,
    hash_of,
    read_settings,
    unfinished,
)

FEWEST_SHARE = 0.5  # a budget with a smaller share of its curve's samples is no point of it
FEW_SAMPLES = 10  # an interval from fewer samples is rough
FILE_HASH = " sha256:"  # stands before the hash, where an option of a record is a file
Number = TypeVar("Number", int, float)

COSTS = ("kv_reads", "kv_bytes_peak", "kv_bytes_read", "new_tokens", "footprint_of_full")
MEASURES = ("score", "kv_footprint", "kv_peak")  # what is resampled, per budget
READS = "kv_reads"  # resampled too, for a curve that reads less than it holds


@dataclass(frozen=True)
class Point:
    """One budget of a curve: means over its samples; costs are fractions of full attention's."""

    budget: float
    kv_footprint: float
    score: float
    score_interval: Interval | None
    kv_peak: float | None
    kv_reads: float | None
    kv_bytes_peak: float | None  # bytes
    kv_bytes_read: float | None  # bytes, for a decoded token
    new_tokens: float | None  # of an answer
    footprint_of_full: float | None  # of full attention's with its own answers
    samples: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, with the interval as `score_low` and `score_high`."""
        values = dict(vars(self))
        ends = values.pop("score_interval")
        return {**values, **_ends(ends, "score_low", "score_high")}


@dataclass(frozen=True)
class Critical:
    """The smallest cost that keeps the threshold, and its bootstrap draws [R]."""

    value: float
    status: Status
    interval: Interval | None
    draws: Floats = field(repr=False, compare=False)
    independent: tuple[int, ...]  # as `kvbench.report.statistics.independent` gives them


@dataclass(frozen=True)
class Setting:
    """What the curves of one picture share."""

    model: str
    task: str
    context: int  # tokens
    seed: int | str  # a number, or several with commas between, which are pooled
    compress: str = "prompt"  # what methods evict from (see `kvbench.records.COMPRESS`)

    @property
    def seeds(self) -> str:
        """What a label says of the seeds."""
        return f"seed {self.seed}" if isinstance(self.seed, int) else f"seeds {self.seed}"

    @property
    def question(self) -> str:
        """What a label says of a question that methods do not know; "" if they know it."""
        return "" if self.compress == "prompt" else ", question unknown"


@dataclass(frozen=True)
class Curve:
    """A method on a task, from its smallest footprint to its largest, and its critical values.

    The critical values are None if the baseline is 0 (there is nothing to lose); the peak's is
    also None if no peak was measured. Those of reads are the footprint's if every entry that is
    held is read.
    """

    setting: Setting
    method: str
    family: str
    options: dict[str, Any]
    prefill_chunk: int | None
    method_code: str  # short hash of the method's source, "" if none was recorded
    older: bool  # newer code of the method was measured in this setting
    label: str  # the method, and what distinguishes this curve from others of the method
    name: str  # the label without the prefill chunk, for pictures that show one chunk
    baseline: float
    threshold: float
    samples: int
    points: tuple[Point, ...]
    fitted: tuple[tuple[float, float], ...]  # (footprint, score), the last at full attention
    fitted_reads: tuple[tuple[float, float], ...]  # (reads, score); empty if all held is read
    footprint: Critical | None
    peak: Critical | None
    reads: Critical | None
    cells: DataFrame = field(repr=False, compare=False)  # the records that the points are made of
    best: bool = False  # of its setting, by critical footprint
    tied: bool = False  # not distinguishable from the best

    def key(self) -> dict[str, Any]:
        """Return the columns that identify a curve."""
        return {
            **vars(self.setting),
            "method": self.method,
            "label": self.label,
            "family": self.family,
            "options": self.options,
            "prefill_chunk": self.prefill_chunk,
            "method_code": self.method_code,
        }

    def row(self) -> dict[str, Any]:
        """Return the row of `Report.critical`; footprints and scores are in 0..1."""
        return {
            **self.key(),
            "baseline": self.baseline,
            "threshold": self.threshold,
            **_critical_columns(self.footprint, "critical_footprint", ""),
            **_critical_columns(self.peak, "critical_peak", "peak_"),
            **_critical_columns(self.reads, "critical_reads", "reads_"),
            "best": self.best,
            "tied_with_best": self.tied,
            "samples": self.samples,
        }


@dataclass(frozen=True)
class Difference:
    """By how much the critical footprint of `left` exceeds that of `right`, in one setting."""

    left: Curve
    right: Curve
    value: float
    interval: Interval | None

    @property
    def distinct(self) -> bool:
        """Whether the interval excludes 0."""
        return self.interval is not None and 0 not in self.interval

    def row(self) -> dict[str, Any]:
        """Return the row of `Report.differences`."""
        return {
            **vars(self.left.setting),
            "left": self.left.label,
            "right": self.right.label,
            "difference": self.value,
            **_ends(self.interval, "ci_low", "ci_high"),
            "distinct": self.distinct,
        }


@dataclass(frozen=True)
class Report:
    """The curves of some runs, by setting, and notes that a reader should know.

    Four frames hold its numbers. Footprints, peaks, reads and scores are fractions (0..1), and
    intervals are 95 % intervals from a paired bootstrap over samples.

    - `records`: one row per cell; `kvbench.report.frames` lists its columns.
    - `points`: one row per budget of a curve.
    - `critical`: one row per curve.
    - `differences`: one row per pair of methods of a setting, full attention excepted.

    `points` and `critical` start with the columns that identify a curve: `model`, `task`, `context`
    (tokens), `seed`, `compress` (prompt, or context if methods evicted before the question was
    read), `method`, `label` (unique in a setting: the method, and what distinguishes the
    curve from others of the method), `family`, `options` (a dict), `prefill_chunk` (tokens; missing
    if the result does not depend on it), `method_code` (short hash of the method's source; "" if
    none was recorded).

    `points` goes on with `budget` (as asked for); `kv_footprint`, `score`, `kv_peak`, `kv_reads`
    and `kv_bytes_peak` (means over the samples, missing if not measured); `kv_bytes_read` (bytes
    that a decoded token reads) and `new_tokens` (of an answer), means as well; `footprint_of_full`
    (entry-rows of full attention's own answers, where `kv_footprint` is of full attention with an
    answer of the same length); `samples` (how many);
    `score_low` and `score_high` (the score's interval).

    `critical` goes on with `baseline` (full attention's score on the curve's samples); `threshold`
    (share of it to keep); `critical_footprint` (the smallest footprint that keeps it; missing if
    the baseline is 0), `ci_low` and `ci_high` (its interval), `status` (reached; at_most: every
    budget keeps it; extrapolated: none does); `critical_peak`, `peak_ci_low`, `peak_ci_high`,
    `peak_status` (the same for the peak); `critical_reads`, `reads_ci_low`, `reads_ci_high`,
    `reads_status` (the same for reads; the footprint's if all that is held is read); `best`
    (the smallest critical footprint of the setting),
    `tied_with_best` (not distinguishable from it), `samples` (how many).

    `differences` has `model`, `task`, `context`, `seed`, `compress`; `left` and `right`
    (labels); `difference` (critical footprint of `left` minus that of `right`, never negative),
    `ci_low` and `ci_high` (its interval), `distinct` (whether the interval excludes 0).
    """

    curves: tuple[Curve, ...]
    threshold: float
    notes: tuple[str, ...]
    runs: tuple[dict[str, Any], ...] = ()  # each run.json, with the name of its folder
    records: DataFrame = field(default_factory=DataFrame, repr=False, compare=False)
    source: str = field(default="", repr=False, compare=False)  # hash of the files it was made from
    damaged: tuple[str, ...] = ()  # what was left out since it cannot be read; the first notes

    def __repr__(self) -> str:
        curves, settings = len(self.curves), len(self.settings())
        return f"Report(curves: {curves}, settings: {settings}, threshold: {self.threshold:g})"

    def settings(self) -> list[Setting]:
        """Return the settings in order of first appearance: each has one table and one picture."""
        return list(dict.fromkeys(curve.setting for curve in self.curves))

    def of(self, setting: Setting) -> list[Curve]:
        """Return the curves of a setting."""
        return [curve for curve in self.curves if curve.setting == setting]

    @cached_property
    def points(self) -> DataFrame:
        """One row per budget of a curve; the class documents the columns."""
        return _frame({**c.key(), **point.as_dict()} for c in self.curves for point in c.points)

    @cached_property
    def critical(self) -> DataFrame:
        """One row per curve; the class documents the columns."""
        return _frame(curve.row() for curve in self.curves)

    @cached_property
    def differences(self) -> DataFrame:
        """One row per pair of methods of a setting; the class documents the columns."""
        columns = [*SETTING, "left", "right", "difference", "ci_low", "ci_high", "distinct"]
        pairs = (d for setting in self.settings() for d in differences(self.of(setting)))
        return DataFrame([found.row() for found in pairs], columns=columns)


def _frame(rows: Iterable[dict[str, Any]]) -> DataFrame:
    return DataFrame(list(rows)).astype({"prefill_chunk": "Int64"})


def _ends(found: Interval | None, low: str, high: str) -> dict[str, float | None]:
    return {low: found.low if found else None, high: found.high if found else None}


def _critical_columns(found: Critical | None, name: str, prefix: str) -> dict[str, Any]:
    return {
        name: found.value if found else None,
        **_ends(found.interval if found else None, f"{prefix}ci_low", f"{prefix}ci_high"),
        f"{prefix}status": found.status.value if found else None,
    }


def make_report(folders: Sequence[Path], threshold: float = 0.9, *, latest: bool = False) -> Report:
    """Read runs and compute their curves.

    `threshold` is the share of the baseline's score to keep. `latest` leaves out cells of older
    code of a method, which are curves of their own otherwise. Damaged records are left out, and
    the first notes name them. Raises InputError if there is nothing to report: no record, or no
    baseline for any.
    """
    folders = find_run_folders(folders, Path())
    names = ", ".join(str(folder) for folder in folders)
    # Hash before reading: if a file grows in between, the next report is made anew.
    source = _hash_of_files(folders, f"{threshold} {latest}")
    records, damaged, again = read_frame(folders)
    left_out = tuple(f"left out: {text}" for text in told(damaged))
    if records.empty and damaged:
        raise InputError(f"{names}: nothing to report; {'; '.join(left_out)}")
    if records.empty:
        raise InputError(f"{names}: no sample is finished yet; continue it with 'kvbench run'")
    found = {folder: read_settings(folder) for folder in folders}
    runs = tuple({"folder": f.name, **known} for f, known in found.items() if known is not None)
    unknown = [folder for folder, known in found.items() if known is None]
    if unknown and len(folders) > 1:
        raise InputError(
            f"{unknown[0]} has no {RUN_FILE}, so whether its cells belong with the others is not "
            "known; report it by itself"
        )
    report = report_records(records, threshold, runs, latest=latest)
    lost = [f"{folder} has no {RUN_FILE}: its settings are not known" for folder in unknown]
    notes = (*left_out, *lost, *again, *report.notes)
    report = replace(report, source=source, notes=notes, damaged=left_out)
    if not report.curves:
        raise InputError(f"{names}: nothing to report; " + "; ".join(report.notes))
    return report


def _hash_of_files(folders: Sequence[Path], more: str) -> str:
    """Return a hash of run folders: their names, settings and records."""
    total = hashlib.sha256(more.encode())
    for folder in folders:
        names = (RUN_FILE, INVOCATION_FILES, SAMPLE_FILES)
        for path in sorted(path for name in names for path in folder.glob(name)):
            total.update(os.fsencode(f"\n{folder.name}/{path.name} "))
            with suppress(OSError), open_regular(path) as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _against_baseline(cells: DataFrame) -> DataFrame:
    """Add `drawn` and `footprint_of_full` to the cells of a setting.

    `drawn` numbers the samples, which a seed and an index name, in order. The other is by the
    answer that full attention gave to the same sample.
    """
    cells = cells.assign(drawn=cells.groupby(SAMPLE).ngroup())
    baseline = cells.loc[cells["method"] == BASELINE].drop_duplicates("drawn")
    rows = baseline.set_index("drawn")["full_rows"].astype(float)
    share = cells["resident_rows"].astype(float) / cells["drawn"].map(rows)
    return cells.assign(footprint_of_full=share)


def report_records(
    records: DataFrame | Iterable[Record],
    threshold: float = 0.9,
    runs: tuple[dict[str, Any], ...] = (),
    *,
    latest: bool = False,
) -> Report:
    """Return the curves of records, and notes on what was left out; see `make_report`.

    A setting without a baseline has no curves.
    """
    frame = records if isinstance(records, DataFrame) else frame_of(records)
    names = task_names(frame, runs)
    shown = [names[key] for key in zip(frame["task"], frame["source"], strict=True)]
    cells, notes = select(frame.assign(task=shown), latest, current_codes(runs, names))
    notes = [
        *_notes_on_runs(runs),
        *_notes_on_the_rest(frame.assign(task=shown), runs, names),
        *notes,
    ]
    notes += _notes_on_lengths(cells, runs, names)
    notes += _notes_on_metrics(cells)
    curves: list[Curve] = []
    groups: dict[Setting, list[CellGroup]] = {}
    for key, in_setting in cells.groupby(["task", *(name for name in POOLED if name != "task")]):
        task, model, context, compress = cast(tuple[str, str, int, str], key)
        seeds = sorted(in_setting["seed"].unique().tolist())
        seed = int(seeds[0]) if len(seeds) == 1 else ",".join(map(str, seeds))
        compared = _against_baseline(in_setting)
        groups[Setting(model, task, context, seed, compress)] = group_cells(compared)
    for setting, of_setting in groups.items():
        peers = [
            group
            for other, of_other in groups.items()
            if replace(other, task=setting.task) == setting
            for group in of_other
        ]
        curves += _curves_of(setting, of_setting, peers, threshold, notes)
    return Report(tuple(curves), threshold, tuple(notes), runs, frame)


def difference(left: Curve, right: Curve) -> Difference | None:
    """Return the difference of two critical footprints, paired over samples; None if unknown."""
    if left.footprint is None or right.footprint is None:
        return None
    if left.setting != right.setting:
        raise ValueError("differences are paired over samples, so within one setting")
    one, other = left.footprint, right.footprint
    found = interval(one.draws - other.draws, min(one.independent, other.independent, key=sum))
    return Difference(left, right, one.value - other.value, found)


def differences(curves: Iterable[Curve]) -> list[Difference]:
    """Return the difference of every two methods of a setting, the smaller one at the right."""
    methods = [curve for curve in by_critical(curves) if curve.method != BASELINE]
    pairs = (difference(left, right) for right, left in combinations(methods, 2))
    return [found for found in pairs if found is not None]


def by_critical(curves: Iterable[Curve]) -> list[Curve]:
    """Return curves from the smallest critical footprint to the largest, unknown ones last."""
    return sorted(curves, key=lambda c: (c.footprint.value if c.footprint else np.inf, c.label))


def _notes_on_metrics(cells: DataFrame) -> list[str]:
    """Return notes on what the scores of read samples are, which their task does not say."""
    notes = []
    read = cells[cells["source"].fillna("") != ""]
    for task, of_task in read.groupby("task"):
        of_samples = of_task.drop_duplicates([*SAMPLE])["metric"].fillna("")
        counts = of_samples[of_samples != ""].value_counts()
        if len(counts) == 1:
            notes.append(f"{task}: scores are {counts.index[0]}")
        elif len(counts):
            shown = ", ".join(f"{name} of {count} samples" for name, count in counts.items())
            notes.append(f"{task}: scores are means over several metrics: {shown}")
    return notes


def _notes_on_lengths(
    cells: DataFrame, runs: Sequence[dict[str, Any]], names: Mapping[tuple[str, str], str]
) -> list[str]:
    """Return notes on samples that were cut because they were too long, or were left out."""
    notes = []
    for task, of_task in cells.groupby("task"):
        samples = of_task.groupby("sample")["cut_tokens"].max().dropna()
        if (cut := samples[samples > 0]).any():
            notes.append(
                f"{task}: the contexts of {len(cut)} of {len(samples)} samples are cut, by "
                f"{cut.max()} tokens at most"
            )
    skipped: dict[str, list[int]] = {}
    for run in runs:
        for each in run["invocations"]:
            experiment = each.get("experiment", {})
            sources, too_long = experiment.get("sources", {}), each.get("skipped", {})
            for task in [*experiment.get("tasks", []), *too_long]:
                shown = names.get((task, sources.get(task, "")), task)
                skipped[shown] = too_long.get(task, [])
    for name, left_out in skipped.items():
        if left_out:
            many = "1 sample was" if len(left_out) == 1 else f"{len(left_out)} samples were"
            shown = ", ".join(map(str, left_out[:FEW_SAMPLES]))
            more = ", ..." if len(left_out) > FEW_SAMPLES else ""
            notes.append(f"{name}: {many} left out, too long: {shown}{more}")
    return notes


def _notes_on_the_rest(
    records: DataFrame, runs: Sequence[dict[str, Any]], names: Mapping[tuple[str, str], str]
) -> list[str]:
    """Return notes on samples that the runs were asked for and lack; see `unfinished`.

    What runs of the same settings have, such as the shards of one sweep, is taken together.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(hash_of(run["common"]), []).append(run)
    baseline = records[records["method"] == BASELINE]
    notes = []
    for group in groups.values():
        found = baseline[baseline["run"].isin({as_bytes(run["folder"]).decode() for run in group})]
        there = set(found[["task", "seed", "sample"]].itertuples(index=False, name=None))
        told = unfinished([each for run in group for each in run["invocations"]], there, names)
        where = ", ".join(run["folder"] for run in group)
        notes += [f"{where}: {note}" for note in told] if len(groups) > 1 else told
    return notes


# Settings that change results: runs that differ in them are not pooled.
MEASURED_WITH = (
    *("kvbench", "model_fingerprint", "dtype", "chat_template", "template_date"),
    *("template_options", "rope", "judge"),
)


def _notes_on_runs(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return a note on how runs differ, beyond what the report keeps apart."""
    kept_apart = {"model", "context", "compress"}
    commons = [{k: v for k, v in run["common"].items() if k != "seed"} for run in runs]
    for key in MEASURED_WITH:
        measured: dict[str, Any] = {}
        for run in runs:
            setting = json.dumps([run["common"].get(name) for name in sorted(kept_apart)])
            known, folder = measured.setdefault(setting, (run["common"].get(key), run["folder"]))
            if known != run["common"].get(key):
                raise InputError(
                    f"{folder} and {run['folder']} were measured with different {key} "
                    f"({known}, {run['common'].get(key)}), so their cells are not comparable; "
                    "report them one by one"
                )
    keys = dict.fromkeys(key for common in commons for key in common if key not in kept_apart)
    different = [
        key for key in keys if len({json.dumps(c.get(key), sort_keys=True) for c in commons}) > 1
    ]
    if not different:
        return []
    return [
        f"the runs differ in {', '.join(different)}: their samples are pooled, and of cells that "
        "both have, the latest counts"
    ]


@dataclass(frozen=True)
class CellGroup:
    """The cells of one curve, and what they share."""

    method: str
    family: str
    options: dict[str, Any]
    prefill_chunk: int | None
    method_code: str
    older: bool
    cells: DataFrame = field(compare=False)


def group_cells(cells: DataFrame) -> list[CellGroup]:
    """Return the cells of a setting by curve, the baseline first."""
    keys = [
        (cells["method"] != BASELINE).rename("is_method"),
        cells["method"],
        cells["options_text"],
        cells["prefill_chunk"].fillna(0),
        cells["older"],
        cells["method_code"],
    ]
    groups = []
    for _, part in cells.groupby(keys):
        shared = ["method", "family", "options", "prefill_chunk", "method_code", "older"]
        method, family, options, chunk, code, older = part[shared].iloc[0]
        groups.append(
            CellGroup(method, family, options, known(chunk, int), code, bool(older), part)
        )
    return groups


def labels_of(
    groups: Sequence[CellGroup], peers: Sequence[CellGroup], with_chunk: bool
) -> list[str]:
    """Return a label for each group of a setting: the method, and what tells it from its `peers`.

    `peers` are the groups of all tasks that are shown together, `groups` included. Labels of one
    setting and one prefill chunk differ: if need be, a number is added.
    """
    labels = []
    used: Counter[tuple[str, int | None]] = Counter()
    for group in groups:
        same = [peer for peer in peers if peer.method == group.method]
        names = dict.fromkeys(name for peer in same for name in peer.options)
        parts = [
            f"{name}={_short(group.options.get(name))}"
            for name in names
            if len({str(peer.options.get(name)) for peer in same}) > 1
        ]
        if with_chunk and len({peer.prefill_chunk for peer in same}) > 1:
            parts.append(f"chunk {group.prefill_chunk}")
        if group.older:
            parts.append(code_name(group.method_code))
        label = f"{group.method} ({', '.join(parts)})" if parts else group.method
        used[label, group.prefill_chunk] += 1
        number = used[label, group.prefill_chunk]
        labels.append(label if number == 1 else f"{label} #{number}")
    return labels


def _short(value: Any) -> str:
    """Return an option's value as a label shows it; of a file, the first digits of its hash."""
    text = str(value)
    return text.rpartition(FILE_HASH)[2][:6] if FILE_HASH in text else text


def _curves_of(
    setting: Setting,
    groups: Sequence[CellGroup],
    peers: Sequence[CellGroup],
    threshold: float,
    notes: list[str],
) -> list[Curve]:
    """Return the curves of one setting, from one bootstrap of its samples; see `labels_of`."""
    where = f"{setting.model}/{setting.task}"
    if groups[0].method != BASELINE:
        notes.append(
            f"{where}: full attention has not been measured, so there is no baseline; continue "
            "the run with 'kvbench run'"
        )
        return []
    full = groups[0].cells.set_index("drawn")["score"].sort_index()
    if not full.any():
        notes.append(f"{where}: full attention scores 0, so there is nothing to lose")
    clusters = _codes(_clusters(groups[0].cells), full)
    subtasks = _codes(groups[0].cells.set_index("drawn")["subtask"], full)
    units = len(full) if clusters is None else len(np.unique(clusters))
    one, many = "sample", "samples"
    if clusters is not None:
        one, many = "cluster of samples", "clusters of samples"
    if units < FEW_SAMPLES:
        notes.append(
            f"{where}: intervals of {units} {many} are rough"
            if units > 1
            else f"{where}: one {one} only, so there are no intervals"
        )
    kept = []
    labels = labels_of(groups, peers, with_chunk=True)
    names = labels_of(groups, peers, with_chunk=False)
    for group, label, name in zip(groups, labels, names, strict=True):
        usable = _usable(group.cells, set(full.index), f"{where}/{label}", notes)
        if not usable.empty:
            kept.append((replace(group, cells=usable), label, name))
    tables = [_by_sample(group.cells, full) for group, _, _ in kept]
    together = concat(tables, axis=1)
    means, counts = resampled_means(
        np.ascontiguousarray(together.to_numpy()),
        np.asarray(together.columns.get_level_values(0) == "score"),
        clusters,
        subtasks,
    )
    ends = np.cumsum([table.shape[1] for table in tables])[:-1]
    curves = []
    for (group, label, name), table, mean, count in zip(
        kept, tables, np.split(means, ends, axis=1), np.split(counts, ends, axis=1), strict=True
    ):
        measures = _measures(table, mean, count, clusters, subtasks)
        curves.append(_curve(setting, group, label, name, measures, threshold))
    return _mark_best(curves)


def _usable(cells: DataFrame, full: set[int], where: str, notes: list[str]) -> DataFrame:
    """Return the cells of samples that the baseline has too, of budgets with enough of them."""
    shared = cells[cells["drawn"].isin(full)]
    counts = shared["budget"].value_counts().reindex(sorted(cells["budget"].unique()), fill_value=0)
    most = counts.max()
    if most == 0:
        notes.append(f"{where}: no sample that the baseline has too, left out")
        return shared
    kept = counts[(counts > 0) & (counts >= FEWEST_SHARE * most)]
    if len(kept) < len(counts):
        left_out = ", ".join(f"{budget:g}" for budget in counts.index.difference(kept.index))
        notes.append(f"{where}: too few samples at budget {left_out}, left out")
    if kept.min() < most:
        notes.append(
            f"{where}: unfinished; each budget has {kept.min()} to {most} of full attention's "
            f"{len(full)} samples"
        )
    elif most < len(full):
        notes.append(
            f"{where}: unfinished; each budget has {most} of full attention's {len(full)} samples"
        )
    alone = cells["budget"].isin(kept.index).sum() - kept.sum()
    if alone:
        notes.append(f"{where}: {alone} cells of samples that the baseline lacks are left out")
    return shared[shared["budget"].isin(kept.index)]


def _by_sample(cells: DataFrame, full: "Series[float]") -> DataFrame:
    """Return a curve's measures [S, 3 P + 1], columns (measure, budget); the baseline's is last.

    The baseline covers the samples that any point of the curve has. NaN marks a missing sample.
    Reads have P columns more if the curve reads less than it holds.
    """
    less = cells[READS].astype(float) < cells["kv_footprint"] - ROUNDING
    measures = [*MEASURES, READS] if less.any() else list(MEASURES)
    wide = cells.pivot(index="drawn", columns="budget", values=measures)
    wide[BASELINE, 1.0] = full.reindex(wide.index)
    return wide.reindex(full.index)


def means_over_subtasks(cells: DataFrame, columns: list[str]) -> DataFrame:
    """Return the means of columns at each budget: over samples if subtasks have equally many."""
    of_subtasks = cells.groupby(["budget", "subtask"])
    if (of_subtasks.size().groupby("budget").nunique() == 1).all():
        return cells.groupby("budget")[columns].mean()
    return of_subtasks[columns].mean().groupby("budget").mean()


def _clusters(cells: DataFrame) -> "Series[Any]":
    """Return the cluster of each sample of the baseline, by `drawn`; missing for one by itself.

    Other seeds make other samples, and so other clusters. A sample that was read is the same under
    every seed: its rows are one cluster, or belong to that of its question.
    """
    names = cells.set_index("drawn")["cluster"].astype(object)
    if cells["seed"].nunique() == 1:
        return names
    read = (cells["sample_code"].fillna("") != "").to_numpy()
    own = Series(list(zip(cells["sample"], cells["sample_code"], strict=True)), names.index)
    names = names.where(names.notna() | ~read, own)
    seeds = Series(cells["seed"].to_numpy(), names.index).where(~read, -1)
    pairs = Series(list(zip(seeds, names, strict=True)), names.index, dtype=object)
    return pairs.where(names.notna(), None)


def _codes(names: "Series[Any]", full: "Series[float]") -> NDArray[np.intp] | None:
    """Return the number of each baseline sample's name [S], by `drawn`; None if none has one.

    A sample without a name is one of its own.
    """
    if names.isna().all():
        return None
    codes = names.reindex(full.index).factorize()[0]
    return np.where(codes < 0, codes.max() + 1 + np.arange(len(codes)), codes)


class _Measure(NamedTuple):
    """One measure of a curve at its P budgets, over all samples and in R resamples."""

    mean: Floats  # [P]
    samples: NDArray[np.int64]  # [P]
    independent: list[tuple[int, ...]]  # [P], see `kvbench.report.statistics.independent`
    means: Floats  # [R, P]
    counts: Floats  # [R, P], samples in each resample


def _measures(
    table: DataFrame,
    means: Floats,
    counts: Floats,
    clusters: NDArray[np.intp] | None,
    subtasks: NDArray[np.intp] | None,
) -> dict[str, _Measure]:
    """Return the measures of a table of `_by_sample`, and of its resamples, by name."""
    values = np.ascontiguousarray(table.to_numpy())
    there = ~np.isnan(values)
    samples = there.sum(axis=0)
    units = independent(there, clusters, subtasks)
    mean = weighted_means(values, subtasks)
    names = table.columns.get_level_values(0)
    return {
        name: _Measure(mean[at], samples[at], [units[i] for i in at], means[:, at], counts[:, at])
        for name in names.unique()
        for at in [np.flatnonzero(names == name)]
    }


def _curve(
    setting: Setting,
    group: CellGroup,
    label: str,
    name: str,
    measures: dict[str, _Measure],
    threshold: float,
) -> Curve:
    """Return the curve of a group of cells from its measures."""
    score, footprint, peak, full = (measures[name] for name in (*MEASURES, BASELINE))
    reads = measures.get(READS)
    baseline, samples = float(full.mean[0]), int(full.samples[0])
    units = full.independent[0]

    def find(cost: _Measure) -> Critical | None:
        if baseline <= 0 or not cost.samples.all():
            return None
        if group.method == BASELINE:
            return Critical(
                1.0, Status.REACHED, Interval(1.0, 1.0), np.ones(len(cost.means)), units
            )
        at = cost.mean.argsort(kind="stable")
        weights = score.samples[at].astype(float)
        value, status = critical(
            cost.mean[at], score.mean[at], weights, baseline, samples, threshold
        )
        draws = critical_rows(
            cost.means[:, at],
            score.means[:, at],
            score.counts[:, at],
            full.means[:, 0],
            full.counts[:, 0],
            threshold,
        )
        return Critical(value, status, interval(draws, units), draws, units)

    def fitted(cost: _Measure) -> tuple[tuple[float, float], ...]:
        at = cost.mean.argsort(kind="stable")
        scores = fit(score.mean[at], score.samples[at].astype(float), baseline, samples)
        costs = [*np.minimum(cost.mean[at], 1.0).tolist(), 1.0]
        return tuple(zip(costs, scores.tolist(), strict=True))

    costs = group.cells.astype(dict.fromkeys(COSTS, float))
    others = means_over_subtasks(costs, list(COSTS))
    order = footprint.mean.argsort(kind="stable")
    points = tuple(
        Point(
            budget=float(others.index[i]),
            kv_footprint=float(footprint.mean[i]),
            score=float(score.mean[i]),
            score_interval=interval(score.means[:, i], score.independent[i]),
            kv_peak=float(peak.mean[i]) if peak.samples[i] else None,
            kv_reads=known(others["kv_reads"].iloc[i], float),
            kv_bytes_peak=known(others["kv_bytes_peak"].iloc[i], float),
            kv_bytes_read=known(others["kv_bytes_read"].iloc[i], float),
            new_tokens=known(others["new_tokens"].iloc[i], float),
            footprint_of_full=known(others["footprint_of_full"].iloc[i], float),
            samples=int(score.samples[i]),
        )
        for i in order.tolist()
    )
    critical_footprint = find(footprint)
    return Curve(
        **{**vars(group), "setting": setting, "label": label, "name": name},
        baseline=baseline,
        threshold=threshold,
        samples=samples,
        points=points,
        fitted=fitted(footprint),
        fitted_reads=() if reads is None else fitted(reads),
        footprint=critical_footprint,
        peak=find(peak),
        reads=critical_footprint if reads is None else find(reads),
    )


def known(value: Any, kind: Callable[[Any], Number]) -> Number | None:
    """Return a value of a frame as a Python number, None if it is missing."""
    return None if isna(value) else kind(value)


def _mark_best(curves: list[Curve]) -> list[Curve]:
    """Mark the smallest critical footprint of a setting, and those not distinguishable from it.

    A curve is not distinguishable if the interval of the difference includes 0, if there is no
    interval, or if its footprint is only known to be at most some value, which may hide a smaller
    one. Full attention and older code of a method take no part.
    """
    known = [c for c in by_critical(curves) if _competes(c)]
    if not known:
        return curves
    best = known[0]
    return [
        replace(c, best=c is best, tied=c is not best and _competes(c) and _may_equal(c, best))
        for c in curves
    ]


def _competes(curve: Curve) -> bool:
    return curve.footprint is not None and curve.method != BASELINE and not curve.older


def _may_equal(curve: Curve, best: Curve) -> bool:
    found = difference(curve, best)
    hidden = curve.footprint is not None and curve.footprint.status is Status.AT_MOST
    return hidden or found is None or not found.distinct
