"""The command line: its commands, and what becomes of errors.

Exit codes: 0 done, 1 some cells failed, 2 bad input, 130 interrupted. Every error is one line on
stderr; KVBENCH_DEBUG=1 shows the traceback.
"""

import errno
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import kvbench
from kvbench.cli import check, convert, merge, plan, report, reproduce, run, slurm, train
from kvbench.cli import list as listing
from kvbench.cli.messages import say
from kvbench.cli.options import Command
from kvbench.errors import InputError, debugging, did_you_mean
from kvbench.registry import PluginWarning

# The extra of kvbench that installs a missing package.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "tokenizers", "safetensors", "pytrec_eval"), "run"),
    "accelerate": "train",
}


class Commands(TyperGroup):
    """A group of commands: names the nearest one on a typo, and ends quietly on Ctrl-C."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command `cmd_name`; InputError if there is none."""
        if cmd_name not in self.commands and not ctx.resilient_parsing:
            raise InputError(f"no command '{cmd_name}': {did_you_mean(cmd_name, self.commands)}")
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an interrupt becomes one line and code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            return 130


def new_group(**settings: Any) -> typer.Typer:
    """A typer application with kvbench's errors and help."""
    return typer.Typer(
        cls=Commands,
        invoke_without_command=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        **settings,
    )


def show_version(value: bool) -> None:
    """Print the version and end."""
    if value:
        typer.echo(f"kvbench, version {kvbench.__version__}")
        raise typer.Exit


def show_help(ctx: typer.Context) -> int:
    """Show a group's help if no command of it is given."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help(), nl=False)
    return 0


def cli(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> int:
    """Compare KV-cache eviction methods by KV footprint."""
    return show_help(ctx)


app = new_group(callback=cli, epilog=run.EXAMPLES)
app.command("run", cls=Command, epilog=run.EXAMPLES)(run.run)
app.command("report", cls=Command, epilog=report.EXAMPLES)(report.report)
app.command("list", cls=Command, epilog=listing.EXAMPLES)(listing.list_command)
app.command("check", cls=Command, epilog=check.EXAMPLES)(check.check)
app.command("plan", cls=Command, epilog=plan.EXAMPLES)(plan.plan)
app.command("merge", cls=Command, epilog=merge.EXAMPLES)(merge.merge)
app.command("slurm", cls=Command, epilog=slurm.EXAMPLES)(slurm.slurm)
app.command("reproduce", cls=Command, epilog=reproduce.EXAMPLES)(reproduce.reproduce)
training = new_group(callback=show_help, help=train.ABOUT, epilog=train.EXAMPLES)
prulong = "Train masks with a next-token loss and a target sparsity (arXiv 2506.17121)."
duoattention = "Train gates by distillation on passkeys (arXiv 2410.10819)."
saliency = "Rank heads by the gradient of their gates: a control that needs minutes."
training.command("prulong", help=prulong, cls=Command, epilog=train.EXAMPLES)(train.heads)
training.command("duoattention", help=duoattention, cls=Command, epilog=train.EXAMPLES)(train.heads)
training.command("saliency", help=saliency, cls=Command, epilog=train.EXAMPLES)(train.heads)
training.command("tiny", cls=Command, epilog=train.EXAMPLES)(train.tiny)
app.add_typer(training, name="train")
converting = new_group(callback=show_help, help=convert.ABOUT, epilog=convert.EXAMPLES)
for name, text in convert.COMMANDS.items():
    converting.command(name, help=text, cls=Command, epilog=convert.EXAMPLES)(convert.convert)
app.add_typer(converting, name="convert")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: this process's) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what an encoding lacks is shown as an escape
            stream.reconfigure(errors="backslashreplace")
    try:
        args = None if argv is None else list(argv)
        with plugins_named():
            return int(app(args=args, prog_name="kvbench", standalone_mode=False) or 0)
    except Exception as error:
        if debugging():
            raise
        text, code = describe(error)
        say(" ".join(text.split()))
        return code


@contextmanager
def plugins_named() -> Iterator[None]:
    """Say what is wrong with a plug-in in one line, as everything else; other warnings as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say_or_show(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if issubclass(category, PluginWarning):
                say(str(message))
            else:
                show(message, category, *where, **more)

        warnings.filterwarnings("always", category=PluginWarning)
        warnings.showwarning = say_or_show
        yield


def describe(error: Exception) -> tuple[str, int]:
    """The line and the exit code of an error."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, typer.TyperException):
        return error.format_message().replace("Value error, ", ""), 2  # pydantic's prefix
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs {error.name}: pip install 'kvbench[{EXTRAS[error.name]}]'", 2
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"the name {error.filename} is too long for this file system; choose another", 2
    where = "(KVBENCH_DEBUG=1 shows where this happened)"
    return f"{type(error).__name__}: {error} {where}", 1
