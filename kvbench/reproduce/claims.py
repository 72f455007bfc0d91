"""The paper's claims about the order of methods, judged on a report and its intervals.

A claim has findings (one per method, task and prefill chunk). It is true if all its findings are
true, false if one is false, otherwise undecided. A claim that something happens at all is true if
one finding is true, and false only if all are false. A claim about the order of two methods that
are near each other is judged by the findings that are decided: where these agree, they are the
verdict.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from kvbench.method import Family
from kvbench.report.build import Curve, Difference, Report, difference
from kvbench.report.statistics import ROUNDING, Status
from kvbench.report.tables import critical_text, interval_text, percent

RECALL = "recall"
SCORERS = ("snapkv", "pyramidkv")
LITTLE = 0.2  # of full attention's footprint: to save less is to save little
EQUAL = 0.02  # of full attention's footprint: critical footprints nearer than this are equal


class Verdict(StrEnum):
    """What the data say about a claim."""

    TRUE = "true"
    FALSE = "false"
    UNDECIDED = "undecided"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Finding:
    """One piece of evidence: where it was found, what was found, and the verdict."""

    where: str
    what: str
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """A claim, how a finding is judged, and the findings."""

    text: str
    rule: str
    findings: tuple[Finding, ...]
    one_suffices: bool = False
    where_decided: bool = False  # undecided findings do not count if there is a decided one

    @property
    def verdict(self) -> Verdict:
        """The verdict of all findings together."""
        found = {finding.verdict for finding in self.findings} - {Verdict.NOT_MEASURED}
        if not found:
            return Verdict.NOT_MEASURED
        if self.where_decided:
            decided = found - {Verdict.UNDECIDED}
            return decided.pop() if len(decided) == 1 else Verdict.UNDECIDED
        decisive = Verdict.TRUE if self.one_suffices else Verdict.FALSE
        for verdict in (decisive, Verdict.UNDECIDED):
            if verdict in found:
                return verdict
        return Verdict.FALSE if self.one_suffices else Verdict.TRUE


def judge(report: Report) -> list[Claim]:
    """Return the paper's claims on the curves of a report of one model, context and seed."""
    curves = report.curves
    recall = [curve for curve in curves if curve.setting.task == RECALL]
    tasks = [report.of(setting) for setting in report.settings()]
    less = "the interval of the difference of critical footprints, in points, lies above 0"
    claims = [
        Claim(
            "Patched eviction beats naive chunked eviction on recall",
            f"naive less patched: {less}",
            tuple(f for s in SCORERS for f in _beats(recall, f"{s}-patched", f"{s}-naive")),
        ),
        Claim(
            "Post-fill eviction without chunking saves little footprint",
            f"more than {100 - 100 * LITTLE:g} % is held at the smallest budget, or the interval "
            "of the critical footprint lies above that",
            tuple(f for of_task in tasks for s in SCORERS for f in _saves_little(of_task, s)),
        ),
        Claim(
            "PruLong needs less than DuoAttention where the two can be told apart",
            f"DuoAttention less PruLong: {less} (false: below 0) on each task and chunk where it "
            "leaves out 0; by chance it does so in one comparison of 20",
            tuple(f for of_task in tasks for f in _beats(of_task, "prulong", "duoattention")),
            where_decided=True,
        ),
        Claim(
            "PruLong depends on the size of the prefill chunk",
            "the interval of the difference of critical footprints, in points, leaves out 0 on "
            f"some task (false: within {100 * EQUAL:g} points of 0 on all)",
            tuple(f for of_task in tasks for f in _depends_on_chunk(of_task, "prulong")),
            one_suffices=True,
        ),
        Claim(
            "Recency eviction fails at recall",
            f"the interval of its critical footprint lies above {100 - 100 * LITTLE:g} %",
            _saves_little(recall, "recency", at_any_budget=False),
        ),
        Claim(
            "Dynamic sparsity saves no footprint",
            "its footprint is 100 % at every budget, as counted, and it reads less (undecided if "
            "it reads everything)",
            tuple(f for of_task in tasks for f in _saves_none(of_task)),
        ),
    ]
    # Equal findings count once: what is missing is missing on every task.
    return [replace(claim, findings=tuple(dict.fromkeys(claim.findings))) for claim in claims]


def _named(curves: Iterable[Curve], method: str) -> list[Curve]:
    found = [curve for curve in curves if curve.method == method]
    return sorted(found, key=lambda c: -(c.prefill_chunk or 0))


def _missing(*methods: str) -> tuple[Finding, ...]:
    return (Finding(", ".join(methods), "not in this run", Verdict.NOT_MEASURED),)


def _chunk(curve: Curve) -> str:
    return f", chunk {curve.prefill_chunk}" if curve.prefill_chunk is not None else ""


def _beats(curves: Sequence[Curve], better: str, worse: str) -> tuple[Finding, ...]:
    """Whether `better` has the smaller critical footprint, at each prefill chunk."""
    others = {curve.prefill_chunk: curve for curve in _named(curves, worse)}
    findings = []
    for curve in _named(curves, better):
        other = others.get(curve.prefill_chunk)
        if other is None:
            continue
        found = difference(other, curve)
        where = f"{better} and {worse} on {curve.setting.task}{_chunk(curve)}"
        findings.append(Finding(where, _in_words(found), _larger(found)))
    return tuple(findings) or _missing(better, worse)


def _larger(found: Difference | None) -> Verdict:
    """Whether the left is larger; a footprint with status `at_most` may be smaller than it is."""
    if found is None or found.interval is None or not found.distinct:
        return Verdict.UNDECIDED
    side = found.left if found.value > 0 else found.right
    if side.footprint is not None and side.footprint.status is Status.AT_MOST:
        return Verdict.UNDECIDED
    return Verdict.TRUE if found.interval.low > 0 else Verdict.FALSE


def _in_words(found: Difference | None) -> str:
    if found is None:
        return "full attention scores 0, so there is no critical footprint"
    ends = found.interval
    spread = f" ({percent(ends.low)} to {percent(ends.high)})" if ends else ""
    sides = f"{critical_text(found.left.footprint)} less {critical_text(found.right.footprint)}"
    return f"{percent(found.value)}{spread} points: {sides} %"


def _saves_little(
    curves: Sequence[Curve], method: str, at_any_budget: bool = True
) -> tuple[Finding, ...]:
    """Whether a method's critical footprint, or its footprint at every budget, is near 100 %."""
    findings = []
    for curve in _named(curves, method):
        held = curve.points[0]
        what = (
            f"critical footprint {critical_text(curve.footprint)} % "
            f"({interval_text(curve.footprint)}); at budget {held.budget:g} it holds "
            f"{percent(held.kv_footprint)} % and scores {held.score:.2f} of {curve.baseline:.2f}"
        )
        findings.append(
            Finding(
                f"{method} on {curve.setting.task}{_chunk(curve)}",
                what,
                _little(curve, at_any_budget),
            )
        )
    return tuple(findings) or _missing(method)


def _little(curve: Curve, at_any_budget: bool) -> Verdict:
    bound = 1 - LITTLE
    if at_any_budget and curve.points[0].kv_footprint > bound:
        return Verdict.TRUE
    if curve.footprint is None or curve.footprint.interval is None:
        return Verdict.UNDECIDED
    if curve.footprint.interval.high < bound:
        return Verdict.FALSE
    if curve.footprint.interval.low > bound and curve.footprint.status is not Status.AT_MOST:
        return Verdict.TRUE
    return Verdict.UNDECIDED


def _depends_on_chunk(curves: Sequence[Curve], method: str) -> tuple[Finding, ...]:
    """Whether a method's critical footprint differs between the largest and smallest chunk."""
    of_method = _named(curves, method)
    if len(of_method) < 2:
        return _missing(f"{method} at two prefill chunks")
    largest, smallest = of_method[0], of_method[-1]
    found = difference(largest, smallest)
    verdict = Verdict.UNDECIDED
    if found is not None and found.interval is not None:
        if found.distinct:
            verdict = Verdict.TRUE
        elif max(-found.interval.low, found.interval.high) < EQUAL:
            verdict = Verdict.FALSE
    where = (
        f"{method} on {largest.setting.task}, chunk {largest.prefill_chunk} less chunk "
        f"{smallest.prefill_chunk}"
    )
    return (Finding(where, _in_words(found), verdict),)


def _saves_none(curves: Sequence[Curve]) -> tuple[Finding, ...]:
    """Whether methods of dynamic sparsity hold all entries, though they read fewer."""
    findings = []
    for curve in curves:
        if curve.family != Family.DYNAMIC_SPARSITY:
            continue
        least = min(point.kv_footprint for point in curve.points)
        reads = [point.kv_reads for point in curve.points if point.kv_reads is not None]
        held = "at one budget" if least < 1 - ROUNDING else "at every budget"
        read = f", reads of it {percent(min(reads))} % at least" if reads else ""
        sparse = Verdict.TRUE if curve.fitted_reads else Verdict.UNDECIDED
        findings.append(
            Finding(
                f"{curve.method} on {curve.setting.task}{_chunk(curve)}",
                f"footprint {percent(least)} % {held}{read}",
                Verdict.FALSE if least < 1 - ROUNDING else sparse,
            )
        )
    return tuple(findings) or _missing("dynamic sparsity")
