"""The Python face of kvbench: the functions behind the command line (`docs/python.md`).

`run` is `kvbench run`, and `generate` answers one prompt under a method.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pandas import DataFrame

from kvbench.arguments import LARGEST, check_options, check_share, check_text, check_whole
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.engine.self_check import self_check
from kvbench.errors import InputError
from kvbench.machine import use_threads
from kvbench.models.load import LoadedModel, load_model
from kvbench.records import BASELINE
from kvbench.report.frames import load_records
from kvbench.report.show import Report, report
from kvbench.spec import check_option_names, parse_method
from kvbench.sweep.chat import TEMPLATE_DATE
from kvbench.sweep.command import Choices, SweepResult, choose_settings, what_is_kept
from kvbench.sweep.progress import Listener
from kvbench.sweep.start import start
from kvbench.task import Task


@dataclass(frozen=True)
class RunResult:
    """What `run` measured; `sweep` counts the cells."""

    sweep: SweepResult

    @property
    def folder(self) -> Path:
        """The run folder. Report it, or continue it with `run(out=folder, ...)`."""
        return self.sweep.folder

    @cached_property
    def records(self) -> DataFrame:
        """All records of the run folder, one row a cell; see `docs/python.md` for the columns."""
        return load_records(self.folder)

    @property
    def failed(self) -> DataFrame:
        """The records of cells that failed; `error` says why."""
        return self.records[self.records["error"].notna()]

    def report(self, *, threshold: float = 0.9) -> Report:
        """Compute curves, critical footprints and differences of the run folder.

        Raises InputError if no cell was measured.
        """
        return report(self.folder, threshold=threshold)


def run(
    model: str = "tiny",
    methods: Sequence[str] | None = None,
    tasks: Sequence[str | Task] | None = None,
    budgets: Sequence[float] = Choices.budgets,
    samples: int = Choices.samples,
    *,
    options: Mapping[str, Any] | None = None,
    context: int | None = None,
    prefill_chunk: int | Sequence[int] | None = None,
    compress: str = "prompt",
    metric: str | None = None,
    max_new_tokens: int | None = None,
    too_long: str = "error",
    seed: int | Sequence[int] = 0,
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    chat_template: str = "auto",
    template_date: str = TEMPLATE_DATE,
    template_options: Mapping[str, Any] | None = None,
    batch_rows: int | None = None,
    memory_limit: int | None = None,
    threads: int | None = None,
    workers: int = 1,
    gpus_per_worker: int = 1,
    shard: tuple[int, int] | None = None,
    listener: Listener | None = None,
) -> RunResult:
    """Measure methods on tasks at several budgets, and full attention as the baseline.

    Cells that the run folder has already are not measured again, so a call with more samples
    continues a run.

    Args:
        model: a name that `kvbench list models` shows, a folder, or a hub id.
        methods: names of methods, `["all"]` for every one; None for those that the paper compares.
        tasks: names of tasks, paths of task files, or tasks; None for the default ones.
        budgets: shares of the KV cache, above 0 and at most 1.
        samples: samples of each task, for each seed.
        options: options of methods, such as `{"window": 32}` or `{"snapkv.window": 32}`. The values
            of a list, as in `{"snapkv.window": [8, 32]}`, are compared.
        context: tokens of a prompt and its answer; None for the model's own. Samples from files may
            then be as long as the model takes.
        prefill_chunk: tokens of a prefill chunk, or several sizes to compare; None for the model's.
        compress: `prompt`: methods see the whole prompt; `context`: they evict before the question
            is read, and its entries stay.
        metric: the metric of samples from files that name none.
        max_new_tokens: the answer limit of samples from files that say none, in tokens.
        too_long: what becomes of samples from files that are longer than `context`, or than the
            model takes: `error`, `cut` (the end of their context) or `skip`.
        seed: seed of the samples, or several; the report pools them.
        out: the run folder; None for one in `results/runs`, named after model, tasks and date.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attention: `auto`, `sdpa` or `flash`.
        chat_template: `auto`, `on` or `off`: whether prompts go into the model's chat template.
        template_date: the day that a chat template writes, as `2025-01-01`.
        template_options: what a chat template is given, such as `{"enable_thinking": False}`.
        batch_rows: cells that are measured together, at most; None for as many as memory allows.
        memory_limit: bytes beside the model; None for most of what is free.
        threads: threads on the CPU, of the whole process from now on; None for OMP_NUM_THREADS, or
            as many as there are free cores.
        workers: processes that share the work, as with `kvbench run --workers`.
        gpus_per_worker: GPUs of each worker, over which a model larger than one is split.
        shard: the part of the cells to measure, as `(2, 8)` for the second of eight.
        listener: hears of the progress; None for silence.

    Raises:
        InputError: something given cannot be used; nothing is measured.
        KeyboardInterrupt: an interrupt (Ctrl-C); its text says where what was finished is.
    """
    check_options("options", options)
    check_options("template_options", template_options)
    if out is not None and (not isinstance(out, str | Path) or not str(out).strip()):
        raise InputError(f"out must be a path, not {out!r}")
    if threads is not None:
        check_whole("threads", threads)
        use_threads(threads)
    chunks = None if prefill_chunk is None else _several("prefill_chunk", prefill_chunk, least=1)
    choices = Choices(
        model=model,
        method=_names(methods, "methods"),
        task=_names(tasks, "tasks", str | Task),
        budgets=_shares(budgets),
        samples=samples,
        context=context,
        prefill_chunk=chunks,
        seed=_several("seed", seed, least=0),
        out=None if out is None else Path(out),
        device=device,
        dtype=dtype,
        attention=attention,
        option={name: _swept(name, value) for name, value in (options or {}).items()},
        chat_template=chat_template,
        compress=compress,
        metric=metric,
        max_new_tokens=max_new_tokens,
        too_long=too_long,
        template_date=template_date,
        template_option=dict(template_options or {}),
        batch_rows=batch_rows,
        memory_limit=memory_limit,
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        shard=shard,
    )
    result = start(choices, listener)
    if result.interrupted:
        raise KeyboardInterrupt(what_is_kept(result.folder))
    return RunResult(result)


def _names(names: Any, what: str, kind: Any = str) -> tuple[Any, ...] | None:
    if names is None:
        return None
    if isinstance(names, str):
        parts = [name.strip() for name in names.split(",")]
        raise InputError(f"{what} is a list of names: write {parts!r}, not {names!r}")
    if not isinstance(names, Iterable) or not all(isinstance(name, kind) for name in names):
        raise InputError(f"{what} must be a list of names, not {names!r}")
    if not names:
        raise InputError(f"{what} is empty: give at least one, or None")
    return tuple(dict.fromkeys(names))


def _shares(budgets: Any) -> tuple[float, ...]:
    if isinstance(budgets, str) or not isinstance(budgets, Iterable):
        raise InputError(f"budgets is a list of numbers: write [{budgets}], not {budgets!r}")
    budgets = list(budgets)
    for budget in budgets:
        check_share("budgets: a budget", budget)
    return tuple(dict.fromkeys(map(float, budgets)))


def _several(name: str, given: Any, least: int) -> tuple[int, ...]:
    several = given if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    several = list(several)
    for each in several:
        check_whole(name, each, least, LARGEST)
    return tuple(dict.fromkeys(map(int, several)))


def _swept(name: str, value: Any) -> str | tuple[str, ...]:
    """An option as text, or as several texts where a list gives several values."""
    if not isinstance(value, list | tuple):
        return str(value)
    if not value:
        raise InputError(f"options: {name} has no value: give one, or a list of some")
    texts = tuple(dict.fromkeys(map(str, value)))
    return texts if len(texts) > 1 else texts[0]


@dataclass(frozen=True)
class Generation:
    """An answer, and what the KV cache held while it was generated.

    `footprint`, `peak` and `reads` are fractions of full attention's on the same tokens.
    """

    text: str
    tokens: list[int]  # without the end token
    footprint: float
    peak: float
    reads: float
    bytes_peak: int  # peak memory of keys and values, temporary copies included
    # [layers][KV heads], sorted positions resident after the prompt
    kept: list[list[list[int]]] = field(repr=False)


def generate(
    model: str | LoadedModel,
    prompt: str,
    method: str = BASELINE,
    budget: float | None = None,
    *,
    max_new_tokens: int = 64,
    prefill_chunk: int | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Generation:
    """Answer one prompt, greedily, while a method evicts entries.

    The prompt is encoded as it is, without a chat template.

    Args:
        model: a name, folder or hub id, or what `load_model` returned, which saves loading.
        prompt: text, at least one token long.
        method: the name of a method, such as `snapkv-patched` or `prulong+snapkv`.
        budget: share of the KV cache, above 0 and at most 1; full attention needs none.
        max_new_tokens: tokens of the answer at most, its end token included.
        prefill_chunk: tokens of a prefill chunk; None for the model's own, as in `run`.
        options: options of the method, such as `{"window": 32}`.
        seed: for methods that draw.

    Raises:
        InputError: something given cannot be used.
    """
    check_text("prompt", prompt)
    check_text("method", method)
    check_options("options", options)
    if budget is None and method != BASELINE:
        raise InputError(f"{method} needs a budget: give a budget, like 0.3")
    budget = 1.0 if budget is None else budget
    check_share("budget", budget)
    check_whole("max_new_tokens", max_new_tokens)
    check_whole("seed", seed, least=0, most=LARGEST)
    if prefill_chunk is not None:
        check_whole("prefill_chunk", prefill_chunk)
    if not isinstance(model, LoadedModel):
        check_text("model", model)
    loaded = load_model(model) if isinstance(model, str) else model
    if isinstance(model, str):
        self_check(loaded)
    given = dict(options or {})
    spec = parse_method(method, given, loaded.card.options)
    if missing := spec.method.missing():
        raise InputError(f"{method} needs {missing}; model '{loaded.name}' does not come with it")
    check_option_names(given, [spec])
    if prefill_chunk is None:
        prefill_chunk = choose_settings(Choices(), loaded).prefill_chunks[0]
    tokens = list(loaded.tokenizer.encode(prompt))
    if not tokens:
        raise InputError(f"prompt {prompt!r} has no tokens: give a longer text")
    row = Row(tokens, max_new_tokens, spec, budget, seed)
    found = run_rows(loaded, [row], prefill_chunk=prefill_chunk, keep_positions=True)[0]
    return Generation(
        text=loaded.tokenizer.decode(found.tokens, skip_special_tokens=True),
        tokens=found.tokens,
        footprint=found.kv_footprint,
        peak=found.kv_peak,
        reads=found.kv_reads,
        bytes_peak=found.kv_bytes_peak,
        kept=found.kept or [],
    )
