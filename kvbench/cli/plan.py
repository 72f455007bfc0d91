"""`kvbench plan`: what a sweep costs on a GPU, told without weights and without a GPU."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvbench import escape
from kvbench.cli import options
from kvbench.cli.config import use_config
from kvbench.cli.messages import say
from kvbench.cli.options import HOW_MUCH, LIST, MODEL, OUTPUT, WHAT, comma_list, opt
from kvbench.cli.run import run
from kvbench.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from kvbench.sweep.forecast import Forecast

EXAMPLES = options.examples(
    "kvbench plan",
    "kvbench plan --gpu a100 --method snapkv,prulong --task recall,rag --samples 20",
    "kvbench plan --model-config config.json --context 65536 --format csv",
)


def read_scale(ctx: typer.Context, value: Path | None) -> Path | None:
    """Take defaults from a configuration of `kvbench run`; without one, from the paper's."""
    from kvbench.reproduce.full import FULL_SCALE

    return use_config(ctx, value or FULL_SCALE, also=tuple(inspect.signature(run).parameters))


def plan(
    ctx: typer.Context,
    method: Annotated[
        str | None, opt(WHAT, "Methods, or 'all'.", "the paper's", metavar=LIST)
    ] = None,
    task: Annotated[str | None, opt(WHAT, "Tasks.", "the paper's", metavar=LIST)] = None,
    option: Annotated[
        list[str] | None, opt(WHAT, options.SWEPT_OPTION, metavar="KEY=VALUE")
    ] = None,
    config: Annotated[
        Path | None,
        opt(
            WHAT,
            "YAML file with options of 'kvbench run'; the command line overrides it.",
            "the paper's scale",
            metavar="FILE",
            is_eager=True,
            callback=read_scale,
        ),
    ] = None,
    budgets: Annotated[
        str, opt(HOW_MUCH, "Shares of the cache to keep, above 0 and at most 1.", metavar=LIST)
    ] = "0.1,0.2,0.3,0.5,0.7,0.9",
    samples: Annotated[
        int | None,
        opt(HOW_MUCH, "Samples of each task; the paper's data sets have no more.", "all", min=1),
    ] = None,
    context: Annotated[
        int, opt(HOW_MUCH, "Tokens of prompt and answer together, at most.", min=2)
    ] = 131072,
    prefill_chunk: Annotated[
        str, opt(HOW_MUCH, "Tokens read in one forward pass.", metavar=LIST)
    ] = "32768",
    answer: Annotated[
        int, opt(HOW_MUCH, "Tokens of an answer, for tasks that the paper does not have.", min=1)
    ] = 128,
    seed: options.Seeds = "0",
    model: options.Model = "tiny",
    model_config: Annotated[
        Path | None, opt(MODEL, "The model's config.json.", "found by --model", metavar="FILE")
    ] = None,
    dtype: options.Dtype = "auto",
    gpu: Annotated[str, opt(MODEL, "h100, h200, a100, a100-40gb or l40s.")] = "h100",
    form: Annotated[
        Literal["text", "json", "csv"], opt(OUTPUT, "What to print.", names=["--format"])
    ] = "text",
) -> int:
    """Predict tokens, FLOPs, bytes and GPU-hours of a sweep from shapes alone.

    Nothing is loaded but a model's config.json, and nothing is measured.
    Without options the cost of the paper's scale is told. The exit code is 1
    if some cells do not fit in the GPU's memory.
    """
    from kvbench.reproduce.full import FULL_SCALE, options_for, shapes, workloads
    from kvbench.sweep.command import Choices
    from kvbench.sweep.forecast import forecast, read_gpu

    chosen = read_gpu(gpu)
    names = None if method is None else comma_list(method, "methods", str)
    choices = Choices(
        model=model,
        method=names,
        budgets=comma_list(budgets, "budgets", options.budget),
        prefill_chunk=comma_list(prefill_chunk, "sizes", options.tokens),
        seed=comma_list(seed, "seeds", options.seed),
        option=options_for(names or (), options.swept(options.key_value(option))),
    )
    tasks = None if task is None else comma_list(task, "tasks", planned)
    loads = workloads(tasks, context=context, samples=samples, answer=answer)
    asked = ctx.get_parameter_source("samples")
    if config != FULL_SCALE or (asked is not None and asked.name == "COMMANDLINE"):
        for each in dict.fromkeys(load.task for load in loads):
            there = sum(load.samples for load in loads if load.task == each)
            if there < (samples or 0):
                say(
                    f"{each}: {there} samples, all that the paper has; for samples that a run "
                    "makes, see 'kvbench run --dry-run' and 'kvbench slurm'"
                )
    given = ctx.get_parameter_source("model")
    own_name = model_config is None or (given is not None and given.name == "COMMANDLINE")
    name = model if own_name else str(model_config)
    shape = shapes(name, model_config, dtype)
    if context > shape.max_context:
        say(f"{name} takes {shape.max_context} tokens at most; 'kvbench run' refuses {context}")
    found = forecast(choices, shape, chosen, loads)
    PRINT[form](found)
    return int(any(line.left_out for line in found.lines))


def planned(name: str) -> str:
    """A task of the paper or of kvbench; InputError for what is not told without being read."""
    from kvbench.registry import source_of
    from kvbench.registry import tasks as registry
    from kvbench.reproduce.datasets import published_data_sets

    known = {each.task for each in published_data_sets().values()} | set(registry.names())
    if name in known:
        return name
    if source_of(name) is not None:
        raise InputError(
            f"plan does not read the task '{name}'; 'kvbench run --dry-run' tells what it costs"
        )
    raise InputError(f"unknown task '{name}': {did_you_mean(name, known)}")


def print_text(found: "Forecast") -> None:
    """Print GPU-hours by method and task, and what each task takes."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kvbench.sweep.runner import gib

    console = escape.console()
    gpu, total = found.gpu, found.total
    tasks = list(dict.fromkeys(line.task for line in found.lines))
    room = f"leaves a run {gib(found.free)}" if found.free > 0 else "is too small for the weights"
    console.print(f"{found.model}: weights {gib(found.weights)}; {gpu.name} {room}")
    places = 1 if total.seconds >= 36_000 else 3

    def as_hours(seconds: float) -> str:
        return "<0.001" if 0 < seconds < 1.8 else f"{seconds / 3600:,.{places}f}"

    hours = Table("method", *tasks, "all", box=SIMPLE_HEAD, title="GPU-hours", title_justify="left")
    for column in hours.columns[1:]:
        column.justify = "right"
    for method in dict.fromkeys(line.method for line in found.lines):
        mine = {line.task: line for line in found.lines if line.method == method}
        cells = [as_hours(mine[t].seconds) + "*" * bool(mine[t].left_out) for t in tasks]
        hours.add_row(method, *cells, as_hours(sum(x.seconds for x in mine.values())))
    sums = [sum(line.seconds for line in found.lines if line.task == task) for task in tasks]
    hours.add_row("all", *map(as_hours, sums), as_hours(total.seconds))
    console.print(hours)
    costs = Table(
        *("task", "samples", "prompt", "answer", "cells", "tokens", "PFLOP", "PB moved", "KV peak"),
        "memory",
        box=SIMPLE_HEAD,
    )
    for column in costs.columns[1:]:
        column.justify = "right"
    for task in tasks:
        loads = [load for load in found.workloads if load.task == task]
        lines = [line for line in found.lines if line.task == task]
        costs.add_row(
            task,
            f"{sum(load.samples for load in loads):,}",
            f"{max(load.prompt for load in loads):,}",
            f"{max(load.answer for load in loads):,}",
            f"{sum(line.cells for line in lines):,.0f}",
            f"{sum(line.tokens for line in lines):.2e}",
            f"{sum(line.flops for line in lines) / 1e15:,.0f}",
            f"{sum(line.bytes_moved for line in lines) / 1e15:,.1f}",
            gib(max(line.kv_bytes_peak for line in lines)),
            gib(max(line.bytes_needed for line in lines)),
        )
    console.print(costs)
    console.print(
        f"all: {total.cells:,.0f} cells, {total.tokens:.3g} tokens, {total.flops:.3g} FLOP, "
        f"{total.bytes_moved:.3g} bytes moved, {as_hours(total.seconds)} GPU-hours; answers are "
        "as long as their limit, memory is beside the weights (docs/cost.md)",
    )
    left = sum(line.left_out for line in found.lines)
    if left:
        say(f"* {left:,.0f} cells do not fit in the memory of {gpu.name} and are not counted")


def print_json(found: "Forecast") -> None:
    """Print everything as JSON."""
    head = {"model": found.model, "gpu": vars(found.gpu), "weights": found.weights}
    loads = [vars(load) for load in found.workloads]
    lines = [vars(line) for line in found.lines]
    whole = {"free": found.free, "total": vars(found.total), "workloads": loads, "lines": lines}
    print(json.dumps({**head, **whole}, indent=2))


def print_csv(found: "Forecast") -> None:
    """Print one line per task and method."""
    from pandas import DataFrame

    print(escape.csv(DataFrame([vars(line) for line in found.lines])), end="")


PRINT = {"text": print_text, "json": print_json, "csv": print_csv}
