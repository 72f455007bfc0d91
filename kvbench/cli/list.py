"""`kvbench list`: what methods, tasks and models there are."""

import json
from collections.abc import Sequence
from dataclasses import MISSING
from typing import Any

from kvbench.models.card import EMBEDDED, read_card
from kvbench.models.wheel import WHEELS
from kvbench.registry import methods, tasks
from kvbench.spec import method_names


def print_listing(kinds: Sequence[str], form: str) -> None:
    """Print a line for each thing of the `kinds`, as a table or as JSON."""
    listing = {kind: LISTS[kind]() for kind in kinds}
    if form == "json":
        print(json.dumps(listing, indent=2))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for kind, rows in listing.items():
        table = Table(*rows[0], title=kind, title_justify="left", box=None, title_style="bold")
        for row in rows:
            table.add_row(*(escape(text(value)) for value in row.values()))
        console.print(table)
        console.print()


def list_methods() -> list[dict[str, Any]]:
    """Registered methods with the variants that can be named, their options and defaults."""
    names = method_names()
    return [
        {
            "method": name,
            "variants": [n for n in names if n.rpartition("-")[0] == name],
            "family": str(methods.get(name).family),
            "options": {
                k: None if v in (None, MISSING) else str(v)
                for k, v in methods.get(name).options().items()
            },
            "about": first_line(methods.get(name)),
        }
        for name in methods.names()
    ]


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


def list_models() -> list[dict[str, Any]]:
    """Models known by name, with what their cards say and what it takes to have them."""
    embedded = "embedded; besides it, any folder or hub id of a decoder"
    known = [(name, folder, embedded) for name, folder in EMBEDDED.items()]
    for name, wheel in WHEELS.items():
        known.append((name, wheel.folder, " && ".join(wheel.missing()) or "installed"))
    return [
        {
            "model": name,
            "context": read_card(folder).context,
            "prefill chunk": read_card(folder).prefill_chunk,
            "about": about,
        }
        for name, folder, about in known
    ]


LISTS = {"methods": list_methods, "tasks": list_tasks, "models": list_models}


def first_line(cls: type) -> str:
    """The first line of a docstring."""
    return (cls.__doc__ or "").strip().split("\n")[0]


def text(value: Any) -> str:
    """A value as a table's cell."""
    if isinstance(value, dict):
        return ", ".join(f"{k}={'FILE' if v is None else v}" for k, v in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
