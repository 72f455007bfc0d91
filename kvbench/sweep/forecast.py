"""What a sweep will cost on a GPU, computed from shapes before anything is loaded (docs/cost.md).

It follows the walk of a run: the batches that fit in memory, the streams that cells of a prompt
share, prefill chunks, the entries held at each budget, and decoding to the answer's limit. A small
roofline model turns operations and bytes into seconds; `benchmarks/plan.py` compares it with what
an H100 took.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import yaml

from kvbench.engine.accounting import chunks, entry_rows
from kvbench.engine.cache import Visible
from kvbench.engine.policy import EvictionPolicy
from kvbench.errors import InputError, did_you_mean
from kvbench.heads import LearntHeads, equal_scores
from kvbench.method import Limit, Pages, Window
from kvbench.models.load import LoadedModel
from kvbench.models.shapes import parameters
from kvbench.registry import methods
from kvbench.spec import MethodSpec, labels_of
from kvbench.sweep.command import Choices, choose_methods
from kvbench.sweep.cost import cost_of_policies
from kvbench.sweep.plan import Cell, Settings, variants
from kvbench.sweep.runner import MEMORY_SHARE, MOST_ROWS, batches
from kvbench.task import Sample, Task

GPUS = Path(__file__).parent / "gpus.yaml"

# Shares of a GPU's peaks that a run reaches, and seconds that a layer of a forward costs beside its
# operations and bytes; all from results/benchmarks/gpu_shapes.txt (docs/cost.md).
PRODUCTS, ATTENTION, BANDWIDTH, LAYER_SECONDS = 0.47, 0.56, 0.9, 0.00015
ANSWER = 128  # tokens, where nothing says how long an answer is


@dataclass(frozen=True)
class Gpu:
    """A GPU's peaks, from its data sheet."""

    name: str
    flops: float  # dense products in bfloat16, FLOP/s
    bandwidth: float  # bytes/s
    memory: float  # GiB
    source: str


@dataclass(frozen=True)
class Workload:
    """The samples of a data set, all of the same length; an upper bound where lengths differ."""

    task: str
    data_set: str
    samples: int
    prompt: int  # tokens
    answer: int  # tokens


class Rough:
    """A tokenizer for lengths: a token is two bytes, since most models have longer ones."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """As many tokens as a model may need for the text."""
        return [0] * (len(text.encode(errors="replace")) // 2)


@dataclass
class Work:
    """What cells cost together."""

    cells: float = 0
    tokens: float = 0  # that go through the model
    flops: float = 0
    bytes_moved: float = 0  # weights, keys and values that are read from the GPU's memory
    seconds: float = 0

    def add(self, other: "Work", times: float = 1) -> None:
        """Add `times` the work of another."""
        for each in fields(Work):
            more = times * getattr(other, each.name)
            setattr(self, each.name, getattr(self, each.name) + more)


@dataclass
class Line(Work):
    """The cost of one method on one task."""

    task: str = ""
    method: str = ""
    kv_bytes_peak: int = 0  # of one cell alone
    bytes_needed: int = 0  # beside the weights, by the largest batch
    left_out: float = 0  # cells that do not fit in memory


@dataclass(frozen=True)
class Forecast:
    """The cost of a sweep."""

    gpu: Gpu
    model: str
    weights: int  # bytes
    free: int  # bytes beside the weights that a run may take; below 0 if the weights do not fit
    workloads: Sequence[Workload]
    lines: Sequence[Line]

    @property
    def total(self) -> Work:
        """The sum over all that fits."""
        total = Work()
        for line in self.lines:
            total.add(line)
        return total


@dataclass(frozen=True)
class PlannedCell(Cell):
    """A cell without its prompt."""

    policy: EvictionPolicy = None  # type: ignore[assignment]  # fields before it have defaults


class Heads(NamedTuple):
    """KV heads that hold and read alike."""

    size: int  # numbers in a key and a value
    group: int  # query heads that share one
    readers: int  # layers that read one
    limit: Limit | None
    window: Window | None
    pages: Pages | None


class Pass(NamedTuple):
    """One prefill chunk, or one decoding step, of a row that runs alone."""

    tokens: int
    attention: float  # operations
    read: float  # bytes of keys and values
    peak: float  # bytes of keys and values that are held


@dataclass(frozen=True)
class Roofline:
    """Seconds of operations and bytes, for one model on one GPU."""

    gpu: Gpu
    layers: int
    body: int  # parameters that every token goes through
    output: int  # parameters of the output, for each token that is generated
    itemsize: int

    def forward(self, parts: Sequence[Pass], generated: int) -> Work:
        """One forward of all `parts`, of which `generated` tokens are generated."""
        tokens = sum(part.tokens for part in parts)
        products = 2.0 * (self.body * tokens + self.output * generated)
        attention = sum(part.attention for part in parts)
        moved = (self.body + self.output) * self.itemsize + sum(part.read for part in parts)
        busy = (products / PRODUCTS + attention / ATTENTION) / self.gpu.flops
        seconds = max(busy, moved / (BANDWIDTH * self.gpu.bandwidth))
        seconds += LAYER_SECONDS * self.layers
        return Work(0, tokens, products + attention, moved, seconds)


def roofline_of(model: LoadedModel, gpu: Gpu) -> Roofline:
    """The roofline of a model, loaded or without weights."""
    _, body, output = parameters(model)
    return Roofline(gpu, len(model.layers), body, output, model.dtype.itemsize)


def read_gpu(name: str) -> Gpu:
    """The GPU called `name` in gpus.yaml; InputError if there is none."""
    known = yaml.safe_load(GPUS.read_text(encoding="utf-8"))
    if name not in known:
        raise InputError(f"unknown GPU '{name}': {did_you_mean(name, known)}")
    return Gpu(**known[name])


def workloads_of(tasks: Sequence[Task], samples: int, context: int, limit: int) -> list[Workload]:
    """What a sweep measures of tasks that are ready, for each seed, by subtask.

    Samples that are made fill the `context`. Those that are read have at most `limit` tokens, and
    each counts like the longest of its subtask. One that cannot be made without the model's
    tokenizer fills its context with an answer of `ANSWER` tokens.
    """
    loads: dict[tuple[str, str], Workload] = {}
    for task in tasks:
        most = limit if task.reads else context
        count = samples if task.size is None else task.size
        kinds = count if task.reads else min(count, len(task.subtasks))  # take turns
        for index in range(kinds):
            name = task.subtasks[index % len(task.subtasks)]
            try:
                sample = task.sample(index, seed=0, context=most, tokenizer=Rough())
                name, answer = sample.subtask, min(sample.max_new_tokens, most - 1)
                size = len(Rough().encode(sample.prompt)) if task.reads else most
            except (Exception, SystemExit):
                answer, size = min(ANSWER, most - 1), most
            known = loads.get((task.name, name), Workload(task.name, name, 0, 1, 1))
            loads[task.name, name] = Workload(
                task.name,
                name,
                known.samples + len(range(index, count, kinds)),
                max(known.prompt, min(size, most - answer)),
                max(known.answer, answer),
            )
    return list(loads.values())


def forecast(
    choices: Choices, model: LoadedModel, gpu: Gpu, workloads: Sequence[Workload]
) -> Forecast:
    """The cost of measuring `choices` on `workloads`, without cells that do not fit in memory.

    Answers are as long as their limit. Each seed counts as samples of its own, as it is where tasks
    make their samples; where tasks read them, seeds share prefills and cost less. Head scores that
    are not given are taken as known, since only the number of retrieval heads matters. Raises
    InputError for methods that cannot be measured.
    """
    weights = parameters(model)[0] * model.dtype.itemsize
    free = round(MEMORY_SHARE * (gpu.memory * 2**30 - weights))
    specs, roofline = specs_of(choices, model), roofline_of(model, gpu)
    labels = dict(zip(map(id, specs), labels_of(specs), strict=True))
    lines: dict[tuple[str, str], Line] = {}

    def needed(batch: Sequence[PlannedCell]) -> int:
        groups = [[cell.policy for cell in cells] for cells in by_sample(batch)]
        return cost_of_policies(model, groups, batch[-1].policy.prefill_chunk).bytes

    alike: dict[tuple[str, int, int], list[Workload]] = {}
    for load in workloads:
        alike.setdefault((load.task, load.prompt, load.answer), []).append(load)
    for loads in alike.values():
        drawn = len(choices.seeds) * sum(each.samples for each in loads)
        load = replace(loads[0], samples=drawn)
        cells, samples = cells_of(choices, model, specs, load)
        default = choices.prefill_chunk[0] if choices.prefill_chunk else load.prompt
        for batch in batches(cells, default, needed, max(free, 1), choices.batch_rows):
            size, times = needed(batch), load.samples / samples
            works = work_of(model, roofline, batch) if size <= free else [None] * len(batch)
            for cell, work in zip(batch, works, strict=True):
                key = load.task, labels[id(cell.spec)]
                line = lines.setdefault(key, Line(task=load.task, method=key[1]))
                if work is None:
                    line.left_out += times
                else:
                    line.add(work, times)
                line.bytes_needed = max(line.bytes_needed, size)
                if not cell.sample.index:
                    line.kv_bytes_peak = max(line.kv_bytes_peak, kv_peak(model, cell.policy))
    return Forecast(gpu, model.name, weights, free, workloads, list(lines.values()))


def specs_of(choices: Choices, model: LoadedModel) -> list[MethodSpec]:
    """The methods of a sweep; learnt heads without scores get equal ones."""
    names = {part for name in choices.method or () for part in name.split("+")}
    learnt = [n for n in names & set(methods.names()) if issubclass(methods.get(n), LearntHeads)]
    with tempfile.TemporaryDirectory() as folder:
        file = equal_scores(Path(folder), model.shape)
        options = dict(choices.option)
        for name in learnt:
            if "scores" not in model.card.options.get(name, {}):
                options.setdefault(f"{name}.scores", str(file))
        return choose_methods(replace(choices, option=options), model.card)[0]


def cells_of(
    choices: Choices, model: LoadedModel, specs: Sequence[MethodSpec], load: Workload
) -> tuple[list[PlannedCell], int]:
    """The cells of as many samples as a batch may hold, and the number of these samples."""
    sizes = choices.prefill_chunk or (load.prompt,)
    settings = Settings(0, 0, 1, sizes, choices.budgets, False)
    each = [(spec, *how) for spec in specs for how in variants(spec, settings)]
    samples = min(load.samples, max(1, MOST_ROWS // len(each)))
    sample = Sample(load.task, load.data_set, 0, "", None, load.answer)

    def cell(index: int, spec: MethodSpec, budget: float, chunk: int | None) -> PlannedCell:
        shapes = model.shape, load.prompt, load.answer - 1, 0, chunk or sizes[0], model.layers
        policy = EvictionPolicy(spec, budget, *shapes)
        given = replace(sample, index=index)
        return PlannedCell("", given, [], spec, budget, chunk, 0, policy=policy)

    return [cell(index, *how) for index in range(samples) for how in each], samples


def by_sample(batch: Sequence[PlannedCell]) -> list[list[PlannedCell]]:
    """The cells of a batch, grouped by sample."""
    groups: dict[int, list[PlannedCell]] = {}
    for cell in batch:
        groups.setdefault(cell.sample.index, []).append(cell)
    return list(groups.values())


def work_of(
    model: LoadedModel, roofline: Roofline, batch: Sequence[PlannedCell]
) -> list[Work | None]:
    """What each cell of a batch costs: an equal share of each forward that it takes part in.

    As in `kvbench.engine.prefill`: cells of a prompt read the first chunk together (those with
    patched tokens by themselves), and those that keep the whole prompt also the other chunks.
    """
    works = {id(cell): Work(1) for cell in batch}
    for cells in by_sample(batch):
        shared: dict[tuple[int, object], list[PlannedCell]] = {}  # by chunk and stream
        for cell in cells:
            whole = cell.policy.keeps_whole_prompt and not cell.policy.evicts_late
            for number, chunk in enumerate(cell.policy.chunks):
                stream = chunk.patched if number == 0 else "whole" if whole else id(cell)
                shared.setdefault((number, stream), []).append(cell)
        parts = {id(cell): list(passes(model, cell.policy)) for cell in cells}
        for (number, _), members in shared.items():
            work = roofline.forward([parts[id(members[0])][number]], 1)
            for cell in members:
                works[id(cell)].add(work, 1 / len(members))
    step = roofline.forward([decoding(model, cell.policy) for cell in batch], len(batch))
    for cell in batch:
        works[id(cell)].add(step, cell.policy.decoded / len(batch))
    return [works[id(cell)] for cell in batch]


def passes(model: LoadedModel, policy: EvictionPolicy) -> Iterator[Pass]:
    """The prefill chunks of a row that runs alone."""
    heads = heads_of(model, policy)
    own = [layer for index, layer in enumerate(model.layers) if layer.source == index]
    layer_entry = max(layer.kv_heads * (layer.key_size + layer.value_size) for layer in own)
    for chunk in policy.chunks:
        attention = read = before = after = 0.0
        for kind, count in heads.items():
            past = held(policy, kind.window, chunk.start)
            rows = entry_rows(past, chunk.tokens)
            if kind.limit is not None and isinstance(kind.window, Visible):
                rows = min(rows, chunk.tokens * kind.limit.size)
            attention += operations(kind, count) * rows
            entry = count * kind.size * model.dtype.itemsize
            read += entry * kind.readers * (past + chunk.tokens)
            before += entry * past
            after += entry * held(policy, kind.window, chunk.start + chunk.length)
        # Layers evict one after the other, and each holds the whole chunk until it does.
        most = max(before, after + (before - after) / len(own))
        most += layer_entry * model.dtype.itemsize * chunk.tokens
        yield Pass(chunk.tokens, attention, read, max(most, after))


def decoding(model: LoadedModel, policy: EvictionPolicy) -> Pass:
    """A decoding step in the middle of the answer; its peak is that of the last one."""
    attention = read = peak = 0.0
    for kind, count in heads_of(model, policy).items():
        kept = held(policy, kind.window, policy.prompt)
        grown = policy.interval or (0 if kind.window else policy.decoded)
        entries = kept + grown / 2
        entry = count * kind.size * model.dtype.itemsize
        peak += entry * (kept + grown)
        if kind.pages is not None:  # pages that are read, and a bound of each, as large as an entry
            pages = kind.pages.read(round(entries))
            entries = min(entries, pages * kind.pages.size) + entries / kind.pages.size
        attention += operations(kind, count) * entries
        read += entry * kind.readers * entries
    return Pass(1, attention, read, peak)


def kv_peak(model: LoadedModel, policy: EvictionPolicy) -> int:
    """Most bytes of keys and values that a row holds, temporary copies of a chunk included."""
    reading = max(part.peak for part in passes(model, policy))
    return round(max(reading, decoding(model, policy).peak))


def heads_of(model: LoadedModel, policy: EvictionPolicy) -> Counter[Heads]:
    """How many KV heads of each kind a model has under a policy."""
    return Counter(
        Heads(
            layer.key_size + layer.value_size,
            layer.group,
            len(layer.readers),
            layer.limit,
            window,
            policy.pages[index],
        )
        for index, layer in enumerate(model.layers)
        for window in policy.windows[index]
    )


def operations(kind: Heads, count: int) -> float:
    """Operations of attention for each entry that a token attends to."""
    return 2.0 * count * kind.readers * kind.group * kind.size


def held(policy: EvictionPolicy, window: Window | None, read: int) -> int:
    """Entries that a KV head holds when `read` tokens of the prompt are read and evicted from.

    The mean where layers or heads share a budget unevenly.
    """
    if window is not None:
        return min(read, window.sinks + window.size)
    if not policy.evicts_by_score:
        return read
    share = policy.spec.scorer_budget(policy.budget)
    if policy.scores_each_chunk:
        return sum(round(share * part) for part in chunks(read, policy.prefill_chunk) if part)
    if policy.scores_once and read < policy.prompt:
        return read
    return min(read, policy.held if policy.interval else round(share * policy.prompt))
