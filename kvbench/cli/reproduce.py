"""`kvbench reproduce`: the paper's table and claims on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvbench.cli import options
from kvbench.cli.messages import Terminal, say, show
from kvbench.cli.options import FOLDER, HOW_MUCH, LIST, MODEL, OUTPUT, WHAT, comma_list, opt
from kvbench.cli.run import print_plan
from kvbench.errors import InputError

if TYPE_CHECKING:
    from kvbench.reproduce.command import Reproduction

EXAMPLES = options.examples(
    "kvbench reproduce",
    "kvbench reproduce --samples 100 --out results/reproduce-100",
    "kvbench reproduce --scale full --data results/data",
    "kvbench reproduce --scale full --rehearse",
)
# The options that each scale has, beside --scale and --rehearse.
EVERY = {"scale", "rehearse", "samples", "threads", "threshold", "out"}
OF_SCALE = {
    "--scale small": EVERY | {"seed", "dry_run", "workers"},
    "--scale full": EVERY
    | {"data", "method", "task", "option", "budgets", "judge", "judge_url", "dry_run"}
    | {"workers", "gpus_per_worker", "ray"},
    "--rehearse": EVERY | {"method", "task", "budgets", "model"},
}
REHEARSE = "Run the full scale on a CPU with small made-up data; its numbers mean nothing."


def reproduce(
    ctx: typer.Context,
    scale: Annotated[
        Literal["small", "full"],
        opt(WHAT, "small: the embedded model. full: the paper's model, context and data."),
    ] = "small",
    rehearse: Annotated[bool, opt(WHAT, REHEARSE, names=["--rehearse"], metavar="")] = False,
    data: Annotated[
        Path, opt(WHAT, "Task files of the full scale, from 'kvbench convert'.", metavar=FOLDER)
    ] = Path("results/data"),
    method: Annotated[
        str | None, opt(WHAT, "Some methods of the full scale.", "all of them", metavar=LIST)
    ] = None,
    task: Annotated[
        str | None, opt(WHAT, "Some tasks of the full scale.", "all eight", metavar=LIST)
    ] = None,
    option: Annotated[
        list[str] | None, opt(WHAT, options.METHOD_OPTION, metavar="KEY=VALUE")
    ] = None,
    budgets: Annotated[
        str | None, opt(HOW_MUCH, "Budgets of the full scale.", "those of the paper", metavar=LIST)
    ] = None,
    samples: Annotated[
        int | None,
        opt(
            HOW_MUCH,
            "Samples of each task; in a rehearsal, of each data set.",
            "24; full: all; 1",
            min=1,
        ),
    ] = None,
    seed: options.Seed = 0,
    model: Annotated[str, opt(MODEL, "Model of a rehearsal: tiny or smollm2-135m.")] = "tiny",
    threads: options.Threads = None,
    workers: options.Workers = 1,
    gpus_per_worker: options.GpusPerWorker = 1,
    ray: options.RayAddress = None,
    judge: options.JudgeModel = None,
    judge_url: options.JudgeUrl = None,
    threshold: options.Threshold = 0.9,
    out: Annotated[
        Path | None,
        opt(
            OUTPUT,
            "Folder for records, tables, figures and the page.",
            "results/reproduce; full: results/runs/full-scale or rehearsal",
            metavar=FOLDER,
        ),
    ] = None,
    dry_run: options.DryRun = False,
) -> int:
    """Compare the paper's table and claims with new measurements.

    The same command continues an interrupted reproduction. With --scale
    full, what is missing is listed, and the seed is the paper's.
    """
    from kvbench.reproduce import command

    if scale == "small" and rehearse:
        raise InputError("--rehearse rehearses the full scale; add --scale full")
    check_used(ctx, "--rehearse" if rehearse else f"--scale {scale}")
    if scale == "small":
        count, folder = samples or 24, out or Path("results/reproduce")
        if dry_run:
            run = folder / command.RUN
            print_plan(command.small_choices(run, samples=count, seed=seed, workers=workers))
            return 0
        found = command.reproduce_small(
            folder,
            samples=count,
            seed=seed,
            threshold=threshold,
            workers=workers,
            listener=Terminal(),
        )
        print_reproduction(found)
        return found.code
    part: dict[str, Any] = {}
    if method is not None:
        part["method"] = comma_list(method, "methods", str)
    if task is not None:
        part["task"] = comma_list(task, "tasks", str)
    if budgets is not None:
        part["budgets"] = comma_list(budgets, "budgets", options.budget)
    if rehearse:
        from kvbench.reproduce.rehearsal import rehearse as run_rehearsal

        found = run_rehearsal(
            out or Path("results/runs/rehearsal"),
            model,
            samples=samples or 1,
            threshold=threshold,
            listener=Terminal(),
            part=part,
        )
        print_reproduction(found)
        return found.code
    part |= {"workers": workers, "gpus_per_worker": gpus_per_worker, "ray": ray}
    if samples is not None:
        part["samples"] = samples
    return full_scale(
        data,
        out or Path("results/runs/full-scale"),
        options.key_value(option),
        checked_judge(judge, judge_url),
        part,
        threshold,
        dry_run,
    )


def check_used(ctx: typer.Context, scale: str) -> None:
    """InputError for an option that was given and that the scale does not have."""
    for param in ctx.command.params:
        source = ctx.get_parameter_source(str(param.name))
        given = source is not None and source.name == "COMMANDLINE"
        if given and param.name not in OF_SCALE[scale]:
            having = [each for each, names in OF_SCALE.items() if param.name in names]
            raise InputError(
                f"{param.opts[0]} has no effect with {scale}, only with {' and '.join(having)}"
            )


def checked_judge(model: str | None, url: str | None) -> tuple[str, str] | None:
    """A judge's model and its address, if they are given; InputError if no judge has these."""
    from kvbench.judge import Judge

    if model is None and url is None:
        return None
    if model is None or url is None:
        raise InputError("a judge needs a model and its address: give --judge and --judge-url")
    Judge(model, url)
    return model, url


def full_scale(
    data: Path,
    out: Path,
    given: dict[str, str],
    judge: tuple[str, str] | None,
    part: dict[str, Any],
    threshold: float,
    dry_run: bool,
) -> int:
    """Run the full scale, or say what is missing for it and what it would cost; the exit code."""
    from kvbench.reproduce import full

    missing = full.missing_for_full_scale(data, given, judge is not None, part)
    if missing:
        say(f"the full scale ({full.FULL_SCALE}) cannot run here; missing:")
        for text in missing:
            say(text, name="  - ")
        say("its cost: kvbench plan --gpu h100", name="")
        say("its path on this machine: kvbench reproduce --scale full --rehearse", name="")
        say("'kvbench reproduce' without --scale measures the embedded model", name="")
        return 2
    if dry_run:
        print_plan(full.full_choices(out / "run", data, options=given, judge=judge, **part))
        return 0
    found = full.reproduce_full(
        out,
        data,
        threshold=threshold,
        listener=Terminal(),
        options=given,
        judge=judge,
        part=part,
    )
    print_reproduction(found)
    return found.code


def print_reproduction(found: "Reproduction") -> None:
    """Print tables and verdicts on stdout, and what was written on stderr."""
    from kvbench.reproduce.command import print_table

    if found.report is None:
        return
    for note in found.notes:
        show(note)
    print_table(found.table, found.claims, found.report.threshold, found.paper)
    for note in found.report.notes[len(found.notes) :]:
        say(note, name="note: ")
    say(f"wrote table.csv, table.md, claims.md, figures and report.html to {found.out}", name="")
