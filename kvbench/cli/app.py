"""The command line: options, their checks, and exit codes (DESIGN, commands).

0 done, 1 some cells failed, 2 bad input, 130 interrupted. Whatever goes wrong is one line on
stderr; KVBENCH_DEBUG=1 shows the traceback.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import kvbench
from kvbench.cli.options import Amount, CommaList, Commands, budget, key_value, memory, tokens
from kvbench.cli.train import train
from kvbench.errors import InputError, did_you_mean

RUNS = Path("results/runs")
REPRODUCE = Path("results/reproduce")
DEFAULT_BUDGETS = "0.1,0.2,0.3,0.5,0.7,0.9"
KINDS = ("methods", "tasks", "models")
# what a missing package is installed with
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "pytrec_eval"), "run"),
    "accelerate": "train",
}


def read_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    """Make a YAML file's values the defaults of the options that are called so."""
    if value is None:
        return
    import yaml

    try:
        config = yaml.safe_load(value.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the configuration {value}: {error}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the configuration {value} is not YAML: {reason}") from error
    if not isinstance(config, dict):
        raise InputError(f"the configuration {value} is not a list of 'option: value' lines")
    known = {p.name.replace("_", "-"): p for p in ctx.command.params if p.name and p is not param}
    defaults = {}
    for key, setting in config.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise InputError(f"{value}: unknown key '{key}': {did_you_mean(name, known)}")
        defaults[name.replace("-", "_")] = _config_value(value, name, setting)
    ctx.default_map = defaults


def _config_value(file: Path, name: str, value: Any) -> Any:
    if name == "option":
        if not isinstance(value, dict):
            raise InputError(f"{file}: option is to be a mapping, like 'option: {{window: 32}}'")
        return [f"{key}={item}" for key, item in value.items()]
    if isinstance(value, list) and value and not any(isinstance(v, list | dict) for v in value):
        return ",".join(str(item) for item in value)
    if isinstance(value, list | dict) or value is None:
        raise InputError(f"{file}: {name} has no usable value")
    return value


@click.group(cls=Commands, invoke_without_command=True)
@click.version_option(kvbench.__version__, prog_name="kvbench")
@click.pass_context
def cli(ctx: click.Context) -> int:
    """Compare KV-cache eviction methods by KV footprint."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
    return 0


@cli.command()
@click.option("--model", default="tiny", show_default=True,
              help="'tiny' (embedded), a folder, or a name on the hub.")  # fmt: skip
@click.option("--method", type=CommaList("methods"),
              help="Methods, comma-separated [default: all that have what they need].")  # fmt: skip
@click.option("--task", type=CommaList("tasks"),
              help="Tasks, comma-separated [default: those that 'list' calls so].")  # fmt: skip
@click.option("--budgets", type=CommaList("budgets", budget), default=DEFAULT_BUDGETS,
              show_default=True, help="Shares of the cache, in (0, 1].")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True,
              help="Samples a task.")  # fmt: skip
@click.option("--context", type=click.IntRange(min=1),
              help="Tokens a sample, prompt and answer [default: the model's own].")  # fmt: skip
@click.option("--prefill-chunk", type=CommaList("chunk sizes", tokens),
              help="Tokens a prefill chunk [default: the model's own, or context / 4]; "
              "several sizes are compared.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of the samples.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=True),
              help="Run directory [default: results/runs/NAME].")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16, ...")
@click.option("--attention", default="auto", show_default=True, help="auto, sdpa or flash.")
@click.option("--option", "option", multiple=True, callback=key_value, metavar="KEY=VALUE",
              help="A method's option: window=32, or snapkv.window=32 for one method; "
              "repeatable.")  # fmt: skip
@click.option("--chat-template", type=click.Choice(["auto", "on", "off"]), default="auto",
              show_default=True, help="Put prompts into the model's chat template.")  # fmt: skip
@click.option("--batch-rows", type=click.IntRange(min=1),
              help="Rows measured together [default: as many as memory allows].")  # fmt: skip
@click.option("--memory-limit", type=Amount("memory", memory), metavar="SIZE",
              help="Memory that may be taken beside the model, like 8GiB "
              "[default: most of what is free].")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost, measure nothing.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), is_eager=True,
              expose_value=False, callback=read_config,
              help="YAML file with these options; the command line wins.")  # fmt: skip
def run(**choices: Any) -> int:
    """Measure methods on tasks, at several budgets; continues where it was stopped.

    Full attention always runs too, as the baseline.
    """
    from kvbench.sweep.command import Choices, run_sweep

    choices["out"] = choices["out"] or None
    return run_sweep(Choices(**choices), RUNS)


@cli.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True), default=0.9,
              show_default=True, help="Share of the baseline's score to keep.")  # fmt: skip
@click.option("--format", "form",
              type=click.Choice(["table", "json", "csv", "markdown", "latex"]),
              default="table", show_default=True, help="What goes to stdout.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path),
              help="Folder for what is written [default: the run's own].")  # fmt: skip
def report(runs: tuple[str, ...], threshold: float, form: str, out: Path | None) -> int:
    """Critical footprints, pictures and a page of RUNs [default: the latest]."""
    from kvbench.records import find_run_folders
    from kvbench.report.build import make_report
    from kvbench.report.tables import print_report

    folders = find_run_folders(runs, RUNS)
    found = make_report(folders, threshold)
    folder = out or (folders[0] if len(folders) == 1 else RUNS.parent / "report")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; name a folder")
    from kvbench.report.publish import publish

    published = publish(found, folder)
    print_report(found, form)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(published.message, err=True)
    return 0


@cli.command("list")
@click.argument("kinds", required=False, type=CommaList("kinds"), metavar="[methods,tasks,models]")
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table",
              show_default=True, help="What goes to stdout.")  # fmt: skip
def list_command(kinds: tuple[str, ...] | None, form: str) -> int:
    """What there is: methods and their options, tasks, models."""
    from kvbench.cli.listing import print_listing

    for kind in kinds or ():
        if kind not in KINDS:
            raise InputError(f"nothing called '{kind}' to list: {did_you_mean(kind, KINDS)}")
    print_listing(kinds or KINDS, form)
    return 0


@cli.command()
@click.option("--scale", type=click.Choice(["small", "full"]), default="small", show_default=True,
              help="The embedded model, or the paper's with its context and data.")  # fmt: skip
@click.option("--samples", type=click.IntRange(min=1), default=24, show_default=True,
              help="Samples a task, at small scale.")  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of the samples.")  # fmt: skip
@click.option("--threshold", type=click.FloatRange(0, 1, min_open=True), default=0.9,
              show_default=True, help="Share of the baseline's score to keep.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=REPRODUCE, show_default=True,
              help="Folder for records, tables, pictures and the page.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost, measure nothing.")
def reproduce(
    scale: str, samples: int, seed: int, threshold: float, out: Path, dry_run: bool
) -> int:
    """The paper's table and claims beside the paper's own numbers; continues where it stopped."""
    from kvbench.reproduce import command as reproduction

    if scale == "small":
        found = reproduction.reproduce_small(
            out, samples=samples, seed=seed, threshold=threshold, dry_run=dry_run
        )
        reproduction.print_reproduction(found)
        return found.code
    missing = reproduction.missing_for_full_scale(reproduction.full_scale_choices())
    if missing:
        lines = "".join(f"\n  - {text}" for text in missing)
        click.echo(
            f"kvbench: the full scale ({reproduction.FULL_SCALE}) cannot run here, for want of"
            f"{lines}\n'kvbench reproduce' without --scale measures the embedded model",
            err=True,
        )
        return 2
    sweep = ["run", "--config", str(reproduction.FULL_SCALE), "--out", str(out / "full-scale")]
    dry = ["--dry-run"] if dry_run else []
    code = int(cli.main(args=[*sweep, *dry], prog_name="kvbench", standalone_mode=False) or 0)
    if code == 130 or dry_run:
        return code
    return int(
        cli.main(args=["report", sweep[-1]], prog_name="kvbench", standalone_mode=False) or code
    )


cli.add_command(train)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    debug = os.environ.get("KVBENCH_DEBUG", "") not in ("", "0")
    try:
        args = None if argv is None else list(argv)
        return int(cli.main(args=args, prog_name="kvbench", standalone_mode=False) or 0)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, click.ClickException) as error:
        if debug:
            raise
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        return _fail(text, 2)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            extra = EXTRAS[error.name]
            return _fail(f"this needs {error.name}: pip install 'kvbench[{extra}]'", 2)
        return _fail(
            f"{type(error).__name__}: {error} (KVBENCH_DEBUG=1 shows where this happened)", 1
        )


def _fail(message: str, code: int) -> int:
    click.echo(f"kvbench: {' '.join(message.split())}", err=True)
    return code
