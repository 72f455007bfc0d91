"""Which folder a sweep writes to when none is given.

An experiment is the settings that all records of a run share (model, context, seed, versions), the
tasks, the methods and their options. The same experiment continues the same run on any later day,
also with other samples, budgets or prefill chunks. Another experiment gets another folder.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import date
from itertools import count
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.run_folder import find_runs, is_run, read_settings

LONGEST_STEM = 200  # bytes; file systems take names of 255
MOST_NAMED_TASKS = 3  # in the name of a folder


def experiment(
    tasks: Sequence[str],
    methods: Sequence[str] | None,
    options: Mapping[str, Any],
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What a run folder says about its sweeps, beside their common settings.

    `sources` says where tasks that read find their samples, by the names of the tasks.
    """
    return {
        "tasks": sorted(tasks),
        **({"sources": dict(sources)} if sources else {}),
        "methods": "all" if methods is None else sorted(methods),
        "options": {
            name: [str(each) for each in value] if isinstance(value, tuple) else str(value)
            for name, value in options.items()
        },
    }


def find_folder(home: Path, common: Mapping[str, Any], wanted: Mapping[str, Any]) -> Path:
    """The newest run in `home` of the experiment `wanted`, else a new MODEL-TASKS-DATE.

    Only folders named so are continued; a folder that a user named is continued by `--out`.
    """
    tasks = wanted["tasks"]
    shown = "+".join(tasks) if len(tasks) <= MOST_NAMED_TASKS else f"{len(tasks)}-tasks"
    stem = re.sub(r"[^\w.+-]+", "-", f"{Path(common['model']).name}-{shown}")
    stem = f"{stem.encode()[:LONGEST_STEM].decode(errors='ignore')}-"
    for folder in reversed(find_runs(home)):
        if folder.name.startswith(stem) and _holds(folder, common, wanted):
            return folder
    name = f"{stem}{date.today().isoformat()}"
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(home / free for free in names if not is_run(home / free))


def _holds(folder: Path, common: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    try:
        settings = read_settings(folder)
    except InputError:  # a damaged run.json; another run must not suffer from it
        return False
    if settings is None or settings["common"] != common:
        return False
    return any(each.get("experiment") == wanted for each in settings["invocations"])
