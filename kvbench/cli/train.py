"""`kvbench train`: head scores by PruLong, DuoAttention or a gradient, and the embedded model."""

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options
from kvbench.cli.messages import say
from kvbench.cli.options import FOLDER, HOW_MUCH, LIST, OUTPUT, TRAINING, WHAT, opt
from kvbench.errors import InputError

TRAININGS = Path("results/training")
ABOUT = "Train head scores, or the embedded model."
EXAMPLES = options.examples(
    "kvbench train prulong --model tiny --target 0.5,0.7",
    "kvbench train prulong --model smollm2-135m --option focus=0.05",
    "kvbench train duoattention --steps 200 --option sinks=16",
    "accelerate launch -m kvbench train prulong --model FOLDER",
    "kvbench train tiny --out results/training/tiny --minutes 30",
)
DATA = (
    "Texts to train on: 'stdlib' (Python's standard library), 'tasks' (generated, for the model "
    "tiny), a folder of text or code, or datasets:NAME@CONFIG#SPLIT."
)
INTERRUPTED = "interrupted; the same command goes on from the last checkpoint"
SETTING = (
    "Another setting, like sinks=16; repeatable. For short trainings of prulong on text: "
    "focus=0.05 (the loss of the tokens that need far context) and constraint=exact."
)
TARGET = "Sparsity to reach. With several, each budget uses the nearest one. PruLong only."


def heads(
    ctx: typer.Context,
    model: options.Model = "tiny",
    data: Annotated[str | None, opt(WHAT, DATA, "the model's own, or stdlib")] = None,
    steps: Annotated[int | None, opt(HOW_MUCH, "Optimizer steps.", min=1)] = None,
    batch: Annotated[
        int | None, opt(HOW_MUCH, "Sequences in each step, over all processes.", min=1)
    ] = None,
    length: Annotated[int | None, opt(HOW_MUCH, "Tokens of each sequence.", min=8)] = None,
    rate: Annotated[float | None, opt(TRAINING, "Adam's learning rate.", min=1e-12)] = None,
    seed: options.Seed = 0,
    target: Annotated[str | None, opt(TRAINING, TARGET, metavar=LIST)] = None,
    option: Annotated[
        list[str] | None,
        opt(TRAINING, SETTING, metavar="KEY=VALUE"),
    ] = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    threads: options.Threads = None,
    out: Annotated[
        Path | None,
        opt(OUTPUT, "Folder to write to.", "results/training/NAME", metavar=FOLDER),
    ] = None,
) -> int:
    """Train head scores; the command's name is the method's."""
    from kvbench.learning.command import HeadChoices, train_heads

    method = str(ctx.info_name)
    if target is not None and method != "prulong":
        raise InputError(f"{method} has no --target; use 'kvbench train prulong'")
    targets = None if target is None else options.comma_list(target, "--target", options.sparsity)
    named = {"data": data, "steps": steps, "batch": batch, "length": length, "rate": rate}
    result = train_heads(
        HeadChoices(
            method=method,
            model=model,
            targets=targets,
            settings={
                **{name: value for name, value in named.items() if value is not None},
                "seed": seed,
                **options.key_value(option),
            },
            out=out or TRAININGS / f"{method}-{Path(model).name}-s{seed}",
            device=device,
            dtype=dtype,
        ),
        say,
    )
    if result.interrupted:
        say(INTERRUPTED)
        return 130
    if path := result.scores:
        use = path.stem.removeprefix("scores-")
        say(f"scores are in {path}: kvbench run --method {use} --option scores={path}")
    return 0


def tiny(
    out: Annotated[Path, opt(OUTPUT, "Folder to write to.", metavar=FOLDER, file_okay=False)],
    minutes: Annotated[float | None, opt(HOW_MUCH, "Minutes of training.", "60", min=0.001)] = None,
    steps: Annotated[
        int | None,
        opt(HOW_MUCH, "Steps instead: equal seeds then give equal models.", "by minutes", min=1),
    ] = None,
    seed: options.Seed = 0,
    threads: options.Threads = None,
    start: Annotated[
        Path | None,
        opt(TRAINING, "Folder of an earlier training to start from.", metavar=FOLDER, exists=True),
    ] = None,
) -> int:
    """Train the embedded model from scratch; a training that is there is continued."""
    from kvbench.learning.recipe import TinyRecipe
    from kvbench.learning.tiny import train_tiny

    if minutes is not None and steps is not None:
        raise InputError("--minutes and --steps both say how long to train; give one")
    try:
        train_tiny(TinyRecipe(minutes=minutes or 60.0, steps=steps, seed=seed), out, say, start)
    except KeyboardInterrupt:
        say(INTERRUPTED)
        return 130
    return 0
