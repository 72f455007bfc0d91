"""From the choices of a user to a finished sweep: `run_sweep`, and `plan_sweep` for its cost.

`kvbench run`, `kvbench reproduce` and `kvbench.run` call these. Nothing is printed here: what a
user should hear while it runs goes to a `Listener`.
"""

import json
import math
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.arguments import LARGEST, MOST_SAMPLES, check_share, check_text, check_whole
from kvbench.errors import InputError, did_you_mean
from kvbench.files import check_folder
from kvbench.judge import Judge, use_judge
from kvbench.machine import limit_threads
from kvbench.models.card import ModelCard, model_folder, read_card
from kvbench.records import BASELINE, COMPRESS, Damage, Record, read_records, told
from kvbench.registry import tasks as task_registry
from kvbench.run_folder import (
    END,
    AddedRecords,
    RunWriter,
    check_common,
    check_sources,
    current_codes,
    is_run,
    newer_codes,
    read_settings,
)
from kvbench.spec import (
    MethodSpec,
    check_option_names,
    method_names,
    of_method,
    parse_method,
    parse_methods,
)
from kvbench.sweep.chat import TEMPLATE_DATE
from kvbench.sweep.folder import experiment, find_folder
from kvbench.sweep.length import TOO_LONG
from kvbench.sweep.plan import Cell, Settings, Unit, common_settings, get_tasks, make_plan
from kvbench.sweep.progress import Listener, Progress
from kvbench.sweep.units import note_on_workers, shard, units_of
from kvbench.task import Task

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.sweep.cost import Cost
    from kvbench.sweep.runner import Sweep

RUNS = Path("results/runs")
CHAT_TEMPLATES = ("auto", "on", "off")
CONTEXT = 8192  # tokens, for a model whose card says nothing
ALL = "all"  # names every method
COMPARED = (  # without --method: what arXiv 2506.17121 compares, controls, and dynamic sparsity
    *("duoattention", "prulong", "random-heads", "recency", "quest"),
    *("snapkv", "snapkv-naive", "snapkv-patched"),
    *("pyramidkv", "pyramidkv-naive", "pyramidkv-patched"),
    *("knorm", "knorm-naive", "random", "random-naive"),
)
MOST_NAMED = 5  # samples in a note
MOST_WORKERS = 1024
MOST_GPUS = 64  # of a worker
MOST_SHARDS = 100_000
TRIAL_SHARE = 0.01  # of a sweep's tokens, at most, are spent on predicting its time


@dataclass(frozen=True)
class Choices:
    """What a sweep measures; None where the model, the machine or the plug-ins decide."""

    model: str = "tiny"
    method: tuple[str, ...] | None = None  # None: COMPARED, where they have what they need
    # Names, paths or tasks (see `open_task`); None: those that are measured by default.
    task: tuple[str | Task, ...] | None = None
    budgets: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
    samples: int = 32  # of each task
    context: int | None = None  # tokens of a prompt and its answer
    prefill_chunk: tuple[int, ...] | None = None  # tokens
    seed: int | tuple[int, ...] = 0  # of the samples; several are swept
    out: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    # Of methods, by name or METHOD.name; the values of a tuple are swept.
    option: dict[str, Any] = field(default_factory=dict)
    chat_template: str = "auto"  # auto, on or off
    template_date: str = TEMPLATE_DATE  # what a chat template takes for today, ISO 8601
    template_option: dict[str, Any] = field(default_factory=dict)  # more for the chat template
    compress: str = "prompt"  # "context": methods evict before the question is read
    metric: str | None = None  # of samples that are read and name none
    max_new_tokens: int | None = None  # the same, tokens of an answer
    too_long: str = "error"  # what becomes of samples that are read: error, cut or skip
    judge: str | None = None  # a model that scores what only a judge can (`kvbench.judge`)
    judge_url: str | None = None  # its OpenAI-compatible address
    batch_rows: int | None = None  # cells measured together, at most
    memory_limit: int | None = None  # bytes beside the model
    shard: tuple[int, int] | None = None  # I of N, from 1: the part of the cells that is measured
    workers: int = 1  # processes that share the sweep
    gpus_per_worker: int = 1  # over which a worker splits the model
    ray: str | None = None  # the address of a Ray cluster that measures it; "local" starts one

    def __post_init__(self) -> None:
        """Raise InputError for a value that no sweep can have."""
        for name in ("model", "device", "dtype", "attention", "chat_template", "template_date"):
            check_text(name, getattr(self, name))
        for name in ("method", "task", "budgets", "prefill_chunk", "seed"):
            if getattr(self, name) == ():
                raise InputError(f"{name} is empty: give at least one")
        for budget in self.budgets:
            check_share("a budget", budget)
        check_whole("samples", self.samples, most=MOST_SAMPLES)
        for seed in self.seeds:
            check_whole("seed", seed, least=0, most=LARGEST)
        if len(self.seeds) == 1:
            object.__setattr__(self, "seed", self.seeds[0])  # one is a number, however it is given
        for chunk in self.prefill_chunk or ():
            check_whole("prefill_chunk", chunk)
        for name in ("context", "batch_rows", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        if self.memory_limit is not None:
            what = "a whole number of bytes"
            check_whole("memory_limit", self.memory_limit, most=LARGEST, what=what)
        if self.shard is not None:
            if not isinstance(self.shard, tuple) or len(self.shard) != 2:
                raise InputError(f"shard must be two numbers, like (2, 8), not {self.shard!r}")
            check_whole("the number of shards", self.shard[1], most=MOST_SHARDS)
            check_whole("a shard", self.shard[0], most=self.shard[1])
        check_whole("workers", self.workers, most=MOST_WORKERS)
        check_whole("gpus_per_worker", self.gpus_per_worker, most=MOST_GPUS)
        if self.gpus_per_worker > 1 and self.device not in ("auto", "cuda"):
            raise InputError(
                f"gpus_per_worker {self.gpus_per_worker} goes with device cuda, not "
                f"'{self.device}'; a process takes the first of the GPUs that are visible"
            )
        if self.ray is not None:
            check_text("ray", self.ray)
        if self.metric is not None:
            check_text("metric", self.metric)
        for name, known in (
            ("compress", COMPRESS),
            ("chat_template", CHAT_TEMPLATES),
            ("too_long", TOO_LONG),
        ):
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"unknown {name} '{value}': {did_you_mean(value, known)}")
        if (self.judge is None) != (self.judge_url is None):
            raise InputError("a judge needs a model and its address: give --judge and --judge-url")

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, each once."""
        return tuple(dict.fromkeys(self.seed)) if isinstance(self.seed, tuple) else (self.seed,)


@dataclass(frozen=True)
class SweepResult:
    """What a sweep did. The records are in `folder`."""

    folder: Path
    planned: int  # cells
    reused: int  # cells that were measured before
    measured: int = 0  # cells that were measured now, without the failed ones
    failed: list[Record] = field(default_factory=list, repr=False)  # also of other processes
    left_out: list[str] = field(default_factory=list)  # methods, each with the reason
    interrupted: bool = False
    elsewhere: int = 0  # cells that other processes recorded in the folder meanwhile

    @property
    def exit_code(self) -> int:
        """0: done; 1: some cells failed; 130: interrupted."""
        return 130 if self.interrupted else 1 if self.failed else 0


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that can start: all is loaded and checked, nothing is written."""

    sweep: "Sweep"
    folder: Path
    common: dict[str, Any]  # what all records of the folder share
    experiment: dict[str, Any]  # see sweep/folder.py
    planned: int  # cells
    cells: list[Cell]  # those that are not measured yet
    left_out: list[str]  # methods, each with the reason
    notes: list[str]  # for the user
    self_check: dict[str, Any]  # how far full attention is from the model's own
    codes: dict[str, str]  # see `kvbench.run_folder.current_codes`
    skipped: dict[str, list[int]]  # by task, samples that are too long and left out
    make: Callable[[Set[Unit]], list[Cell]]  # makes the cells of some units

    @cached_property
    def batches(self) -> "list[tuple[list[Cell], Cost]]":
        """The cells in the groups in which they are measured, with the cost of each."""
        from kvbench.sweep.cost import cost_of
        from kvbench.sweep.runner import rows_of

        sweep = self.sweep
        return [
            (batch, cost_of(sweep.model, rows_of(batch), sweep.chunk(batch)))
            for batch in sweep.batches(self.cells)
        ]

    def seconds(self, share: float = math.inf) -> float | None:
        """About how long it takes, by a short trial now.

        None if the trial would take more than `share` of the sweep's tokens.
        """
        from kvbench.sweep.cost import seconds_of, trial_tokens

        costs = [cost for _, cost in self.batches]
        model, chunk = self.sweep.model, self.sweep.prefill_chunk
        if trial_tokens(model, chunk) > share * sum(cost.tokens for cost in costs):
            return None
        return seconds_of(model, costs, chunk)


def run_sweep(choices: Choices, listener: Listener | None = None) -> SweepResult:
    """Measure what is not measured yet; an interrupt (Ctrl-C) ends it and is reported.

    The records go to `choices.out`, or to a folder in `results/runs` (see `sweep/folder.py`).
    Raises InputError, before anything is written, for choices that cannot be measured.
    """
    listener = listener or Listener()
    plan = plan_sweep(choices)
    out, planned, cells = plan.folder, plan.planned, plan.cells
    reused = planned - len(cells)
    for note in plan.notes:
        listener.note(note)
    if not cells:
        listener.note(f"all {planned} cells are measured already in {out}")
        known = current_codes([read_settings(out)])
        if newer_codes(known, plan.codes) != known:
            with RunWriter(out, plan.common, invocation(choices, plan)):
                pass  # the folder learns which of several codes is the current one
        return SweepResult(out, planned, reused, left_out=plan.left_out)

    from kvbench.sweep.runner import warm_up

    where = where_it_goes(out, planned, reused)
    progress = Progress(listener, len(cells), sum(cell.tokens for cell in cells))
    sweep = plan.sweep
    with RunWriter(out, plan.common, invocation(choices, plan)) as writer:
        listener.note(where)
        with interruptible(listener) as ending:
            warm_up(sweep.model)
            progress.start(plan.seconds(TRIAL_SHARE))
            sweep.run(cells, writer, progress.finished, progress.starting, listener.note)
        writer.check_stored(sweep.recorded)
    if sweep.elsewhere:
        listener.note_on_others(
            f"other processes measured {sweep.elsewhere} of the {len(cells)} cells"
        )
    ending.tell(listener, out)
    return SweepResult(
        out,
        planned,
        reused,
        sweep.measured,
        sweep.failed,
        plan.left_out,
        ending.interrupted,
        sweep.elsewhere,
    )


def where_it_goes(out: Path, planned: int, reused: int) -> str:
    """What a user hears first: whether a run is new, or how much of it is there."""
    if not is_run(out):
        return f"new run in {out}"
    return f"continuing {out}: {reused} of {planned} cells are there"


@dataclass
class Ending:
    """How a sweep ended."""

    interrupted: bool = False

    def tell(self, listener: Listener, out: Path) -> None:
        """Tell how an interrupted sweep goes on."""
        if self.interrupted:
            listener.note(f"interrupted; {what_is_kept(out)}")


def what_is_kept(out: Path) -> str:
    """Where the records of an interrupted sweep are, if it finished any."""
    if is_run(out):
        return f"what is finished is in {out}, the same command continues it"
    return "nothing was finished, so nothing is kept"  # a run folder without records is removed


@contextmanager
def interruptible(listener: Listener) -> Iterator[Ending]:
    """Measure until the end, or until an interrupt, which ends what is inside and nothing else."""
    ending = Ending()
    try:
        with ended_by_signals():
            yield ending
    except KeyboardInterrupt:
        ending.interrupted = True
    finally:
        listener.stopped()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt this process as Ctrl-C does, if they would kill it.

    So a batch system, a container or a closed terminal that ends a sweep lets it give up its cells.
    """

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # Python handles signals in the main thread only
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def plan_sweep(choices: Choices, only: Set[Unit] | None = None) -> SweepPlan:
    """What `run_sweep` would measure, or of that only some units.

    Raises InputError for choices that cannot be measured.
    """
    tasks, card = ready(choices)
    specs, left_out = choose_methods(choices, card)

    from kvbench.engine.attention import resolve_attention
    from kvbench.engine.self_check import self_check
    from kvbench.models.load import load_model, resolve_device
    from kvbench.sweep.runner import Sweep, free_bytes

    gpus = choices.gpus_per_worker
    attention = resolve_attention(choices.attention, resolve_device(choices.device, gpus))
    model = load_model(
        choices.model, device=choices.device, dtype=choices.dtype, attention=attention, gpus=gpus
    )
    checked = asdict(self_check(model))
    reads = any(task.reads for task in tasks)
    settings = choose_settings(choices, model, reads)
    check_shapes(specs, model, settings)
    if model.long_rope is not None:
        model.long_rope.choose(settings.longest, fix=True)
    common = common_settings(model, settings)
    if len(choices.seeds) > 1:
        common["seed"] = list(choices.seeds)
    sources = {task.name: task.source for task in tasks if task.source}
    wanted = experiment([task.name for task in tasks], choices.method, choices.option, sources)
    out = choices.out or find_folder(RUNS, common, wanted)
    check_common(out, common)
    make = partial(make_plan, model, tasks, specs, settings, choices.seeds)
    every = make(only)
    cells = [cell for cell in every if not cell.skipped]
    added = AddedRecords(out)  # before the others are read, so that none is missed in between
    damaged: list[Damage] = []
    again: list[str] = []
    found = read_records(out, damaged, common, again) if out.is_dir() else []
    known = {record.fingerprint: record for record in found}
    sweep = Sweep(
        model=model,
        tasks={task.name: task for task in tasks},
        context=settings.context,
        prefill_chunk=settings.prefill_chunks[0],
        memory_limit=choices.memory_limit
        or free_bytes(model) // (choices.workers if model.device.type == "cpu" else 1),
        batch_rows=choices.batch_rows,
        by_workers=choices.workers > 1,
        recorded={name for name, record in known.items() if record.error is None},
        added=added,
    )
    mine = cells if choices.shard is None else shard(cells, *choices.shard)
    missing = [c for c in mine if c.fingerprint not in known or known[c.fingerprint].error]
    notes = [f"left out: {'; '.join(left_out)}"] if left_out else []
    if choices.shard is not None:
        index, count = choices.shard
        notes.append(f"shard {index} of {count}: {len(mine)} of {len(cells)} cells")
    notes += [note] if (note := limit_threads()) else []
    if choices.workers > 1 and choices.ray is None:
        cores = len(os.sched_getaffinity(0)) if model.device.type == "cpu" else None
        notes += note_on_workers(choices.workers, len(units_of(missing)), cores)
    notes += [*note_on_damage(damaged), *again]
    notes += note_on_template(model, settings)
    notes += [remark for task in tasks for remark in task.remarks]
    notes += notes_on_samples(every, tasks, settings)
    codes = {f"method {cell.spec.name}": cell.method_code for cell in cells}
    codes |= {f"task {cell.sample.task}": cell.task_code for cell in cells}
    for task in (task for task in tasks if task.reads):
        of_samples = {c.sample.index: c.sample_code for c in every if c.sample.task == task.name}
        listed = [of_samples[index] for index in sorted(of_samples)]
        listed += [END] if len(listed) < settings.samples else []
        codes[f"samples {task.name}"] = " ".join(listed)
    check_sources(out, {"experiment": wanted, "codes": codes})
    skipped: dict[str, list[int]] = {}
    for index, name in sorted({(c.sample.index, c.sample.task) for c in every if c.skipped}):
        skipped.setdefault(name, []).append(index)
    return SweepPlan(
        sweep,
        out,
        common,
        wanted,
        len(mine),
        missing,
        left_out,
        notes,
        checked,
        codes,
        skipped,
        make,
    )


def ready(choices: Choices) -> tuple[list[Task], ModelCard]:
    """The tasks of a sweep and the model's card: what needs no model that is loaded.

    InputError if a task is damaged, or there can be no such model or folder.
    """
    if choices.out is not None:
        check_folder(choices.out)
    use_judge(None if choices.judge is None else Judge(choices.judge, choices.judge_url or ""))
    tasks = ready_tasks(choices)
    folder = model_folder(choices.model)
    return tasks, read_card(folder) if folder else ModelCard()


def note_on_damage(damaged: Sequence[Damage]) -> list[str]:
    """A note on lines that are no records; InputError for a file that cannot be read."""
    for each in damaged:
        if each.line is None:
            raise InputError(f"{each}; mend it, or move it away to measure all of it again")
    if not damaged:
        return []
    return [f"what is damaged is measured again: {'; '.join(told(damaged))}"]


def ready_tasks(choices: Choices) -> list[Task]:
    """The tasks of a sweep, ready for its samples; InputError if one of them is damaged."""
    tasks = get_tasks(choices.task or default_tasks())
    if not any(task.reads for task in tasks):
        for name in ("metric", "max_new_tokens"):
            if getattr(choices, name) is not None:
                raise InputError(
                    f"{name} is for samples that are read from files; none of these tasks reads: "
                    f"{', '.join(task.name for task in tasks)}"
                )
    for task in tasks:
        task.ready(choices.samples, choices.metric, choices.max_new_tokens)
    return tasks


def notes_on_samples(cells: Sequence[Cell], tasks: Sequence[Task], settings: Settings) -> list[str]:
    """Notes on what became of samples that are read; InputError if none of a task is left."""
    notes = []
    for task in (task for task in tasks if task.reads):
        of_task = {c.sample.index: c for c in cells if c.sample.task == task.name}
        count = f"of {len(of_task)} samples"
        if task.size is not None and task.size < settings.samples:
            samples = "1 sample" if task.size == 1 else f"{task.size} samples"
            notes.append(f"{task.name}: {samples}, all that there are")
        if skipped := [index for index, cell in of_task.items() if cell.skipped]:
            places = ", ".join(map(task.place, skipped[:MOST_NAMED]))
            more = f" and {len(skipped) - MOST_NAMED} more" * (len(skipped) > MOST_NAMED)
            if len(skipped) == len(of_task):
                can_be_cut = any(cell.sample.context_span for cell in of_task.values())
                raise InputError(
                    f"{task.name}: all samples are longer than {settings.most} tokens; choose a "
                    f"longer --context{', or --too-long cut' if can_be_cut else ''}"
                )
            notes.append(f"{task.name}: {len(skipped)} {count} left out, too long: {places}{more}")
        if cut := [cell.cut_tokens for cell in of_task.values() if cell.cut_tokens]:
            notes.append(
                f"{task.name}: the contexts of {len(cut)} {count} are cut, by {max(cut)} tokens at "
                "most"
            )
        plain = sum(settings.chat is not None and c.sample.chat is False for c in of_task.values())
        if plain:
            notes.append(
                f"{task.name}: {plain} {count} are read without the chat template, as they ask"
            )
    return notes


def default_tasks() -> list[str]:
    """The tasks of a run that names none."""
    return [name for name in task_registry.names() if task_registry.get(name).default]


def choose_methods(choices: Choices, card: ModelCard) -> tuple[list[MethodSpec], list[str]]:
    """The baseline and the methods asked for, without any `COMPARED`; ALL stands for every method.

    The second list names the methods that were left out: those that lack something and were not
    asked for by name.
    """
    asked = choices.method or COMPARED
    names = dict.fromkeys(n for name in asked for n in (method_names() if name == ALL else [name]))
    specs = [parse_method(BASELINE, {}, card.options)]
    left_out = []
    for name in names:
        several = parse_methods(name, choices.option, card.options)
        missing = of_method(name, several[0].method.missing)
        if missing:
            if name in (choices.method or ()):
                raise InputError(
                    f"{name} needs {missing}; model '{choices.model}' does not come with it"
                )
            left_out.append(f"{name} needs {missing}")
        elif name != BASELINE:
            specs += several
    check_option_names(choices.option, specs)
    return specs, left_out


def choose_settings(choices: Choices, model: "LoadedModel", reads: bool = False) -> Settings:
    """The settings of a sweep, from the command line, the model's card, or its limits.

    `reads`: some of its tasks read their samples. These may be as long as the model takes, unless
    the user chooses a context.
    """
    context = choices.context or model.card.context or min(model.max_context, CONTEXT)
    if context > model.max_context:
        where = "" if choices.context else f" (it is the context in '{model.card.file}')"
        raise InputError(
            f"context {context} is more than model '{model.name}' takes: at most "
            f"{model.max_context}{where}"
        )
    default = model.card.prefill_chunk if not choices.context else 0
    has_template = getattr(model.tokenizer, "chat_template", None) is not None
    if choices.chat_template == "on" and not has_template:
        raise InputError(f"model '{model.name}' has no chat template; use --chat-template off")
    return Settings(
        context=context,
        seed=choices.seeds[0],
        samples=choices.samples,
        prefill_chunks=choices.prefill_chunk or (default or max(1, context // 4),),
        budgets=choices.budgets,
        chat_template=has_template and choices.chat_template != "off",
        template_date=template_date(choices.template_date),
        template_options=template_options(choices.template_option),
        compress=choices.compress,
        limit=choices.context or model.max_context if reads else None,
        too_long=choices.too_long,
        follow_data=choices.chat_template == "auto",
        judge=choices.judge,
    )


def template_date(text: str) -> str:
    """The day that `--template-date` names; InputError if it is none."""
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise InputError(
            f"template_date {text} is not a day; write it like {TEMPLATE_DATE}"
        ) from None


def template_options(given: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What `--template-option` gives: texts that are JSON (false, 3) as values, others as text."""

    def value(text: Any) -> Any:
        try:
            return json.loads(text) if isinstance(text, str) else text
        except ValueError:
            return text

    return tuple(sorted((name, value(text)) for name, text in given.items()))


def note_on_template(model: "LoadedModel", settings: Settings) -> list[str]:
    """A note if the chat template opens a thinking block before the answer."""
    tag = settings.chat.opens_thinking(model.tokenizer) if settings.chat else None
    if tag is None:
        return []
    return [
        f"the chat template opens a {tag} block, so that answers start inside it; most "
        "templates close it with --template-option enable_thinking=false"
    ]


def check_shapes(specs: Sequence[MethodSpec], model: "LoadedModel", settings: Settings) -> None:
    """InputError, before anything is measured, if a method does not fit the model's shape.

    Any other exception of a method is met again when its cells are measured, and fails these only.
    """
    for spec in specs:
        try:
            spec.method.windows(model.shape, min(settings.budgets), settings.context)
        except InputError:
            raise
        except Exception:
            continue


def invocation(choices: Choices, plan: SweepPlan) -> dict[str, Any]:
    """This process, for the run folder: experiment, settings, check, versions, hardware, commit."""
    import torch

    given = choices.task and tuple(t.name if isinstance(t, Task) else t for t in choices.task)
    settings = json.loads(json.dumps(asdict(replace(choices, task=given)), default=str))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "experiment": plan.experiment,
        "settings": settings,
        "self_check": plan.self_check,
        "codes": plan.codes,
        **({"skipped": plan.skipped} if plan.skipped else {}),
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
