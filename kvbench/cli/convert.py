"""`kvbench convert`: task files from the public data of HELMET and LongProc."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import options
from kvbench.cli.messages import say
from kvbench.cli.options import FOLDER, HOW_MUCH, LIST, OUTPUT, WHAT, opt
from kvbench.errors import InputError

ABOUT = "Make task files of published data with the project's own loader."
EXAMPLES = options.examples(
    "kvbench convert longproc LongProc --task html_to_tsv --length 0.5k",
    "kvbench convert helmet HELMET --task recall,rag --python HELMET/env/bin/python",
    "kvbench run --task results/data/html_to_tsv",
)
LENGTH = "HELMET: tokens of the inputs, 8192 to 131072. LongProc: of the answers, 0.5k, 2k or 8k."
STOP = "Answers stop at a newline where HELMET's configuration asks for it; its runs do not."
ONE_ROW = "One row of each question, its depths taking turns; HELMET runs all rows."

COMMANDS = {
    "helmet": "Task files of HELMET (arXiv 2410.02694): recall, rag, rerank, icl, longqa.",
    "longproc": "Task files of LongProc (arXiv 2501.05414): html_to_tsv, travel_planning.",
}


def convert(
    ctx: typer.Context,
    checkout: Annotated[
        Path,
        typer.Argument(metavar="CHECKOUT", help="Folder of the project's repository."),
    ],
    task: Annotated[
        str | None,
        opt(WHAT, "Tasks of the paper, or data sets of the project.", "all", metavar=LIST),
    ] = None,
    data: Annotated[
        Path | None, opt(WHAT, "Folder of the data.", "CHECKOUT/data", metavar=FOLDER)
    ] = None,
    python: Annotated[
        str, opt(WHAT, "A Python with the packages of the loader.", "this one", metavar="PATH")
    ] = sys.executable,
    length: Annotated[str | None, opt(HOW_MUCH, LENGTH, "131072, or all")] = None,
    samples: Annotated[
        int | None, opt(HOW_MUCH, "Questions of each data set.", "as published", min=1)
    ] = None,
    seed: Annotated[int, opt(HOW_MUCH, "Seed for drawing the questions.", min=0)] = 42,
    stop_at_newline: Annotated[
        bool, opt(HOW_MUCH, STOP, names=["--stop-at-newline"], metavar="")
    ] = False,
    one_row_per_question: Annotated[
        bool, opt(HOW_MUCH, ONE_ROW, names=["--one-row-per-question"], metavar="")
    ] = False,
    out: Annotated[
        Path, opt(OUTPUT, "Folder to write a folder for each task to.", metavar=FOLDER)
    ] = Path("results/data"),
) -> int:
    """Make task files; the command's name is the benchmark's."""
    from kvbench.convert.command import Request
    from kvbench.convert.command import convert as write

    benchmark = str(ctx.info_name)
    if benchmark != "helmet" and (stop_at_newline or one_row_per_question):
        raise InputError(
            f"{benchmark} has no --stop-at-newline and no --one-row-per-question; only helmet has"
        )
    request = Request(
        benchmark=benchmark,
        checkout=checkout,
        tasks=None if task is None else options.comma_list(task, "--task", str),
        data=data,
        python=python,
        length=length,
        samples=samples,
        seed=seed,
        stop_at_newline=stop_at_newline,
        one_row_per_question=one_row_per_question,
        out=out,
    )
    write(request, lambda text: say(text, name=""))
    return 0
