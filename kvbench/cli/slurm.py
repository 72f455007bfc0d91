"""`kvbench slurm`: print a batch script that runs a sweep as a Slurm array (docs/scale.md)."""

import re
import shlex
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kvbench
from kvbench.cli import options
from kvbench.cli.messages import say
from kvbench.cli.options import HOW_MUCH, MODEL, OUTPUT, opt
from kvbench.cli.run import read_choices
from kvbench.errors import InputError
from kvbench.sweep.command import MOST_SHARDS, Choices

if TYPE_CHECKING:
    from kvbench.sweep.forecast import Forecast

EXAMPLES = options.examples(
    "kvbench slurm --shards 64 --gpu h100 -- --config paper.yaml --out runs/paper > paper.sbatch",
    "kvbench slurm --shards 8 --hours 2 --sbatch partition=gpu -- --model my/model --out runs/a",
)
SPARE = 1.5  # times the predicted hours of a shard are asked for
LEAST_HOURS = 0.5
HOST_GIB = 16  # beside the weights
MOST_HOURS = 72.0  # without a word
OWN = {  # directives that follow from options of this command
    "array": "the shards depend on it; use --shards and --at-once",
    "time": "use --hours",
    "cpus-per-task": "use --cpus",
    "requeue": "it is set anyway",
}


def slurm(
    ctx: typer.Context,
    run_options: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- RUN OPTIONS", help="Options of 'kvbench run', --out included."),
    ] = None,
    shards: Annotated[int, opt(HOW_MUCH, "Jobs of the array.", min=1, max=MOST_SHARDS)] = 8,
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
        int | None,
        opt(
            HOW_MUCH, "GiB of memory of each job.", "16, and twice the weights for a worker", min=1
        ),
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
    choices = checked(ctx, given, shards)
    needed = choices.workers * choices.gpus_per_worker
    if gpus is None:
        gpus = 0 if choices.device == "cpu" else needed
    elif 0 < gpus < needed or gpus < choices.gpus_per_worker > 1:
        raise InputError(
            f"--gpus {gpus} is too few: {choices.workers} workers with "
            f"{choices.gpus_per_worker} each need {needed}; leave --gpus out"
        )
    if hours is None and not gpus:
        raise InputError(
            "the time is predicted for GPUs only, and the jobs have none; give --hours"
        )
    lines = {"job-name": "kvbench", "array": f"1-{shards}" + (f"%{at_once}" if at_once else "")}
    extra = directives(sbatch or ())
    found = predicted(choices, gpu, needed=hours is None or memory is None)
    if hours is None:
        assert found is not None
        hours = hours_of(found, choices, shards)
    if memory is None:
        assert found is not None
        memory = HOST_GIB + round(2 * choices.workers * found.weights / 2**30)
    if hours > MOST_HOURS:
        say(
            f"each job asks for {hours / 24:,.1f} days, more than many clusters allow; "
            "--shards makes them shorter"
        )
    lines |= {
        **({"gres": f"gpu:{gpus}"} if gpus else {}),
        "ntasks": "1",
        "cpus-per-task": str(cpus),
        "mem": f"{memory}G",
        "time": clock(hours),
        "requeue": "",
        "open-mode": "append",
        "output": "kvbench-%A_%a.out",
        **extra,
    }
    print("#!/bin/bash")
    print(f"# Made by kvbench {kvbench.__version__}; submit with: sbatch FILE (docs/scale.md)")
    for key, value in lines.items():
        print(f"#SBATCH --{key}" + f"={value}" * bool(value))
    print("\nset -euo pipefail")
    print("# To repeat one job, number 3: sbatch --array=3 FILE")
    shard = f'"$SLURM_ARRAY_TASK_ID/{shards}"'
    print(f"exec kvbench run --shard {shard} {shlex.join(given)}")
    return 0


def checked(ctx: typer.Context, given: Sequence[str], shards: int) -> Choices:
    """The choices of `kvbench run` in a job; InputError if it could not use its options."""
    group: Any = ctx.parent
    command = copy(group.command.get_command(group, "run"))
    command.add_help_option = False  # it would print the help as the script
    with command.make_context("run", list(given), parent=group) as parsed:
        values = parsed.params
    if values["out"] is None:
        raise InputError("the jobs need one folder for their records; add --out FOLDER after --")
    if values["dry_run"] or values["shard"]:
        name = "--dry-run" if values["dry_run"] else "--shard"
        raise InputError(f"{name} does not belong into a job of an array; leave it out")
    return read_choices({**values, "shard": f"1/{shards}"})


def directives(texts: Sequence[str]) -> dict[str, str]:
    """`KEY=VALUE` texts as directives of sbatch; InputError for one that could not be read."""
    found: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.strip().lstrip("-").partition("="))
        readable = value.isprintable() and not set(value) & set("\"'\\")
        if not re.fullmatch("[a-z][a-z0-9-]+", key) or (equals and not value) or not readable:
            raise InputError(
                f"--sbatch '{text}' is no directive; write it like partition=gpu, with the long "
                "name of the option and without quotes"
            )
        if key in found:
            raise InputError(f"--sbatch {key} is given twice; give it once")
        if key in OWN:
            raise InputError(f"--sbatch {key} is not for kvbench's jobs: {OWN[key]}")
        found[key] = f'"{value}"' if re.search(r"[\s#]", value) else value
    return found


def predicted(choices: Choices, gpu: str, *, needed: bool) -> "Forecast | None":
    """What a sweep takes; None for a model of the hub, if that is not `needed`.

    InputError for what `kvbench run` would refuse, as far as no model is needed that is loaded.
    """
    from kvbench.models.card import model_folder
    from kvbench.reproduce.full import shapes
    from kvbench.sweep.command import check_shapes, choose_methods, choose_settings, ready
    from kvbench.sweep.forecast import forecast, read_gpu, workloads_of

    peaks = read_gpu(gpu)
    tasks, card = ready(choices)
    specs, _ = choose_methods(choices, card)
    if not needed and model_folder(choices.model) is None:
        return None
    try:
        model = replace(shapes(choices.model, None, choices.dtype), card=card)
    except InputError as error:
        raise InputError(f"{error}; or give --hours and --memory") from None
    reads = any(task.reads for task in tasks)
    plain = replace(choices, chat_template="off")  # there is no tokenizer
    settings = choose_settings(plain, model, reads)
    check_shapes(specs, model, settings)
    if not needed:
        return None
    limit = settings.limit or settings.context
    loads = workloads_of(tasks, choices.samples, settings.context, limit)
    peaks = replace(peaks, memory=peaks.memory * choices.gpus_per_worker)
    return forecast(replace(choices, prefill_chunk=settings.prefill_chunks), model, peaks, loads)


def hours_of(found: "Forecast", choices: Choices, shards: int) -> float:
    """The time limit of a job: its part of the sweep, and a long sample, which may come last."""
    if left := sum(line.left_out for line in found.lines):
        raise InputError(
            f"{left:,.0f} cells do not fit in the memory of {found.gpu.name}, so that nobody knows "
            "their time; choose another --gpu, or give --hours"
        )
    longest = max(
        sum(line.seconds for line in found.lines if line.task == task)
        / (len(choices.seeds) * sum(load.samples for load in found.workloads if load.task == task))
        for task in {load.task for load in found.workloads}
    )
    seconds = found.total.seconds / (shards * choices.workers) + longest
    return max(LEAST_HOURS, SPARE * seconds / 3600)


def clock(hours: float) -> str:
    """Hours as Slurm writes them: days-hours:minutes:seconds, rounded up to a minute."""
    minutes = -int(-hours * 60 // 1)
    return f"{minutes // 1440}-{minutes // 60 % 24:02}:{minutes % 60:02}:00"
