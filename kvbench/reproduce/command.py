"""`kvbench reproduce`: the paper's table and claims, beside the paper's own values.

At small scale the embedded model measures all methods on the generated tasks. The full scale is the
configuration `full-scale.yaml`; what a machine lacks for it is listed before anything is loaded.
"""

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED, read_card
from kvbench.records import BASELINE, write_atomically
from kvbench.registry import tasks as task_registry
from kvbench.report.build import Critical, Curve, Report, make_report
from kvbench.report.publish import publish
from kvbench.report.tables import WIDTH_OF_A_FILE, critical_text, interval_text, legend, mark
from kvbench.reproduce.claims import Claim, Verdict, judge
from kvbench.reproduce.paper import is_lower_bound, paper_report
from kvbench.sweep.command import Choices, run_sweep
from kvbench.sweep.progress import Listener

FULL_SCALE = Path(__file__).parent / "full-scale.yaml"
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CHUNKS = (4, 8)  # prefill chunks are these parts of the context; the paper's is a quarter
RUN = "run"  # the folder, inside the output's, of the records

# Llama-3.1-8B: parameters, and bytes a token of keys and values (32 layers of 8 KV heads of 128).
PARAMETERS = 8_030_000_000
KV_BYTES = 2 * 32 * 8 * 128 * 2
WORKING_BYTES = 4 * 2**30  # activations of a prefill chunk of 32K tokens, in bfloat16


@dataclass(frozen=True)
class Line:
    """A method on a task at a prefill chunk: our critical footprint and the paper's."""

    task: str
    method: str
    prefill_chunk: int | None
    ours: Curve | None
    paper: Curve | None

    def as_dict(self) -> dict[str, Any]:
        """One line of table.csv; footprints in 0..1."""
        found = self.ours.footprint if self.ours else None
        ends = found.interval if found else None
        theirs = self.paper.footprint if self.paper else None
        return {
            "task": self.task,
            "method": self.method,
            "prefill_chunk": self.prefill_chunk,
            "critical_footprint": found.value if found else None,
            "ci_low": ends.low if ends else None,
            "ci_high": ends.high if ends else None,
            "status": found.status if found else None,
            "baseline": self.ours.baseline if self.ours else None,
            "samples": self.ours.samples if self.ours else None,
            "paper_critical_footprint": theirs.value if theirs else None,
            "paper_status": theirs.status if theirs else None,
            "paper_is_lower_bound": is_lower_bound(self.paper) if self.paper else None,
            "paper_baseline": self.paper.baseline if self.paper else None,
        }


def reproduce_small(
    out: Path, *, samples: int, seed: int, threshold: float, listener: Listener
) -> int:
    """Sweep the embedded model, or go on with it, and write tables, claims, pictures and page.

    Records lie in `out`/run, so that the same command continues an unfinished sweep. Returns the
    exit code; InputError as `kvbench run` and `kvbench report` raise it.
    """
    result = run_sweep(small_choices(out / RUN, samples=samples, seed=seed), listener)
    if result.interrupted:
        return result.exit_code
    report = make_report([out / RUN], threshold)
    lines = compare(report, paper_report(threshold))
    claims = judge(report)
    publish(report, out)
    texts = {
        "table.csv": table_csv(lines),
        "table.md": table_markdown(lines, report),
        "claims.md": claims_markdown(claims, report),
    }
    try:
        for name, text in texts.items():
            write_atomically(out / name, text)
    except OSError as error:
        raise InputError(
            f"cannot write to {out}: {error.strerror}; choose another --out"
        ) from error
    print_lines(lines, claims)
    for note in report.notes:
        listener.note(f"note: {note}")
    listener.note(f"wrote {', '.join(texts)}, pictures and report.html to {out}")
    return result.exit_code


def small_choices(run: Path, *, samples: int, seed: int) -> Choices:
    """What `kvbench run` is to measure: all that the embedded model has what it needs for."""
    context = read_card(EMBEDDED["tiny"]).context
    return Choices(
        budgets=BUDGETS,
        samples=samples,
        prefill_chunk=tuple(context // part for part in CHUNKS),
        seed=seed,
        out=run,
        device="cpu",
    )


def compare(report: Report, paper: Report) -> list[Line]:
    """Every method and prefill chunk of ours and every method of the paper's, by task."""
    lines = []
    theirs = {(c.setting.task, c.method): c for c in paper.curves if c.method != BASELINE}
    matched = set()
    for curve in report.curves:
        if curve.method == BASELINE:
            continue
        key = curve.setting.task, curve.method
        matched.add(key)
        lines.append(Line(*key, curve.prefill_chunk, curve, theirs.get(key)))
    lines += [Line(*key, None, None, c) for key, c in theirs.items() if key not in matched]
    ours = {curve.setting.task for curve in report.curves}
    return sorted(
        lines, key=lambda x: (x.task not in ours, x.task, x.method, -(x.prefill_chunk or 0))
    )


def table_csv(lines: Sequence[Line]) -> str:
    """One line per method, task and prefill chunk."""
    rows = [line.as_dict() for line in lines]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def paper_text(curve: Curve | None) -> str:
    """The paper's critical footprint in per cent, `>=` where the figure only bounds it."""
    if curve is None:
        return ""
    return (">=" if is_lower_bound(curve) else "") + critical_text(curve.footprint)


def _ours_text(curve: Curve | None) -> str:
    if curve is None:
        return ""
    found: Critical | None = curve.footprint
    return f"{critical_text(found)} ({interval_text(found)}) {mark(curve)}".strip()


def _cells(lines: Sequence[Line], task: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one task's table: a row a method, a column a prefill chunk."""
    of_task = [line for line in lines if line.task == task]
    chunks = sorted({x.prefill_chunk for x in of_task if x.prefill_chunk}, reverse=True)
    rows = []
    for method in dict.fromkeys(line.method for line in of_task):
        by_chunk = {line.prefill_chunk: line for line in of_task if line.method == method}
        ours = [by_chunk.get(chunk, by_chunk.get(None)) for chunk in chunks]
        paper = next(iter(by_chunk.values())).paper
        rows.append([method, *(_ours_text(x.ours if x else None) for x in ours), paper_text(paper)])
    return ["method", *(f"ours, chunk {chunk}" for chunk in chunks), "paper"], rows


def table_markdown(lines: Sequence[Line], report: Report) -> str:
    """The paper's table of critical footprints, ours beside it."""
    parts = [
        "# Critical KV footprints, ours and the paper's\n",
        f"{_setting_text(report)} Per cent of full attention's footprint; in brackets the 95 % "
        "interval. The paper's values (arXiv 2506.17121, figure 1: Llama-3.1-8B-Instruct, 128K "
        "tokens, prefill chunks of a quarter of that) are read off its figure and fitted by the "
        "same code, without intervals; ≥ where a point below the figure's axis bounds the "
        "value. Model, context and tasks' data differ, so orders are to be compared, not values.\n",
        _escaped(legend(report)) + "\n",
    ]
    for task in dict.fromkeys(line.task for line in lines):
        header, rows = _cells(lines, task)
        ours = next((c for c in report.curves if c.setting.task == task), None)
        scores = f"full attention scores {ours.baseline:.3f} here" if ours else "not measured here"
        parts.append(f"## {task}\n\n{scores}\n")
        rule = ["---", *["---:"] * (len(header) - 1)]
        parts += ["| " + " | ".join(map(_escaped, row)) + " |" for row in [header, rule, *rows]]
        parts.append("")
    return "\n".join(parts)


def claims_markdown(claims: Sequence[Claim], report: Report) -> str:
    """The claims as a checklist, each with its findings."""
    parts = [
        "# The paper's claims, on our data\n",
        f"{_setting_text(report)} A claim is ticked where it is true of every finding (or, where "
        "its rule says so, of some).\n",
    ]
    for claim in claims:
        tick = "x" if claim.verdict is Verdict.TRUE else " "
        parts.append(f"- [{tick}] **{claim.text}: {claim.verdict}**")
        parts.append(f"  Judged by: {_escaped(claim.rule)}.")
        parts += [
            f"  - {finding.verdict}: {finding.where}: {_escaped(finding.what)}"
            for finding in claim.findings
        ]
    return "\n".join([*parts, ""])


def _setting_text(report: Report) -> str:
    setting = report.settings()[0]
    return (
        f"Model {setting.model}, {setting.context:,} tokens, "
        f"{max(c.samples for c in report.curves)} samples a task, seed {setting.seed}, threshold "
        f"{report.threshold:g}."
    )


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    signs = {"<=": "≤", ">=": "≥", "<": "&lt;", ">": "&gt;", "~": "\\~", "*": "\\*"}
    for sign, shown in signs.items():
        text = text.replace(sign, shown)
    return text


def print_lines(lines: Sequence[Line], claims: Sequence[Claim]) -> None:
    """The table, a task at a time, and the claims' verdicts, on stdout."""
    console = Console(width=None if os.isatty(1) else WIDTH_OF_A_FILE)
    measured = dict.fromkeys(line.task for line in lines if line.ours is not None)
    for task in measured:
        header, rows = _cells(lines, task)
        table = Table(
            box=SIMPLE_HEAD, title=f"{task}: critical KV footprint, %", title_justify="left"
        )
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print("Claims of the paper, on these data:")
    for claim in claims:
        console.print(f"  {claim.verdict:12} {claim.text}", highlight=False)


def full_scale_choices() -> dict[str, Any]:
    """The configuration of the full scale, as `kvbench run --config` takes it."""
    settings = yaml.safe_load(FULL_SCALE.read_text(encoding="utf-8"))
    return dict(settings)


def full_choices(out: Path) -> Choices:
    """The full scale as a sweep into the folder `out`."""
    settings = full_scale_choices()
    return Choices(
        model=str(settings["model"]),
        method=tuple(settings["method"]),
        task=tuple(settings["task"]),
        budgets=tuple(settings["budgets"]),
        samples=int(settings["samples"]),
        context=int(settings["context"]),
        prefill_chunk=(int(settings["prefill-chunk"]),),
        out=out,
        device=str(settings["device"]),
        dtype=str(settings["dtype"]),
        option={key: str(value) for key, value in settings["option"].items()},
    )


def missing_for_full_scale(settings: dict[str, Any]) -> list[str]:
    """What this machine lacks to run the full scale, a line each; empty where it lacks nothing.

    A task whose samples are the published data says so in an attribute `published`.
    """
    missing = [_missing_gpu(int(settings["context"])), _missing_model(str(settings["model"]))]
    known = task_registry.names()
    unknown = [task for task in settings["task"] if task not in known]
    if unknown:
        missing.append(f"tasks that kvbench does not have: {', '.join(unknown)}")
    generated = [
        task
        for task in settings["task"]
        if task in known and not getattr(task_registry.get(task), "published", False)
    ]
    if generated:
        missing.append(
            f"the data of HELMET and LongProc: {', '.join(generated)} can only be generated here"
        )
    missing.append(_missing_scores(str(settings["model"]), settings))
    return [text for text in missing if text is not None]


def _missing_gpu(context: int) -> str | None:
    needed = 2 * PARAMETERS + 2 * KV_BYTES * context + WORKING_BYTES
    want = f"a CUDA GPU with {needed / 2**30:.0f} GiB of memory"
    try:
        import torch
    except ModuleNotFoundError:
        return f"{want}, and PyTorch to use it: pip install 'kvbench[run]'"
    if not torch.cuda.is_available():
        return f"{want}: there is none that PyTorch {torch.__version__} can use"
    memory = max(
        torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
    )
    return None if memory >= needed else f"{want}: the largest here has {memory / 2**30:.0f} GiB"


def _missing_model(name: str) -> str | None:
    try:
        from huggingface_hub import HfApi, try_to_load_from_cache
    except ModuleNotFoundError:
        return f"the model {name}: pip install 'kvbench[run]', to load it with"
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    try:
        HfApi().auth_check(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        return f"the model {name}: it is not in the hub's cache, and the hub says: {reason}"
    return None


def _missing_scores(model: str, settings: dict[str, Any]) -> str | None:
    """Head scores that no option names; a model of the hub comes with none."""
    options = settings.get("option") or {}
    splits = [m for m in ("duoattention", "prulong") if m in settings["method"]]
    wanted = [m for m in splits if not Path(str(options.get(f"{m}.scores", ""))).is_file()]
    if not wanted:
        return None
    return (
        f"head scores of {model} for {', '.join(wanted)}: learn them with 'kvbench train', and "
        "name the files as METHOD.scores under 'option'"
    )
