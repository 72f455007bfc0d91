"""`kvbench merge`: one run folder of several."""

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options
from kvbench.cli.messages import say
from kvbench.cli.options import FOLDER, OUTPUT, opt

EXAMPLES = options.examples("kvbench merge shard-1 shard-2 shard-3 --out results/runs/all")


def merge(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER...", help="Run folders, or folders of run folders."),
    ],
    out: Annotated[Path, opt(OUTPUT, "Run folder to write to.", metavar=FOLDER)],
) -> int:
    """Put run folders of the same settings together into one.

    The folders stay as they are. The same command again adds what they
    have gained since.
    """
    from kvbench.sweep.command import RUNS
    from kvbench.sweep.merge import merge as merged

    cells, failed = merged(folders, out, RUNS, lambda text: say(text, name="note: "))
    say(f"{out} holds {cells} cells" + (f", {failed} of them failed" if failed else ""))
    return 0
