"""The command line of training: `kvbench train prulong|duoattention|tiny`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kvbench.cli.options import CommaList, Commands, key_value, share

TRAININGS = Path("results/training")


@click.group(cls=Commands)
def train() -> None:
    """Learn head scores, or the embedded model."""


def of_heads(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that PruLong and DuoAttention share."""
    options = [
        click.option("--model", default="tiny", show_default=True,
                     help="'tiny' (embedded), a folder, or a name on the hub."),
        click.option("--data", help="'stdlib' (the Python standard library's sources), 'tasks' "
                     "(the embedded model's language), a folder of text or code, or "
                     "datasets:NAME[@CONFIG][#SPLIT] [default: the model's own, or stdlib]."),
        click.option("--steps", type=click.IntRange(min=1)),
        click.option("--batch", type=click.IntRange(min=1), help="Rows a step, in all."),
        click.option("--length", type=click.IntRange(min=8), help="Tokens a row."),
        click.option("--rate", type=click.FloatRange(min=0, min_open=True),
                     help="Adam's learning rate."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True),
        click.option("--out", type=click.Path(path_type=Path, file_okay=False),
                     help="Folder to write to [default: results/training/NAME]."),
        click.option("--device", default="auto", show_default=True,
                     help="auto, cpu, cuda, cuda:1, ..."),
        click.option("--dtype", default="auto", show_default=True,
                     help="auto, float32, bfloat16, ..."),
        click.option("--option", multiple=True, callback=key_value, metavar="KEY=VALUE",
                     help="Any other setting: sinks, window, warm_up, gradient_checkpointing, ...; "
                     "repeatable."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@train.command()
@of_heads
@click.option("--target", type=CommaList("sparsities", share),
              help="Sparsity to reach; several are learnt one after another, each used at the "
              "budgets nearest to it.")  # fmt: skip
def prulong(target: Sequence[float] | None, **choices: Any) -> int:
    """Learn masks by next-token loss under a sparsity target (2506.17121)."""
    return heads("prulong", target, choices)


@train.command()
@of_heads
def duoattention(**choices: Any) -> int:
    """Learn gates by distillation on passkeys (2410.10819)."""
    return heads("duoattention", None, choices)


def heads(method: str, targets: Sequence[float] | None, choices: dict[str, Any]) -> int:
    """Train with the choices of the command line; the exit code."""
    from kvbench.learning.command import HeadChoices, train_heads

    named = {name: choices[name] for name in ("data", "steps", "batch", "length", "rate", "seed")}
    settings = {name: value for name, value in named.items() if value is not None}
    name = f"{method}-{Path(choices['model']).name}-s{choices['seed']}"
    result = train_heads(
        HeadChoices(
            method=method,
            model=choices["model"],
            targets=tuple(targets) if targets else None,
            settings={**settings, **choices["option"]},
            out=choices["out"] or TRAININGS / name,
            device=choices["device"],
            dtype=choices["dtype"],
        ),
        say,
    )
    if result.interrupted:
        say("interrupted; the same command goes on from the last checkpoint")
        return 130
    if path := result.scores:
        say(f"scores are in {path}: kvbench run --method {method} --option scores={path}")
    return 0


def say(text: str) -> None:
    """Print a line of progress on stderr."""
    print(f"kvbench: {text}", file=sys.stderr, flush=True)


@train.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder to write to.")  # fmt: skip
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=60.0,
              show_default=True, help="How long to train.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--start", type=click.Path(path_type=Path, exists=True, file_okay=False),
              help="Folder of an earlier training to go on from.")  # fmt: skip
def tiny(out: Path, minutes: float, seed: int, start: Path | None) -> int:
    """Learn the embedded model anew."""
    from kvbench.learning.recipe import TinyRecipe
    from kvbench.learning.tiny import train_tiny

    train_tiny(TinyRecipe(minutes=minutes, seed=seed), out, say, start)
    return 0
