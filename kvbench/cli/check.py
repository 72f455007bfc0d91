"""`kvbench check`: a method or a task against its contract, before it is measured."""

from typing import Annotated

import typer

from kvbench import escape
from kvbench.cli import complete, options
from kvbench.cli.messages import say
from kvbench.cli.options import WHAT, comma_list, opt
from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED, read_card
from kvbench.registry import hint, methods, source_of, tasks
from kvbench.spec import MethodSpec, check_option_names, method_names, parse_method

EXAMPLES = options.examples(
    "kvbench check snapkv-patched",
    "kvbench check recall",
    "kvbench check my.jsonl --metric exact_match --max-new-tokens 32",
    "kvbench check prulong+snapkv --option snapkv.window=32",
)
MODEL = "tiny"  # lends its tokenizer and its head scores
SHOWN = 3  # faults of a check


def check(
    names: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Methods, tasks or task files, separated by commas.",
            autocompletion=complete.checkable,
        ),
    ],
    option: Annotated[
        list[str] | None,
        opt(WHAT, options.METHOD_OPTION, metavar="KEY=VALUE"),
    ] = None,
    metric: options.Metric = None,
    max_new_tokens: options.MaxNewTokens = None,
) -> int:
    """Check that a method or a task follows the rules; takes seconds.

    A method runs on small random models of several shapes, precisions
    and prefill chunks. A task makes samples of several lengths, and
    scores odd answers. Of a task file, all lines are checked.
    """
    given = options.key_value(option)
    chosen = comma_list(names, "names", str)
    known = [*method_names(), *tasks.names()]
    named = [name for name in chosen if source_of(name) is None]
    for name in named:
        split = name.partition("+")[0]
        if name not in known and not ("+" in name and split in methods.names()):
            raise InputError(f"no method or task '{name}': {hint(name, known)}")
    card = read_card(EMBEDDED[MODEL])
    specs = {
        name: parse_method(name, given, card.options) for name in named if name not in tasks.names()
    }
    check_option_names(given, list(specs.values()))
    failed = [n for n in chosen if not _holds(n, specs.get(n), metric, max_new_tokens)]
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def _holds(
    name: str, spec: MethodSpec | None, metric: str | None, max_new_tokens: int | None
) -> bool:
    """Make the checks of a method or a task and print a line for each; whether all hold."""
    from rich.text import Text

    from kvbench.sweep.check import check_method, check_task

    if spec is not None:
        findings = check_method(spec)
    else:
        from kvbench.models.load import load_model

        tokenizer = load_model(MODEL, device="cpu").tokenizer
        findings = check_task(name, tokenizer, metric, max_new_tokens)
    console = escape.console(soft_wrap=True)
    console.print(name, style="bold")
    for finding in findings:
        if finding.faults:
            verdict, style, text = "FAIL", "bold red", "; ".join(finding.faults[:SHOWN])
            if len(finding.faults) > SHOWN:
                text += f"; and {len(finding.faults) - SHOWN} more"
        elif finding.skipped:
            verdict, style, text = "skip", "yellow", finding.skipped
        else:
            verdict, style, text = "ok", "green", finding.meaning
        text = escape.plain(text)
        console.print(Text.assemble("  ", (f"{verdict:<6}", style), f"{finding.check:<12}", text))
    return not any(finding.faults for finding in findings)
