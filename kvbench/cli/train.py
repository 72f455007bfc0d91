"""`kvbench train`: head scores by PruLong or DuoAttention, and the embedded model."""

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options
from kvbench.cli.options import HOW_MUCH, OUTPUT, TRAINING, WHAT

TRAININGS = Path("results/training")
EXAMPLES = {
    "train": options.examples(
        "kvbench train prulong --model tiny --target 0.5,0.7",
        "kvbench train duoattention --model tiny",
        "kvbench run --method prulong --option scores=FILE",
    ),
    "prulong": options.examples(
        "kvbench train prulong --target 0.5,0.7",
        "accelerate launch -m kvbench train prulong --model FOLDER --data stdlib",
    ),
    "duoattention": options.examples(
        "kvbench train duoattention --steps 200 --option sinks=16",
    ),
    "tiny": options.examples("kvbench train tiny --out results/training/tiny --minutes 30"),
}

Data = Annotated[
    str | None,
    typer.Option(
        show_default="the model's own, or stdlib",
        help="'stdlib' (the sources of Python's standard library), 'tasks' (the embedded model's "
        "language), a folder of text or code, or datasets:NAME@CONFIG#SPLIT.",
        rich_help_panel=WHAT,
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, rich_help_panel=HOW_MUCH)]
Batch = Annotated[
    int | None,
    typer.Option(min=1, help="Rows of a step, over all processes.", rich_help_panel=HOW_MUCH),
]
Length = Annotated[
    int | None, typer.Option(min=8, help="Tokens of a row.", rich_help_panel=HOW_MUCH)
]
Rate = Annotated[
    float | None,
    typer.Option(
        parser=options.positive,
        metavar="RATE",
        help="Adam's learning rate.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the data.", rich_help_panel=HOW_MUCH)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Any other setting: sinks, window, warm_up, gradient_checkpointing, ...; repeatable.",
        rich_help_panel=TRAINING,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        file_okay=False,
        show_default="results/training/METHOD-MODEL-SEED",
        help="Folder to write to; a training that is there is continued.",
        rich_help_panel=OUTPUT,
    ),
]


def train(ctx: typer.Context) -> int:
    """Learn head scores, or the embedded model."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)
    return 0


def prulong(
    model: options.Model = "tiny",
    data: Data = None,
    steps: Steps = None,
    batch: Batch = None,
    length: Length = None,
    rate: Rate = None,
    seed: Seed = 0,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="Sparsity to reach; several are learnt one after another, and each is used at the "
            "budgets nearest to it.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    option: Settings = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    out: Out = None,
) -> int:
    """Learn masks by next-token loss under a sparsity target (arXiv 2506.17121)."""
    targets = None if target is None else options.comma_list(target, "sparsities", options.sparsity)
    settings = {"data": data, "steps": steps, "batch": batch, "length": length, "rate": rate}
    return heads("prulong", model, targets, settings, seed, option, out, device, dtype)


def duoattention(
    model: options.Model = "tiny",
    data: Data = None,
    steps: Steps = None,
    batch: Batch = None,
    length: Length = None,
    rate: Rate = None,
    seed: Seed = 0,
    option: Settings = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    out: Out = None,
) -> int:
    """Learn gates by distillation on passkeys (arXiv 2410.10819)."""
    settings = {"data": data, "steps": steps, "batch": batch, "length": length, "rate": rate}
    return heads("duoattention", model, None, settings, seed, option, out, device, dtype)


def heads(
    method: str,
    model: str,
    targets: tuple[float, ...] | None,
    settings: dict[str, str | float | None],
    seed: int,
    option: list[str] | None,
    out: Path | None,
    device: str,
    dtype: str,
) -> int:
    """Train head scores with the choices of the command line; the exit code."""
    from kvbench.learning.command import HeadChoices, train_heads

    given: dict[str, str | float] = {k: v for k, v in settings.items() if v is not None}
    return train_heads(
        HeadChoices(
            method=method,
            model=model,
            targets=targets,
            settings=given | {"seed": seed} | options.key_value(option),
            out=out or TRAININGS / f"{method}-{Path(model).name}-s{seed}",
            device=device,
            dtype=dtype,
        )
    )


def tiny(
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", file_okay=False, help="Folder to write to.", rich_help_panel=OUTPUT
        ),
    ],
    minutes: Annotated[
        float,
        typer.Option(
            parser=options.positive,
            metavar="MINUTES",
            help="How long to train.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = 60.0,
    seed: Seed = 0,
    start: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="Folder of an earlier training to go on from.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
) -> int:
    """Train the embedded model from scratch."""
    from kvbench.learning.tiny import train as train_tiny

    train_tiny(out, minutes=minutes, seed=seed, start=start)
    return 0
