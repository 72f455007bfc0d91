"""The paper's results figure as records, fitted like those of any run (arXiv 2506.17121).

`paper-figure1.csv` is read off the figure: Llama-3.1-8B-Instruct, inputs of 128K tokens, KV
footprint and score in per cent, accurate to about 0.3 and 0.5 points. A point below the figure's
axis has the lowest score of the axis, marked `at_most`: an upper bound.
"""

from pathlib import Path

from pandas import read_csv

from kvbench.records import BASELINE, Record
from kvbench.report.build import Curve, Report, report_records

FIGURE = Path(__file__).parent / "paper-figure1.csv"
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
CONTEXT = 131072  # tokens
UPPER_BOUND = "at_most"


def paper_records() -> list[Record]:
    """Return one record per point of the figure: the mean over samples, as if it were one sample.

    The subtask says how the score was read, `read` or `at_most`. Peaks and texts are unknown.
    """
    records = []
    for row in read_csv(FIGURE, comment="#", dtype=str).to_dict("records"):
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
    """Return the paper's curves and critical footprints by our fit, without intervals."""
    return report_records(paper_records(), threshold)


def is_lower_bound(curve: Curve) -> bool:
    """Whether a critical footprint of the paper depends on a score that is an upper bound.

    With a lower score the crossing would move towards the next point, so the true value is at least
    the one found.
    """
    if curve.footprint is None:
        return False
    below = [p for p in curve.points if p.kv_footprint <= curve.footprint.value]
    if not below:
        return False
    cells = curve.cells[curve.cells["budget"] == below[-1].budget]
    return bool((cells["subtask"] == UPPER_BOUND).any())
