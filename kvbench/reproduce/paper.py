"""The paper's results figure as records, to be fitted like any run's (arXiv 2506.17121).

`paper-figure1.csv` is read off the figure: Llama-3.1-8B-Instruct, inputs of 128K tokens, KV
footprint and score in per cent, good to about 0.3 and 0.5 points. A point below the figure's axis
has the axis' floor for a score, marked `at_most`: an upper bound.
"""

import csv
from pathlib import Path

from kvbench.records import BASELINE, Record
from kvbench.report.build import Curve, Report, report_records

FIGURE = Path(__file__).parent / "paper-figure1.csv"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
CONTEXT = 131072  # tokens
UPPER_BOUND = "at_most"


def paper_records() -> list[Record]:
    """One record a point of the figure: the mean over samples, as if it were one sample.

    Its subtask says how the score was read, `read` or `at_most`; no peak and no text is known.
    """
    lines = FIGURE.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    records = []
    for row in rows:
        footprint = float(row["kv_footprint"]) / 100
        full = row["method"] == BASELINE
        records.append(
            Record(
                fingerprint=f"figure 1/{row['task']}/{row['method']}/{row['kv_footprint']}",
                model=MODEL,
                task=row["task"],
                subtask=row["score_is"],
                method=row["method"],
                family="",
                options={},
                budget=1.0 if full else footprint,
                prefill_chunk=None,
                sample=0,
                sample_seed=0,
                context=CONTEXT,
                finished="2025-06-20",
                prompt_tail="",
                reference=None,
                prediction="",
                score=float(row["score"]) / 100,
                kv_footprint=footprint,
            )
        )
    return records


def paper_report(threshold: float) -> Report:
    """The paper's curves and critical footprints, by our fit; there are no intervals."""
    return report_records(paper_records(), threshold)


def is_lower_bound(curve: Curve) -> bool:
    """Whether a paper's critical footprint starts from an upper bound of a score.

    A lower score there would move the crossing towards the next point, so the true value is no
    smaller.
    """
    if curve.footprint is None:
        return False
    below = [p for p in curve.points if p.kv_footprint <= curve.footprint.value]
    if not below:
        return False
    return any(r.subtask == UPPER_BOUND for r in curve.cells[below[-1].budget].values())
