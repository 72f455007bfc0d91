"""`kvbench reproduce`: the paper's table and claims on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from kvbench.cli import options
from kvbench.cli.messages import Terminal, say
from kvbench.cli.options import FOLDER, OUTPUT, WHAT, opt
from kvbench.cli.report import write_report
from kvbench.cli.run import measure, print_plan

if TYPE_CHECKING:
    from kvbench.reproduce.command import Reproduction

EXAMPLES = options.examples(
    "kvbench reproduce",
    "kvbench reproduce --samples 100 --out results/reproduce-100",
    "kvbench reproduce --scale full --dry-run",
)


def reproduce(
    scale: Annotated[
        Literal["small", "full"],
        opt(WHAT, "small: the embedded model. full: the paper's model, context and data."),
    ] = "small",
    samples: options.Samples = 24,
    seed: options.Seed = 0,
    threshold: options.Threshold = 0.9,
    out: Annotated[
        Path, opt(OUTPUT, "Folder for records, tables, figures and the page.", metavar=FOLDER)
    ] = Path("results/reproduce"),
    dry_run: options.DryRun = False,
) -> int:
    """Compare the paper's table and claims with new measurements.

    The same command continues an interrupted reproduction. With --scale
    full, the numbers of samples and the seed are fixed.
    """
    from kvbench.reproduce import command

    if scale == "small":
        if dry_run:
            print_plan(command.small_choices(out / command.RUN, samples=samples, seed=seed))
            return 0
        found = command.reproduce_small(
            out, samples=samples, seed=seed, threshold=threshold, listener=Terminal()
        )
        print_reproduction(found)
        return found.code
    missing = command.missing_for_full_scale(command.full_scale_choices())
    if missing:
        lines = "".join(f"\n  - {text}" for text in missing)
        say(f"the full scale ({command.FULL_SCALE}) cannot run here; missing:{lines}")
        say("'kvbench reproduce' without --scale measures the embedded model", name="")
        return 2
    choices = command.full_choices(out / "full-scale")
    if dry_run:
        print_plan(choices)
        return 0
    code = measure(choices)
    if code == 130:
        return code
    return write_report([out / "full-scale"], threshold=threshold) or code


def print_reproduction(found: "Reproduction") -> None:
    """Print tables and verdicts on stdout, and what was written on stderr."""
    from kvbench.reproduce.command import print_table

    if found.report is None:
        return
    print_table(found.table, found.claims, found.report.threshold)
    for note in found.report.notes:
        say(note, name="note: ")
    say(f"wrote table.csv, table.md, claims.md, figures and report.html to {found.out}", name="")
