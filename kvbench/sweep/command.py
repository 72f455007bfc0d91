"""`kvbench run`: from the command line's choices to a finished sweep."""

import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.errors import InputError
from kvbench.models.card import ModelCard, model_folder, read_card
from kvbench.records import BASELINE, Record, RunWriter, check_common, read_records
from kvbench.registry import tasks as task_registry
from kvbench.spec import MethodSpec, check_option_names, method_names, parse_method
from kvbench.sweep.plan import (
    TEMPLATE_DATE,
    Cell,
    Settings,
    common_settings,
    digest,
    get_tasks,
    make_plan,
)
from kvbench.sweep.progress import duration, show_progress
from kvbench.task import Task

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.sweep.runner import Sweep

CONTEXT = 8192  # tokens, for a model whose card says nothing


@dataclass(frozen=True)
class Choices:
    """What the command line gave, checked for form alone."""

    model: str
    method: tuple[str, ...] | None
    task: tuple[str, ...] | None
    budgets: tuple[float, ...]
    samples: int
    context: int | None
    prefill_chunk: tuple[int, ...] | None
    seed: int
    out: Path | None
    device: str
    dtype: str
    attention: str
    option: dict[str, str]
    chat_template: str
    batch_rows: int | None
    memory_limit: int | None
    dry_run: bool
    template_date: str = TEMPLATE_DATE
    template_option: dict[str, str] = field(default_factory=dict)


def run_sweep(choices: Choices, home: Path) -> int:
    """Measure what is not measured yet; the exit code. InputError before anything is written.

    The run directory is `choices.out`, or one in `home` named by the model and the settings that
    all records of a run share, so that the same command continues the same run.
    """
    tasks = get_tasks(choices.task or default_tasks())
    folder = model_folder(choices.model)
    specs, left_out = choose_methods(choices, read_card(folder) if folder else ModelCard())

    from kvbench.engine.attention import resolve_attention
    from kvbench.engine.self_check import self_check
    from kvbench.models.load import load_model, resolve_device
    from kvbench.sweep.runner import warm_up

    attention = resolve_attention(choices.attention, resolve_device(choices.device))
    model = load_model(
        choices.model, device=choices.device, dtype=choices.dtype, attention=attention
    )
    checked = asdict(self_check(model))
    settings = choose_settings(choices, model)
    check_shapes(specs, model, settings)
    say_what_the_template_does(model, settings)
    if model.long_rope is not None:
        model.long_rope.choose(settings.context, fix=True)
    common = common_settings(model, settings)
    out = choices.out or home / run_name(model, common)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; name a folder")
    check_common(out, common)
    cells = make_plan(model, tasks, specs, settings)
    known = {r.fingerprint: r for r in read_records(out)} if out.is_dir() else {}
    if left_out:
        say(f"left out: {'; '.join(left_out)}")
    open_cells = [c for c in cells if c.fingerprint not in known or known[c.fingerprint].error]
    if choices.dry_run:
        sweep = make_sweep(choices, model, settings, tasks)
        print_plan(sweep, open_cells, len(cells), out)
        return 0
    if not open_cells:
        say(f"all {len(cells)} cells are measured already")
        return finish(out, [])
    warm_up(model)
    sweep = make_sweep(choices, model, settings, tasks)
    this = {**invocation(choices), "self_check": checked}
    return measure(sweep, common, this, open_cells, out, len(cells))


def make_sweep(
    choices: Choices, model: "LoadedModel", settings: Settings, tasks: Sequence[Task]
) -> "Sweep":
    """What the sweep needs beside its cells."""
    from kvbench.sweep.runner import Sweep, free_bytes

    return Sweep(
        model=model,
        tasks={task.name: task for task in tasks},
        seed=settings.seed,
        context=settings.context,
        prefill_chunk=settings.prefill_chunks[0],
        memory_limit=choices.memory_limit or free_bytes(model),
        batch_rows=choices.batch_rows,
    )


def measure(
    sweep: "Sweep",
    common: dict[str, Any],
    this: dict[str, Any],
    open_cells: Sequence[Cell],
    out: Path,
    planned: int,
) -> int:
    """Measure the open cells into the run directory `out`; `this` describes the process."""
    if len(open_cells) < planned:
        say(f"continuing {out}: {planned - len(open_cells)} of {planned} cells are there")
    with RunWriter(out, common, this) as writer:
        try:
            with show_progress(open_cells) as progress:
                failed = sweep.run(open_cells, writer, progress)
        except KeyboardInterrupt:
            say(f"interrupted; what is finished is in {out}, the same command continues it")
            return 130
    return finish(out, failed)


def finish(out: Path, failed: Sequence[Record]) -> int:
    """Show what the run directory holds, and name the cells that failed; the exit code."""
    from kvbench.report.tables import print_summary

    print_summary([record for record in read_records(out) if record.error is None])
    say(f"records are in {out}; pictures: kvbench report {out}")
    counts = Counter((r.method, r.budget, r.task, r.error) for r in failed)
    for (method, budget, task, error), count in counts.items():
        say(f"failed: {method} at budget {budget:g} on {task}, {count} samples: {error}")
    return 1 if failed else 0


def default_tasks() -> list[str]:
    """The tasks of a run that names none."""
    return [name for name in task_registry.names() if task_registry.get(name).default]


def choose_methods(choices: Choices, card: ModelCard) -> tuple[list[MethodSpec], list[str]]:
    """The baseline and the methods asked for; without any, all that have what they need.

    The second list names the methods that were left out.
    """
    names = choices.method or tuple(method_names())
    specs = [parse_method(BASELINE, {}, card.options)]
    left_out = []
    for name in names:
        spec = parse_method(name, choices.option, card.options)
        missing = spec.method.missing()
        if missing:
            if choices.method:
                raise InputError(
                    f"{name} needs {missing}; model '{choices.model}' does not come with it"
                )
            left_out.append(f"{name} needs {missing}")
        elif spec.name != BASELINE:
            specs.append(spec)
    check_option_names(choices.option, specs)
    return specs, left_out


def choose_settings(choices: Choices, model: "LoadedModel") -> Settings:
    """The settings of a sweep, from the command line, the model's card, or its limits."""
    context = choices.context or model.card.context or min(model.max_context, CONTEXT)
    if context > model.max_context:
        raise InputError(
            f"--context {context} is more than model '{model.name}' takes: at most "
            f"{model.max_context}"
        )
    default = model.card.prefill_chunk if not choices.context else 0
    has_template = getattr(model.tokenizer, "chat_template", None) is not None
    if choices.chat_template == "on" and not has_template:
        raise InputError(f"model '{model.name}' has no chat template; use --chat-template off")
    return Settings(
        context=context,
        seed=choices.seed,
        samples=choices.samples,
        prefill_chunks=choices.prefill_chunk or (default or max(1, context // 4),),
        budgets=choices.budgets,
        chat_template=has_template and choices.chat_template != "off",
        template_date=template_date(choices.template_date),
        template_options=template_options(choices.template_option),
    )


def template_date(text: str) -> str:
    """The day that `--template-date` names; InputError if it is none."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise InputError(
            f"--template-date {text} is not a day; write it like {TEMPLATE_DATE}"
        ) from None


def template_options(given: dict[str, str]) -> tuple[tuple[str, Any], ...]:
    """What `--template-option` gives: JSON values (false, 3, "x"), or text as it stands."""

    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return tuple(sorted((name, value(text)) for name, text in given.items()))


def say_what_the_template_does(model: "LoadedModel", settings: Settings) -> None:
    """A line for the user if the chat template opens a thinking block before the answer."""
    tag = settings.chat.opens_thinking(model.tokenizer) if settings.chat else None
    if tag:
        say(
            f"the chat template opens a {tag} block, so that answers start inside it; most "
            "templates close it with --template-option enable_thinking=false"
        )


def check_shapes(specs: Sequence[MethodSpec], model: "LoadedModel", settings: Settings) -> None:
    """InputError, before anything is measured, if a method does not fit the model's shape."""
    for spec in specs:
        spec.method.windows(model.shape, min(settings.budgets), settings.context)


def run_name(model: "LoadedModel", common: dict[str, Any]) -> str:
    """A name for the run directory that equal settings share."""
    return f"{Path(model.name).name}-{common['context']}-{digest(common)[:8]}"


def invocation(choices: Choices) -> dict[str, Any]:
    """This process, for `run.json`: settings, versions, hardware, commit."""
    import torch

    settings = {key: str(v) if isinstance(v, Path) else v for key, v in asdict(choices).items()}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit that the code is at, '+' if it was changed since; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def print_plan(sweep: "Sweep", open_cells: Sequence[Cell], planned: int, out: Path) -> None:
    """Show what a run would measure, in which groups, and about what it would take."""
    from rich.console import Console
    from rich.table import Table

    from kvbench.sweep.cost import cost_of, seconds_of
    from kvbench.sweep.runner import gib, rows_of

    console = Console()
    methods = Table("method", "budgets", "chunks", "tasks", "cells", box=None)
    by_method: dict[str, list[Cell]] = {}
    for cell in open_cells:
        by_method.setdefault(cell.spec.name, []).append(cell)
    for method, cells in by_method.items():
        methods.add_row(
            method,
            ", ".join(f"{b:g}" for b in sorted({c.budget for c in cells})),
            ", ".join(str(c) for c in sorted({c.prefill_chunk or 0 for c in cells}) if c) or "any",
            ", ".join(dict.fromkeys(c.sample.task for c in cells)),
            str(len(cells)),
        )
    console.print(methods)

    groups = Table("task", "chunk", "groups", "cells each", "tokens", "alone", "memory", box=None)
    by_kind: dict[tuple[str, int], list[list[Cell]]] = {}
    for batch in sweep.batches(open_cells):
        by_kind.setdefault((batch[0].sample.task, sweep.chunk(batch)), []).append(batch)
    costs = []
    for (task, chunk), batches in by_kind.items():
        here = [cost_of(sweep.model, rows_of(batch), chunk) for batch in batches]
        costs += here
        sizes = sorted({len(batch) for batch in batches})
        groups.add_row(
            task,
            str(chunk),
            str(len(batches)),
            f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}",
            str(sum(cost.tokens for cost in here)),
            str(sum(cell.tokens for batch in batches for cell in batch)),
            gib(max(cost.bytes for cost in here)),
        )
    console.print()
    console.print(groups)
    line = f"\n{len(open_cells)} of {planned} cells to measure in {out}: "
    if costs:
        tokens = sum(cost.tokens for cost in costs)
        seconds = duration(seconds_of(sweep.model, costs, sweep.prefill_chunk))
        line += f"{tokens} tokens at most, about {seconds}, "
        line += f"{gib(max(cost.bytes for cost in costs))} beside the model "
    console.print(line + f"(memory limit {gib(sweep.memory_limit)})", soft_wrap=True)


def say(text: str) -> None:
    """A line for the user, on stderr."""
    print(f"kvbench: {text}", file=sys.stderr, flush=True)
