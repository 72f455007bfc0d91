"""`kvbench slurm`: print a batch script that runs a sweep as a Slurm array (docs/scale.md)."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

import kvbench
from kvbench.cli import options
from kvbench.cli.options import HOW_MUCH, MODEL, OUTPUT, comma_list, opt
from kvbench.errors import InputError

EXAMPLES = options.examples(
    "kvbench slurm --shards 64 --gpu h100 -- --config paper.yaml --out runs/paper > paper.sbatch",
    "kvbench slurm --shards 8 --hours 2 --sbatch partition=gpu -- --model my/model --out runs/a",
)
SPARE = 1.5  # times the predicted hours of a shard are asked for
LEAST_HOURS = 0.5
HOST_GIB = 16  # beside the weights


def slurm(
    ctx: typer.Context,
    run_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- RUN OPTIONS", help="Options of 'kvbench run', --out included."),
    ] = None,
    shards: Annotated[int, opt(HOW_MUCH, "Jobs of the array.", min=1)] = 8,
    at_once: Annotated[
        int | None, opt(HOW_MUCH, "Jobs that run at one time.", "as many as Slurm starts", min=1)
    ] = None,
    gpu: Annotated[
        str, opt(MODEL, "What the time is predicted for: h100, h200, a100, a100-40gb or l40s.")
    ] = "h100",
    gpus: Annotated[
        int | None, opt(MODEL, "GPUs of each job.", "--workers x --gpus-per-worker", min=0)
    ] = None,
    hours: Annotated[
        float | None,
        opt(HOW_MUCH, "Time limit of each job.", "1.5 times what is predicted", min=0.02, max=8760),
    ] = None,
    cpus: Annotated[int, opt(HOW_MUCH, "CPU cores of each job.", min=1)] = 8,
    memory: Annotated[
        int | None, opt(HOW_MUCH, "GiB of memory of each job.", "twice the weights and 16", min=1)
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        opt(OUTPUT, "Another directive, like partition=gpu; repeatable.", metavar="KEY=VALUE"),
    ] = None,
) -> int:
    """Print a batch script that runs a sweep as a Slurm array; submit nothing.

    Each job of the array measures one shard of the sweep. A job that is
    cut short continues where it stopped when it is submitted again. The time
    limit and the memory come from the cost that 'kvbench plan' predicts.
    """
    given = list(run_options or ())
    chosen = checked(ctx, given)
    needed = chosen["workers"] * chosen["gpus_per_worker"]
    if gpus is None:
        gpus = 0 if chosen["device"] == "cpu" else needed
    elif 0 < gpus < needed or gpus < chosen["gpus_per_worker"] > 1:
        raise InputError(
            f"--gpus {gpus} is too few: {chosen['workers']} workers with "
            f"{chosen['gpus_per_worker']} each need {needed}; leave --gpus out"
        )
    if hours is None or memory is None:
        predicted, weights = prediction(chosen, gpu)
        hours = max(LEAST_HOURS, SPARE * predicted / shards) if hours is None else hours
        memory = memory or HOST_GIB + round(2 * weights / 2**30)
    array = f"1-{shards}" + (f"%{at_once}" if at_once else "")
    lines = {
        "job-name": "kvbench",
        "array": array,
        **({"gres": f"gpu:{gpus}"} if gpus else {}),
        "ntasks": "1",
        "cpus-per-task": str(cpus),
        "mem": f"{memory}G",
        "time": clock(hours),
        "requeue": "",
        "open-mode": "append",
        "output": "kvbench-%A_%a.out",
        **directives(sbatch or ()),
    }
    print("#!/bin/bash")
    print(f"# Made by kvbench {kvbench.__version__}; submit with: sbatch FILE (docs/scale.md)")
    for key, value in lines.items():
        print(f"#SBATCH --{key}" + f"={value}" * bool(value))
    print("\nset -euo pipefail")
    print("# The shard comes from SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT.")
    print(f"exec {shlex.join(['kvbench', 'run', *given])}")
    return 0


def checked(ctx: typer.Context, given: Sequence[str]) -> Mapping[str, Any]:
    """The values of options of `kvbench run`; InputError if a job could not use them."""
    group: Any = ctx.parent
    command = group.command.get_command(group, "run")
    with command.make_context("run", list(given), parent=group) as parsed:
        chosen = dict(parsed.params)
    if chosen.get("out") is None:
        raise InputError("the jobs need one folder for their records; add --out FOLDER after --")
    if chosen.get("dry_run") or chosen.get("shard"):
        name = "--dry-run" if chosen.get("dry_run") else "--shard"
        raise InputError(f"{name} does not belong into a job of an array; leave it out")
    return chosen


def directives(texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` texts as directives of sbatch; InputError for one that could not be read."""
    found = {}
    for text in texts:
        key, equals, value = text.strip().lstrip("-").partition("=")
        if not key.replace("-", "").isalnum() or (equals and not value) or "\n" in text:
            raise InputError(f"--sbatch '{text}' is no directive; write it like partition=gpu")
        found[key] = value
    return found


def clock(hours: float) -> str:
    """Hours as Slurm writes them: days-hours:minutes:seconds, rounded up to a minute."""
    minutes = -int(-hours * 60 // 1)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"


def prediction(chosen: Mapping[str, Any], gpu: str) -> tuple[float, int]:
    """GPU-hours of a sweep, and bytes of the weights, from its options."""
    from kvbench.reproduce.full import options_for, shapes, workloads
    from kvbench.sweep.command import CONTEXT, Choices, default_tasks
    from kvbench.sweep.forecast import forecast, read_gpu

    def texts(name: str) -> tuple[str, ...] | None:
        return None if chosen[name] is None else comma_list(chosen[name], name, str)

    try:
        model = shapes(chosen["model"], None, chosen["dtype"])
    except InputError as error:
        raise InputError(f"{error}; or give --hours and --memory") from None
    context = chosen["context"] or min(model.max_context, CONTEXT)
    chunks = chosen["prefill_chunk"]
    names = texts("method")
    choices = Choices(
        model=chosen["model"],
        method=names,
        budgets=comma_list(chosen["budgets"], "budgets", options.budget),
        prefill_chunk=None if chunks is None else comma_list(chunks, "sizes", options.tokens),
        option=options_for(names or (), options.key_value(chosen["option"])),
    )
    loads = workloads(texts("task") or default_tasks(), context=context, samples=chosen["samples"])
    found = forecast(choices, model, read_gpu(gpu), loads)
    return found.total.seconds / 3600, found.weights
