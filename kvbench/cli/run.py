"""`kvbench run`: the options of a sweep, and what it prints."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from kvbench import escape
from kvbench.cli import complete, options
from kvbench.cli.config import read_config
from kvbench.cli.messages import Terminal, say, show
from kvbench.cli.options import (
    FOLDER,
    HOW_MUCH,
    LIST,
    MEMORY,
    MODEL,
    OUTPUT,
    SCALE,
    WHAT,
    comma_list,
    opt,
)
from kvbench.errors import InputError
from kvbench.records import Record, read_records
from kvbench.run_folder import current_codes, read_common, read_settings
from kvbench.spec import labels_of
from kvbench.sweep.chat import TEMPLATE_DATE
from kvbench.sweep.command import Choices, plan_sweep
from kvbench.sweep.progress import duration
from kvbench.sweep.start import start
from kvbench.sweep.units import slurm_shard

EXAMPLES = options.examples(
    "kvbench run --method snapkv,prulong --task recall,rag --budgets 0.1,0.3",
    "kvbench run --method prulong+snapkv --option snapkv.window=32 --samples 64",
    "kvbench run --task my.jsonl --metric exact_match --max-new-tokens 32",
    "kvbench run --model meta-llama/Llama-3.2-1B --context 32768 --dry-run",
)


TEMPLATE_VALUE = "Value for the chat template, like enable_thinking=false; repeatable."
TASKS = "Tasks to use: names, .jsonl files, folders of them, hf:NAME:CONFIG:SPLIT."
LISTS: Mapping[str, tuple[str, Callable[[str], Any]]] = {  # options with commas between values
    "method": ("methods", str),
    "task": ("tasks", str),
    "budgets": ("budgets", options.budget),
    "prefill_chunk": ("sizes", options.tokens),
    "seed": ("seeds", options.seed),
}
CONFIG = "YAML file with any of these options; the command line overrides it."


def run(
    method: Annotated[
        str | None,
        opt(
            WHAT,
            "Methods to measure, or 'all'.",
            "those of the paper",
            metavar=LIST,
            autocompletion=complete.methods,
        ),
    ] = None,
    task: Annotated[
        str | None,
        opt(WHAT, TASKS, "see 'list tasks'", metavar=LIST, autocompletion=complete.tasks),
    ] = None,
    lm_eval_path: Annotated[
        Path | None,
        opt(WHAT, "Folder with YAML of tasks for lm-eval:NAME.", metavar=FOLDER),
    ] = None,
    option: Annotated[
        list[str] | None,
        opt(WHAT, options.SWEPT_OPTION, metavar="KEY=VALUE"),
    ] = None,
    config: Annotated[
        Path | None,
        opt(WHAT, CONFIG, metavar="FILE", is_eager=True, callback=read_config),
    ] = None,
    budgets: Annotated[
        str, opt(HOW_MUCH, "Shares of the cache to keep, above 0 and at most 1.", metavar=LIST)
    ] = "0.1,0.2,0.3,0.5,0.7,0.9",
    samples: options.Samples = 32,
    context: Annotated[
        int | None, opt(HOW_MUCH, "Tokens of prompt and answer together.", "the model's own", min=1)
    ] = None,
    prefill_chunk: Annotated[
        str | None,
        opt(
            HOW_MUCH,
            "Tokens read in one forward pass.",
            "the model's own or context/4",
            metavar=LIST,
        ),
    ] = None,
    seed: options.Seeds = "0",
    model: options.Model = "tiny",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    attention: Annotated[str, opt(MODEL, "Attention of prompts: auto, sdpa or flash.")] = "auto",
    compress: Annotated[
        Literal["prompt", "context"],
        opt(HOW_MUCH, "What methods evict from: the prompt, or what precedes its question."),
    ] = "prompt",
    judge: options.JudgeModel = None,
    judge_url: options.JudgeUrl = None,
    chat_template: Annotated[
        Literal["auto", "on", "off"],
        opt(MODEL, "Whether prompts go into the model's chat template."),
    ] = "auto",
    metric: options.Metric = None,
    max_new_tokens: options.MaxNewTokens = None,
    too_long: Annotated[
        Literal["error", "cut", "skip"],
        opt(HOW_MUCH, "Samples of task files that do not fit: refuse, cut the context, leave out."),
    ] = "error",
    template_date: Annotated[
        str, opt(MODEL, "Date that the chat template writes.", metavar="YYYY-MM-DD")
    ] = TEMPLATE_DATE,
    template_option: Annotated[
        list[str] | None,
        opt(MODEL, TEMPLATE_VALUE, metavar="KEY=VALUE"),
    ] = None,
    batch_rows: Annotated[
        int | None,
        opt(MEMORY, "Largest number of cells measured together.", "as memory allows", min=1),
    ] = None,
    memory_limit: Annotated[
        str | None,
        opt(
            MEMORY,
            "Memory to use beside the weights, like 8GiB.",
            "most of what is free",
            metavar="SIZE",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        opt(SCALE, "The part of the cells to measure.", "all, or a Slurm array's", metavar="I/N"),
    ] = None,
    workers: options.Workers = 1,
    gpus_per_worker: options.GpusPerWorker = 1,
    ray: options.RayAddress = None,
    out: Annotated[
        Path | None,
        opt(OUTPUT, "Folder for the records.", "results/runs/MODEL-TASKS-DATE", metavar=FOLDER),
    ] = None,
    dry_run: options.DryRun = False,
) -> int:
    """Measure methods on tasks at several budgets.

    Full attention is always measured too: it is the baseline. Without
    --method, what the paper compares is measured, controls and quest;
    '--method all' measures everything that 'list methods' shows. The same
    command continues an interrupted run. If you ask for more samples,
    budgets or prefill chunks, only the missing cells are measured.
    """
    choices = read_choices(locals())
    if dry_run:
        print_plan(choices)
        return 0
    return measure(choices)


def read_choices(given: Mapping[str, Any]) -> Choices:
    """What the values of all options of `run` mean; InputError for what no sweep can have."""
    read = {each.name: given[each.name] for each in fields(Choices)}
    for name, (what, item) in LISTS.items():
        if read[name] is not None:
            read[name] = comma_list(read[name], what, item)
    read["task"] = in_folder(read["task"], given["lm_eval_path"])
    read["option"] = options.swept(options.key_value(read["option"]))
    read["template_option"] = options.key_value(read["template_option"], "--template-option")
    if read["memory_limit"] is not None:
        read["memory_limit"] = options.memory(read["memory_limit"])
    text = read["shard"]
    read["shard"] = slurm_shard(os.environ) if text is None else options.shard(text)
    return Choices(**read)


def in_folder(tasks: tuple[str, ...] | None, folder: Path | None) -> tuple[str, ...] | None:
    """Names of tasks, those of lm-eval with the folder that `--lm-eval-path` gives."""
    if folder is None:
        return tasks
    source = "lm-eval:"
    if not any(task.startswith(source) for task in tasks or ()):
        raise InputError("--lm-eval-path is for tasks of lm-eval; name one: --task lm-eval:NAME")
    return tuple(
        f"{source}{folder}/{task.removeprefix(source)}" if task.startswith(source) else task
        for task in tasks or ()
    )


def measure(choices: Choices) -> int:
    """Run a sweep with its progress on stderr and its summary on stdout; the exit code."""
    from kvbench.report.tables import print_summary

    result = start(choices, Terminal())
    if result.interrupted:
        return result.exit_code
    records = read_records(result.folder, [], read_common(result.folder))
    print_summary(records, current_codes([read_settings(result.folder)]))
    say(f"records are in {result.folder}; for tables and figures: kvbench report {result.folder}")
    for line in failures(result.failed):
        say(line)
    return result.exit_code


def failures(failed: Sequence[Record]) -> list[str]:
    """A line for each reason of a failure: which cells, and why."""
    reasons: dict[tuple[str, str | None], list[Record]] = {}
    for record in failed:
        reasons.setdefault((record.task, record.error), []).append(record)
    lines = []
    for (task, error), records in reasons.items():
        methods = dict.fromkeys(record.method for record in records)
        budgets = dict.fromkeys(f"{record.budget:g}" for record in records)
        samples = {(record.sample_seed, record.sample) for record in records}
        what = f"{', '.join(methods)} at budget {', '.join(budgets)} on {task}"
        lines.append(f"failed: {what}, {len(samples)} samples: {error}")
    return lines


def print_plan(choices: Choices) -> None:
    """Show what a run would measure, in which groups, and about what it would take."""
    from rich.table import Table

    from kvbench.sweep.runner import gib

    plan = plan_sweep(choices)
    for note in plan.notes:
        say(note)
    console = escape.console()
    methods = Table("methods", "budgets", "prefill chunks", "tasks", "cells each", box=None)
    alike: dict[tuple[str, ...], list[str]] = {}  # methods that are measured on the same
    specs = list({id(cell.spec): cell.spec for cell in plan.cells}.values())
    for spec, method in zip(specs, labels_of(specs), strict=True):
        cells = [cell for cell in plan.cells if cell.spec is spec]
        chunks = sorted({c.prefill_chunk for c in cells if c.prefill_chunk is not None})
        row = (
            ", ".join(f"{b:g}" for b in sorted({c.budget for c in cells})),
            ", ".join(map(str, chunks)) or "any",
            ", ".join(dict.fromkeys(c.sample.task for c in cells)),
            str(len(cells)),
        )
        alike.setdefault(row, []).append(method)
    for shared, names in alike.items():
        methods.add_row(", ".join(names), *shared)
    console.print(methods, "")

    groups = Table(
        *("task", "chunk", "groups", "cells each", "tokens", "tokens alone", "memory"), box=None
    )
    kinds = [(batch[0].sample.task, plan.sweep.chunk(batch)) for batch, _ in plan.batches]
    for task, chunk in dict.fromkeys(kinds):
        here = [b for b, kind in zip(plan.batches, kinds, strict=True) if kind == (task, chunk)]
        sizes = sorted({len(batch) for batch, _ in here})
        groups.add_row(
            task,
            str(chunk),
            str(len(here)),
            f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}",
            str(sum(cost.tokens for _, cost in here)),
            str(sum(cell.tokens for batch, _ in here for cell in batch)),
            gib(max(cost.bytes for _, cost in here)),
        )
    console.print(groups)
    broken = [cell for cell in plan.cells if cell.error]
    for error in dict.fromkeys(cell.error for cell in broken):
        say(f"{sum(cell.error == error for cell in broken)} cells cannot be measured: {error}")
    show()
    line = f"{len(plan.cells)} of {plan.planned} cells to measure in {plan.folder}: "
    if plan.batches:
        line += f"{sum(cost.tokens for _, cost in plan.batches)} tokens at most, "
        line += f"about {duration(plan.seconds() or 0)}, "
        line += f"{gib(max(cost.bytes for _, cost in plan.batches))} beside the model "
    show(line + f"(memory limit {gib(plan.sweep.memory_limit)})")
