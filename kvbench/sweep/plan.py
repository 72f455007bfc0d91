"""The plan of a sweep: its cells, each one sample under one method and budget.

Tasks make samples, the tokenizer turns prompts into token ids, and every cell gets its fingerprint
(`fingerprint.py`). `runner.py` measures the cells.

A sample that a task cannot make, and a method that cannot be recorded, cost their own cells only:
these carry the reason in `error`, and the runner records them as failed. But a task that reads its
samples is the user's to mend: what is wrong with one of them is raised before anything is measured.
"""

import itertools
import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.errors import ContractError, InputError, debugging
from kvbench.metrics import metrics
from kvbench.records import BASELINE
from kvbench.registry import open_task
from kvbench.sweep.chat import TEMPLATE_DATE, Chat
from kvbench.sweep.fingerprint import content_digest, digest, measuring_code, source_code
from kvbench.sweep.length import TooLong, fitting
from kvbench.task import Sample, Task

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.spec import MethodSpec

Unit = tuple[str, int, int]  # a sample with all of its cells: its task, seed and index
ANSWER_PREFIX = "answer_prefix"
TURNS = "turns"
PROMPT_TAIL = 240  # characters of the prompt kept in a record


@dataclass(frozen=True)
class Cell:
    """One measurement: a sample (its prompt as token ids) under one method and budget."""

    fingerprint: str
    sample: Sample
    prompt: Sequence[int]
    spec: "MethodSpec"
    budget: float
    prefill_chunk: int | None  # tokens; None where the method does not depend on it
    seed: int  # for methods that draw; equal for all methods and budgets of a sample
    method_code: str = ""  # a hash of the method's source
    task_code: str = ""  # a hash of the task's source
    options: dict[str, Any] = field(default_factory=dict)  # of the method, as records hold them
    error: str = ""  # why the cell cannot be measured
    context: int | None = None  # tokens that methods evict from; None: the whole prompt
    most: int | None = None  # tokens of prompt and answer at most; None: the sweep's context
    cut_tokens: int | None = None  # of a prompt that was too long; None: its task makes it fit
    skipped: bool = False  # the sample is too long and is left out
    sample_code: str = ""  # a hash of a sample that is read
    source: str = ""  # where it is read from, as records hold it
    sample_id: str | None = None  # what a sample that is read is called
    sample_seed: int = 0  # of the sweep, that the sample was made with

    @property
    def tokens(self) -> int:
        """Tokens to process at most: the prompt's and the answer's."""
        return len(self.prompt) + self.sample.max_new_tokens

    @property
    def unit(self) -> Unit:
        """The unit that the cell belongs to (`units.py`)."""
        return self.sample.task, self.sample_seed, self.sample.index


@dataclass(frozen=True)
class Settings:
    """The settings of all cells of a sweep."""

    context: int  # tokens
    seed: int  # one of the sweep's
    samples: int  # of each task and seed
    prefill_chunks: tuple[int, ...]
    budgets: tuple[float, ...]
    chat_template: bool
    template_date: str = TEMPLATE_DATE  # the day that a chat template takes for today, ISO 8601
    template_options: tuple[tuple[str, Any], ...] = ()  # what else the chat template is given
    compress: str = "prompt"  # what methods evict from (see `kvbench.records.COMPRESS`)
    judge: str | None = None  # the model that judges answers
    limit: int | None = None  # tokens of samples that are read; None: `context`
    too_long: str = "error"  # what becomes of a longer one (see `kvbench.sweep.length`)
    follow_data: bool = True  # a sample that is not made for a chat template gets none

    @property
    def most(self) -> int:
        """Tokens of a sample that is read."""
        return self.limit or self.context

    @property
    def longest(self) -> int:
        """Tokens of any sample."""
        return max(self.context, self.most)

    def chat_of(self, sample: Sample) -> "Chat | None":
        """How the prompt of a sample becomes a user's turn; None without a chat template."""
        return None if self.follow_data and sample.chat is False else self.chat

    @property
    def chat(self) -> "Chat | None":
        """How prompts become a user's turn; None without a chat template."""
        if not self.chat_template:
            return None
        return Chat(self.template_date, self.template_options)


def common_settings(model: "LoadedModel", settings: Settings) -> dict[str, Any]:
    """The settings that all records of one run folder share, JSON-serialisable."""
    import torch
    import transformers

    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "attention": model.attention,
        "context": settings.context,
        "seed": settings.seed,
        "chat_template": settings.chat_template,
        "template_date": settings.template_date if settings.chat_template else None,
        "compress": settings.compress,
        **({"judge": settings.judge} if settings.judge else {}),
        "template_options": dict(settings.template_options) if settings.chat_template else {},
        "rope": None if model.long_rope is None else model.long_rope.name_for(settings.longest),
        "kvbench": f"{kvbench.__version__}+{measuring_code()}",
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def make_plan(
    model: "LoadedModel",
    tasks: Sequence[Task],
    specs: Sequence["MethodSpec"],
    settings: Settings,
    seeds: Sequence[int] = (),
    only: Set[Unit] | None = None,
) -> list[Cell]:
    """All cells of a sweep: sample by sample, for each the tasks in turn, and for each the seeds.

    `seeds` are instead of that of the settings; a cell is the same whatever other seeds there are.
    The baseline has one cell per sample, whatever the budgets. A method that does not depend on the
    prefill chunk has one cell per budget. Raises InputError if no sample of a task can be made with
    these settings, for example because the context is too short for it.

    With `only`, the cells of these units: a long sweep need not be tokenized as a whole for some.
    """
    of_seeds = [replace(settings, seed=seed) for seed in seeds or (settings.seed,)]
    commons = [common_settings(model, each) for each in of_seeds]
    methods = [(spec, method_code(spec), *recorded_options(spec)) for spec in specs]
    task_codes = {task.name: task_code(task) for task in tasks}
    prepared = {task.name: _samples_of_seeds(model, task, of_seeds, only) for task in tasks}
    cells = []
    for index, task in itertools.product(range(settings.samples), tasks):
        for one, common, samples in zip(of_seeds, commons, prepared[task.name], strict=True):
            wanted = only is None or (task.name, one.seed, index) in only
            if not wanted or index not in samples:
                continue
            ready = samples[index]
            sample, prompt = ready.sample, ready.prompt
            what = {
                "common": common,
                "task": [task.name, task_codes[task.name]],
                "sample": index,
                "prompt": prompt.digest if isinstance(prompt, StoredPrompt) else digest(prompt),
                "max_new_tokens": [sample.max_new_tokens, sample.stop, ready.most],
                "scored_by": content_digest(scored_by(sample)),
                "evicted_from": ready.context,
                "line": ready.sample_code,
            }
            for spec, code, given, method_error in methods:
                for budget, chunk in variants(spec, settings):
                    how = {
                        "method": [spec.name, given, code],
                        "budget": budget,
                        "prefill_chunk": chunk,
                        "read_chunk": chunk or settings.prefill_chunks[0],
                    }
                    cells.append(
                        Cell(
                            fingerprint=digest({**what, **how}),
                            sample=sample,
                            prompt=prompt,
                            spec=spec,
                            budget=budget,
                            prefill_chunk=chunk,
                            seed=int(digest([one.seed, task.name, index])[:8], 16),
                            method_code=code,
                            task_code=task_codes[task.name],
                            options=given,
                            error=ready.error or method_error,
                            context=ready.context,
                            most=ready.most,
                            cut_tokens=ready.cut_tokens,
                            skipped=ready.skipped,
                            sample_code=ready.sample_code,
                            source=task.source if task.reads else "",
                            sample_id=ready.sample_id,
                            sample_seed=one.seed,
                        )
                    )
    return cells


def recorded_options(spec: "MethodSpec") -> tuple[dict[str, Any], str]:
    """A method's options as records hold them, and why they cannot be recorded ("" if they can)."""
    try:
        options = spec.options
        text = json.dumps(options, allow_nan=False)
        if json.dumps(spec.options) != text:  # every run would measure everything again
            raise ContractError("they change each time that they are asked for")
    except Exception as error:
        return {}, (
            f"method '{spec.name}': its options and remarks cannot be recorded as JSON: "
            f"{one_line(error)}"
        )
    return options, ""


def scored_by(sample: Sample) -> list[Any]:
    """What a score depends on, beside the prediction and the task."""
    metric = None if sample.metric is None else source_code(metrics.get(sample.metric))
    told = [sample.subtask, sample.reference, sample.metadata, sample.cluster]
    return [*told, sample.metric, metric, sample.answer_prefix, sample.chat]


class StoredPrompt(Sequence[int]):
    """The token ids of a sample that is read, made again whenever they are asked for.

    So a plan holds no prompts. Equal prompts are equal, and hash alike, without being read.
    """

    def __init__(self, ids: Sequence[int], read: Callable[[], list[int]], place: str) -> None:
        self.digest, self.size, self._read, self.place = digest(ids), len(ids), read, place

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> Any:
        return self.read()[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StoredPrompt) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def read(self) -> list[int]:
        """The ids; ContractError if they are no longer those that were planned."""
        try:
            ids = self._read()
        except InputError:
            ids = []
        if digest(ids) != self.digest:
            raise ContractError(
                f"{self.place}: it has changed since the run started; give the same command again"
            )
        return ids


@dataclass(frozen=True)
class Prepared:
    """A sample that can be measured, or why it cannot."""

    sample: Sample
    prompt: Sequence[int]  # token ids
    context: int | None = None  # how many of them methods evict from; None: all
    error: str = ""
    most: int | None = None  # as in `Cell`, as what follows
    cut_tokens: int | None = None
    skipped: bool = False
    sample_code: str = ""
    sample_id: str | None = None


def _samples_of_seeds(
    model: "LoadedModel", task: Task, of_seeds: Sequence[Settings], only: Set[Unit] | None
) -> list[dict[int, Prepared]]:
    """All samples of a task, or those in `only`, by index, for each seed.

    Samples that are read are the same for every seed.
    """
    if only is not None:
        wanted = [
            {index for name, seed, index in only if (name, seed) == (task.name, each.seed)}
            for each in of_seeds
        ]
        parts = zip(of_seeds, wanted, strict=True)
        return [_prepared_samples(model, task, each, some) for each, some in parts]
    first = _prepared_samples(model, task, of_seeds[0])
    if task.reads or len(of_seeds) == 1:
        return [first for _ in of_seeds]
    prepared = [first, *(_prepared_samples(model, task, each) for each in of_seeds[1:])]
    asked = [[asked_of(r.sample) for r in each.values() if not r.error] for each in prepared[:2]]
    if asked[0] and asked[0] == asked[1]:
        seeds = f"{of_seeds[0].seed} and {of_seeds[1].seed}"
        raise InputError(
            f"task '{task.name}' makes the same samples with the seeds {seeds}, so several seeds "
            "would count them several times; give one --seed"
        )
    return prepared


def _prepared_samples(
    model: "LoadedModel", task: Task, settings: Settings, wanted: Set[int] | None = None
) -> dict[int, Prepared]:
    """All samples of a task by index, or the `wanted` ones.

    A sample that cannot be made has a stand-in without a prompt. InputError if no sample can be
    made, and the first one's fault is the user's choice. A task that makes another sample each time
    has none: every run would measure all of its cells again. A task that reads its samples raises
    InputError for any that cannot be measured.
    """
    prepared: dict[int, Prepared] = {}
    first: InputError | None = None
    varies = False
    count = settings.samples if task.size is None else task.size
    for index in range(count) if wanted is None else sorted({0, *wanted} if wanted else ()):
        try:
            if task.reads:
                if wanted is None or index in wanted:
                    prepared[index] = _read_sample(model, task, index, settings)
                continue
            ready = _prepare_sample(model, task, index, settings)
            if index == 0:
                again = make_sample(model, task, 0, settings)
                varies = asked_of(ready.sample) != asked_of(again)
            if varies:
                raise ContractError("sample() makes another sample each time; expected equal ones")
            prepared[index] = ready
        except (Exception, SystemExit) as error:
            if task.reads:
                raise InputError(f"{task.place(index)}: {one_line(error)}") from None
            if index == 0 and isinstance(error, InputError):
                first = error
            subtask = str(task.subtasks[index % len(task.subtasks)]) if task.subtasks else ""
            reason = f"{task.place(index)}: {one_line(error)}"
            stand_in = Sample(task.name, subtask, index, "", None, 0)
            prepared[index] = Prepared(stand_in, [], error=reason)
    if first is not None and wanted is None and all(each.error for each in prepared.values()):
        raise first
    return prepared


def _prepare_sample(model: "LoadedModel", task: Task, index: int, settings: Settings) -> Prepared:
    """Sample `index`, ready to be measured.

    Raises whatever the task raises, or says what is wrong.
    """
    return _prepare(model, task, make_sample(model, task, index, settings), index, settings)


def _prepare(
    model: "LoadedModel", task: Task, made: Sample, index: int, settings: Settings
) -> Prepared:
    sample = check_sample(made, task, index)
    chat = settings.chat_of(sample)
    sample = replace(sample, chat=chat is not None)
    most = cut_tokens = None
    if task.reads:
        most = settings.most
        sample, prompt, cut_tokens = fitting(
            sample,
            lambda sample: encode_prompt(model.tokenizer, sample, chat=chat),
            most,
            settings.too_long,
            model.tokenizer,
        )
    else:
        prompt = encode_prompt(model.tokenizer, sample, chat=chat)
        _check_length(model, task, sample, prompt)
    if not prompt:
        raise ContractError("its prompt is empty; expected at least one token")
    model.check_ids(prompt)
    context = None
    if settings.compress == "context":
        context = context_tokens(model.tokenizer, sample, prompt, chat=chat)
    return Prepared(sample, prompt, context, most=most, cut_tokens=cut_tokens)


def _read_sample(model: "LoadedModel", task: Task, index: int, settings: Settings) -> Prepared:
    """Sample `index` of a task that reads, without the prompt, which is read again later.

    A sample that is too long is marked if it is to be left out. Raises as `_prepare_sample`.
    """
    whole = make_sample(model, task, index, settings)
    try:
        ready = _prepare(model, task, whole, index, settings)
    except TooLong:
        if settings.too_long != "skip":
            raise
        ready = Prepared(whole, [], skipped=True)
    told = [*asked_of(whole), whole.context_span, *scored_by(replace(whole, metadata={}))]
    code = content_digest(told)[:8]
    sample = replace(ready.sample, prompt=ready.sample.prompt[-PROMPT_TAIL:], metadata={})
    own = whole.metadata.get("id")
    ready = replace(ready, sample_code=code, sample_id=None if own is None else str(own))
    if ready.skipped:
        return replace(ready, sample=sample)
    prompt = StoredPrompt(
        ready.prompt,
        lambda: list(_prepare_sample(model, task, index, settings).prompt),
        task.place(index),
    )
    return replace(ready, sample=sample, prompt=prompt)


def asked_of(sample: Sample) -> tuple[Any, ...]:
    """What must be equal if a sample is made again."""
    limits = sample.max_new_tokens, sample.stop
    return sample.prompt, sample.reference, sample.question_at, *limits


def check_sample(sample: Any, task: Task, index: int) -> Sample:
    """What a task gave as sample `index`; ContractError if it cannot be run or recorded."""
    if not isinstance(sample, Sample):
        raise ContractError(f"sample() returns a {type(sample).__name__}; expected a Sample")
    if (sample.task, sample.index) != (task.name, index):
        raise ContractError(
            f"it calls itself sample {sample.index} of '{sample.task}'; expected sample {index} "
            f"of '{task.name}'"
        )
    for name in ("prompt", "subtask"):
        if not isinstance(getattr(sample, name), str):
            kind = type(getattr(sample, name)).__name__
            raise ContractError(f"its {name} is a {kind}; expected a text")
    limit = sample.max_new_tokens
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ContractError(f"its max_new_tokens is {limit!r}; expected an int, at least 1")
    if sample.cluster is not None and not isinstance(sample.cluster, str):
        raise ContractError(f"its cluster is {sample.cluster!r}; expected None or a text")
    if not isinstance(sample.stop, tuple) or not all(
        isinstance(text, str) and text for text in sample.stop
    ):
        raise ContractError(f"its stop is {sample.stop!r}; expected a tuple of texts, none empty")
    at = sample.question_at
    if at is not None and (not isinstance(at, int) or not 0 < at < len(sample.prompt)):
        raise ContractError(
            f"its question_at is {at!r}; expected None or an int from 1 to {len(sample.prompt) - 1}"
        )
    span = sample.context_span
    if span is not None and not 0 <= span[0] <= span[1] <= len(sample.prompt):
        raise ContractError(
            f"its context_span is {span}; expected None, or [start, end] in its prompt of "
            f"{len(sample.prompt)} characters"
        )
    try:
        json.dumps(sample.reference, allow_nan=False)
    except Exception as error:
        raise ContractError(
            f"its reference cannot be stored as JSON: {one_line(error)}; expected a JSON value"
        ) from error
    return sample


def one_line(error: BaseException) -> str:
    """An exception as records hold it; the message alone if it is one of kvbench's own.

    KVBENCH_DEBUG=1 shows its traceback.
    """
    if debugging():
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or "no message"
    own = isinstance(error, ContractError | InputError)
    return (text if own else f"{type(error).__name__}: {text}")[:400]


def method_code(spec: "MethodSpec") -> str:
    """A hash of a method's source; of a combination, of both parts."""
    parts = [spec.method] if spec.post_fill is None else [spec.method, spec.post_fill]
    return source_code(*map(type, parts))


def task_code(task: Task) -> str:
    """A hash of a task's source, and of what the task adds to it."""
    code, more = source_code(type(task)), task.fingerprint()
    return digest([code, more])[:8] if more else code


def variants(spec: "MethodSpec", settings: Settings) -> Iterator[tuple[float, int | None]]:
    """The budgets and prefill chunks of a method: its cells of one sample."""
    for budget in (1.0,) if spec.name == BASELINE else settings.budgets:
        for chunk in settings.prefill_chunks if spec.depends_on_chunk else (None,):
            yield budget, chunk


def make_sample(model: "LoadedModel", task: Task, index: int, settings: Settings) -> Sample:
    """Sample `index` of a task; one that is made fits the context, with the chat template."""
    tokens = settings.context
    if settings.chat is not None and not task.reads:
        tokens -= len(_in_chat(model.tokenizer, settings.chat, "", ""))
        if tokens < 1:
            raise InputError(
                f"the chat template alone takes {settings.context - tokens} tokens; choose a "
                "longer --context, or --chat-template off"
            )
    return task.sample(index, seed=settings.seed, context=tokens, tokenizer=model.tokenizer)


def encode_prompt(tokenizer: Any, sample: Sample, *, chat: Chat | None) -> list[int]:
    """The token ids of a prompt; with `chat`, as a user's turn in the model's chat template.

    If the prompt ends with the beginning of the answer (`answer_prefix`, of the sample or its
    metadata), that part is put after the template's assistant header, so that the model continues
    it. A sample may also say what its turns are (`metadata["turns"]`).
    """
    if chat is None:
        return list(tokenizer.encode(sample.prompt))
    if TURNS in sample.metadata:
        return _turns_in_chat(tokenizer, chat, sample.metadata[TURNS])
    prefix = sample.answer_prefix or str(sample.metadata.get(ANSWER_PREFIX, ""))
    return _in_chat(tokenizer, chat, sample.prompt.removesuffix(prefix).rstrip(), prefix.lstrip())


def context_tokens(
    tokenizer: Any, sample: Sample, prompt: Sequence[int], *, chat: Chat | None
) -> int:
    """How many tokens of a prompt belong to its context, before the question starts.

    A token that holds the end of the context and the start of the question belongs to the
    question. InputError if the sample does not say where its question starts, ContractError if
    nothing comes before it.
    """
    if sample.question_at is None:
        raise InputError(
            f"sample {sample.index} of '{sample.task}' does not say where its question starts "
            "(question_at), which --compress context needs; use --compress prompt"
        )
    before = sample.prompt[: sample.question_at]
    if chat is not None:
        text, content = chat.text(tokenizer, sample.prompt), sample.prompt.strip()
        start = text.rfind(content)  # a system prompt before it may have the same words
        if start < 0:
            raise ContractError("the model's chat template changes its context")
        before = text[: start + len(before.strip())]
    ids = tokenizer.encode(before, add_special_tokens=chat is None)
    same = 0
    while same < min(len(ids), len(prompt) - 1) and ids[same] == prompt[same]:
        same += 1
    if not same:
        raise ContractError("it has nothing before its question; expected a context")
    return same


def _in_chat(tokenizer: Any, chat: Chat, content: str, answer: str) -> list[int]:
    text = chat.text(tokenizer, content)
    if content.strip() not in text:
        raise InputError(
            "the model's chat template leaves out the prompt, or changes it; use "
            "--chat-template off"
        )
    return list(tokenizer.encode(text + answer, add_special_tokens=False))


def _turns_in_chat(tokenizer: Any, chat: Chat, turns: Sequence[Mapping[str, str]]) -> list[int]:
    """The token ids of turns, as lm-evaluation-harness makes them.

    A template that takes no system turn gets none, and a template that writes no token for the
    start of a text gets one if the tokenizer puts it there.
    """
    try:
        text = chat.text(tokenizer, turns)
    except InputError:
        if turns[0]["role"] != "system" or len(turns) == 1:
            raise
        text = chat.text(tokenizer, turns[1:])
    start = tokenizer.bos_token
    return list(tokenizer.encode(text, add_special_tokens=not (start and text.startswith(start))))


def _check_length(model: "LoadedModel", task: Task, sample: Sample, prompt: Sequence[int]) -> None:
    needed = len(prompt) + sample.max_new_tokens
    if needed > model.max_context:
        raise InputError(
            f"sample {sample.index} of {task.name} takes {needed} tokens with its answer, "
            f"{model.name} takes {model.max_context}; choose a shorter --context"
        )


def get_tasks(given: Sequence[str | Task]) -> list[Task]:
    """Tasks, opened where a text names them; InputError if one cannot be, or for two of a name."""
    made: dict[str, Task] = {}
    for each in given:
        try:
            task = open_task(each) if isinstance(each, str) else each
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"task '{each}' cannot be made: {one_line(error)}") from None
        if task.name in made:
            raise InputError(f"two tasks are called '{task.name}'; rename one, or run them apart")
        made[task.name] = task
    return list(made.values())
