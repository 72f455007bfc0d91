"""The paper's own results (arXiv 2506.17121): the values it prints, and the curves of its figure.

`paper-table2.csv` holds the critical KV footprints of Table 2, the values that `kvbench reproduce`
shows. `paper-figure3.csv` holds the curves, read off figure 3: KV footprint and score in per cent,
accurate to about 0.3 and 0.5 points. The figure's axis cuts curves off, so points are missing, and
a value fitted to them can be wrong. A point below the axis has the axis's lowest score, marked
`at_most`: an upper bound.

The model is Llama-3.1-8B-Instruct. Inputs have up to 128K tokens; those of html_to_tsv have 12K to
38K, those of travel_planning about 6K.
"""

from pathlib import Path

from pandas import DataFrame, read_csv

from kvbench.records import BASELINE, Record
from kvbench.report.build import Report, report_records

TABLE = Path(__file__).parent / "paper-table2.csv"
FIGURE = Path(__file__).parent / "paper-figure3.csv"
THRESHOLD = 0.9  # of the table
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
CONTEXT = 131072  # tokens, the limit of an input


def paper_table(threshold: float) -> DataFrame:
    """Return the paper's critical footprints: columns task, method, critical_footprint and bound.

    Footprints are in 0..1, printed to two digits and without intervals. `bound` is empty for a
    value, `above` where no budget of the paper reaches the threshold, `below` where all do. The
    table has no rows at another threshold than the paper's.
    """
    table = read_csv(TABLE, comment="#").fillna({"bound": ""})
    table["critical_footprint"] /= 100
    return table if abs(threshold - THRESHOLD) < 1e-9 else table.iloc[:0]


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
                fingerprint=f"figure 3/{row['task']}/{row['method']}/{row['kv_footprint']}",
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
