"""Tries a method or a task against its contract, in seconds, before a sweep (`kvbench check`).

A method runs on small models with random weights in several shapes, dtypes and prefill chunks, on
every kind of device that the machine has. A task makes samples of several lengths and scores odd
predictions. The contracts are described in `docs/writing-a-method.md` and `docs/writing-a-task.md`.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.arguments import MOST_SAMPLES
from kvbench.engine.accounting import bounded_rows, chunked_rows, chunks, full_rows
from kvbench.engine.contract import WRITES
from kvbench.engine.row import Outcome, Row, policy_of
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.method import LayerView, Method
from kvbench.models.load import LoadedModel, wrap_model
from kvbench.records import BASELINE
from kvbench.spec import MethodSpec, parse_method
from kvbench.sweep.plan import check_sample, get_tasks, one_line
from kvbench.task import EpisodicTask, Sample, Task

# Layers, KV heads, query heads, head size. The last one is the embedded model's shape, so that its
# head scores fit.
SHAPES = ((2, 1, 1, 16), (3, 2, 6, 32), (2, 3, 3, 64), (4, 4, 8, 32))
DTYPES = (torch.float32, torch.bfloat16)
PREFILL_CHUNKS = (None, 40, 23)  # tokens
BUDGETS = (0.1, 0.5, 0.9, 1.0)
PROMPT, ANSWER = 97, 5  # tokens
VOCABULARY = 199

CONTEXTS = (256, 1024, 4096)  # tokens
LONG_CONTEXT = 32768  # tried if no shorter one is long enough for the task
ODD_PREDICTIONS = (
    "",
    " ",
    "\n\t\n",
    "0",
    "nan",
    "[]",
    '{"a": [1,',
    "\x00\ufffd",
    "ID: 3 > ID: 1 > ID: 3",
    "| a | b |\n|---|---|",
    "\u4f60\u597d \U0001f642",
    "word " * 2000,
)


@dataclass(frozen=True)
class Finding:
    """What came of one check: it holds, unless there are `faults`, or it was `skipped`."""

    check: str
    meaning: str  # what holds if there is no fault
    faults: tuple[str, ...] = ()
    skipped: str = ""  # why it could not be checked


class Faults:
    """Collects the faults of each check, equal ones once."""

    def __init__(self, checks: dict[str, str]) -> None:
        self.checks = checks
        self.found: dict[str, dict[str, str]] = {check: {} for check in checks}
        self.skipped: dict[str, str] = {}

    def add(self, check: str, fault: str, where: str) -> None:
        """A fault, with the setting in which it was seen."""
        self.found[check].setdefault(fault, where)

    def findings(self) -> list[Finding]:
        """The checks in order, with their faults."""
        return [
            Finding(
                check,
                meaning,
                tuple(f"{fault} ({where})" for fault, where in self.found[check].items()),
                "" if self.found[check] else self.skipped.get(check, ""),
            )
            for check, meaning in self.checks.items()
        ]


METHOD_CHECKS = {
    "answers": "scores, capacities and windows have the right shape, type and range",
    "read-only": "the method changes nothing that it is shown",
    "full": "a budget of 1 gives what full attention gives",
    "repeatable": "the same run twice keeps the same entries",
    "sharing": "a cell keeps the same alone and in a batch",
    "others": "other methods of the batch keep what they keep without it",
    "counts": "the KV footprint is that of the closed form",
}


def check_method(spec: MethodSpec) -> list[Finding]:
    """Run a method in all settings. InputError if it fits none of the shapes."""
    faults = Faults(METHOD_CHECKS)
    misfits: list[InputError] = []
    compared = 0
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    settings = [(s, d, t) for s in SHAPES for d in devices for t in DTYPES]
    for shape, device, dtype in settings:
        model = random_model(shape, device, dtype)
        try:
            spec.method.windows(model.shape, min(BUDGETS), PROMPT)
        except InputError as error:
            misfits.append(error)  # such as head scores for a model of another shape
            continue
        except Exception:
            pass  # met again below
        for chunk in PREFILL_CHUNKS if dtype is torch.float32 else PREFILL_CHUNKS[1:2]:
            compared += MethodTrial(spec, model, chunk, faults).run()
    if not compared:
        reason = "the method answers wrongly in every setting"
        faults.skipped = {check: reason for check in METHOD_CHECKS if check != "answers"}
    if len(misfits) == len(settings):
        raise misfits[0]
    return faults.findings()


def random_model(shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> LoadedModel:
    """A small model with random weights; the same ones for the same shape."""
    layers, kv_heads, query_heads, head_dim = shape
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,  # a multiple of all numbers of query heads
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=4 * PROMPT,
        initializer_range=0.3,  # attention far from uniform, so that each entry matters
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    return wrap_model(model.to(device, dtype), None, name="random")


class MethodTrial:
    """One method on one model with one prefill chunk: runs it, and notes what is wrong."""

    def __init__(
        self, spec: MethodSpec, model: LoadedModel, chunk: int | None, faults: Faults
    ) -> None:
        self.spec, self.model, self.chunk, self.faults = spec, model, chunk, faults
        # Elsewhere rounding depends on what shares a batch, and so may the best entries.
        self.exact = model.device.type == "cpu" and model.dtype is torch.float32
        shape = model.shape
        self.where = (
            f"{shape.layers} layers, {shape.kv_heads} KV heads, {shape.group} query heads each, "
            f"head size {shape.head_dim}, {str(model.dtype).removeprefix('torch.')} on "
            f"{model.device.type}, prefill chunk {chunk or 'none'}"
        )
        rng = random.Random(0)
        self.prompts = [[rng.randrange(1, VOCABULARY) for _ in range(PROMPT)] for _ in range(2)]

    def run(self) -> bool:
        """Make all checks; False after a wrong answer, when the others mean nothing."""
        rows = self.rows(self.spec)
        try:
            alone = [self.outcomes([row])[0] for row in rows]
            self.outcomes(self.rows(watched(self.spec, self.fault)))
        except Exception as error:
            text = one_line(error)
            self.fault("read-only" if WRITES in text else "answers", text)
            return False
        again = [self.outcomes([row])[0] for row in rows]
        for row, first, second in zip(rows, alone, again, strict=True):
            self.compare("repeatable", row, first, second)
        self.full(rows[-1], alone[-1])
        for row, outcome in zip(rows, alone, strict=True):
            self.counts(row, outcome)
        others = self.rows(parse_method("snapkv", {"snapkv.window": 8}))
        without = self.outcomes(others)
        together = self.outcomes([*others, *rows, *self.rows(self.spec, self.prompts[1])])
        for row, first, second in zip(others, without, together, strict=False):
            self.compare("others", row, first, second)
        for row, first, second in zip(rows, alone, together[len(others) :], strict=False):
            self.compare("sharing", row, first, second)
        return True

    def rows(self, spec: MethodSpec, prompt: list[int] | None = None) -> list[Row]:
        """A row for each budget, whose answer is long enough for an eviction while decoding."""
        answer = ANSWER
        if spec.scorer is not None:
            answer += min(spec.interval, PROMPT)
        return [Row(prompt or self.prompts[0], answer, spec, budget, 1) for budget in BUDGETS]

    def outcomes(self, rows: Sequence[Row]) -> list[Outcome]:
        """Run rows together."""
        return run_rows(self.model, rows, prefill_chunk=self.chunk, keep_positions=True)

    def fault(self, check: str, text: str) -> None:
        """Note a fault."""
        self.faults.add(check, text, self.where)

    def compare(self, check: str, row: Row, first: Outcome, second: Outcome) -> None:
        """A fault if two outcomes of a row differ."""
        at = f"method '{row.spec.name}' at budget {row.budget:g}"
        if first.resident_rows != second.resident_rows:
            counts = f"{first.resident_rows} and {second.resident_rows}"
            self.fault(check, f"{at}: {counts} resident entry-rows; expected equal ones")
        elif self.exact and (first.kept, first.tokens) != (second.kept, second.tokens):
            what = "entries are kept" if first.kept != second.kept else "tokens are generated"
            self.fault(check, f"{at}: other {what}; expected the same")

    def full(self, row: Row, outcome: Outcome) -> None:
        """A fault if a row with a budget of 1 differs from full attention."""
        full = self.outcomes([replace(row, spec=parse_method(BASELINE, {}))])[0]
        self.compare("full", row, full, outcome)

    def counts(self, row: Row, outcome: Outcome) -> None:
        """A fault if the entry-rows are not those of the closed form, where there is one."""
        expected = closed_form(self.model, row, self.chunk, outcome)
        if expected is None:
            self.faults.skipped["counts"] = "no closed form for a method with its own capacity"
        elif outcome.resident_rows != expected:
            self.fault(
                "counts",
                f"{outcome.resident_rows} resident entry-rows at budget {row.budget:g}; expected "
                f"{expected}",
            )


def closed_form(model: LoadedModel, row: Row, chunk: int | None, outcome: Outcome) -> int | None:
    """The entry-rows of a row, over all layers and KV heads; None without a closed form."""
    policy, prompt, decoded = policy_of(model, row, chunk), len(row.prompt), row.max_new_tokens - 1
    spec, sizes = row.spec, chunks(len(row.prompt), chunk)
    total = 0
    for layer, windows in enumerate(policy.windows):
        for head, window in enumerate(windows):
            if window is not None:
                total += bounded_rows(sizes, window.sinks + window.size, decoded)
            elif not policy.evicts_by_score or spec.scorer is None:
                total += full_rows(prompt, decoded)
            elif not policy.scores_each_chunk:
                kept = len((outcome.kept or [])[layer][head])
                held = policy.held if policy.interval else kept
                read = sizes if policy.bounded else [prompt]
                total += bounded_rows(read, held, decoded, policy.interval)
            elif type(spec.scorer).capacity is Method.capacity:
                budget = spec.scorer_budget(row.budget)
                total += chunked_rows(sizes, [round(budget * size) for size in sizes], decoded)
            else:
                return None
    return total


def watched(spec: MethodSpec, fault: Callable[[str, str], None]) -> MethodSpec:
    """The same method, with what it is shown compared before and after it looks."""
    if spec.post_fill is not None:
        return replace(spec, post_fill=watching(spec.post_fill, fault))
    return replace(spec, method=watching(spec.method, fault))


def watching(method: Method, fault: Callable[[str, str], None]) -> Method:
    """A method of the same class, and a fault for each tensor of a view that it changes."""

    def watch(what: str, view: LayerView, ask: Callable[[], Any]) -> Any:
        shown = dict(tensors_of(view))
        before = {name: tensor.clone() for name, tensor in shown.items()}
        answer = ask()
        for name, tensor in shown.items():
            if not torch.equal(tensor, before[name]):
                fault("read-only", f"{what} changes view.{name}; {WRITES}")
        return answer

    def watched_answer(what: str) -> Callable[..., Any]:
        return lambda _, view, *more: watch(what, view, lambda: getattr(method, what)(view, *more))

    kind = type(method)
    asked = ("scores", "capacity", "select", "gather")
    own = [what for what in asked if getattr(kind, what) is not getattr(Method, what)]
    watcher = type(kind.__name__, (kind,), {what: watched_answer(what) for what in own})
    made: Method = object.__new__(watcher)
    vars(made).update(vars(method))
    return made


def tensors_of(view: LayerView) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a view shows, by name."""
    names = ["queries", "query_positions", "keys", "values", "positions"]
    names += [name for name in ("gathered", "replayed") if getattr(view, name) is not None]
    for name in names + (["attention"] if view.queries.shape[2] else []):
        yield name, getattr(view, name)
    pieces = [piece for block in view.blocks for piece in block]
    for index, piece in enumerate(pieces):
        for name, tensor in zip(piece._fields, piece, strict=True):
            yield f"blocks (piece {index}, {name})", tensor


TASK_CHECKS = {
    "samples": "samples have a prompt, an answer limit, and a reference that JSON can hold",
    "length": "prompt and answer fit the context",
    "repeatable": "equal arguments give equal samples",
    "different": "other indices and other seeds give other prompts",
    "subtasks": "samples take turns among the subtasks",
    "scores": "every prediction has a score from 0 to 1, and scoring changes nothing",
    "reference": "a perfect answer scores 1",
}


def check_task(
    name: str, tokenizer: Any, metric: str | None = None, max_new_tokens: int | None = None
) -> list[Finding]:
    """Make samples of the task that `open_task` opens by this name, and score predictions.

    Of a task that reads, all that it can read is checked; InputError for what is damaged.
    """
    (task,), (again,) = get_tasks([name]), get_tasks([name])
    faults = Faults(TASK_CHECKS)
    if task.reads:
        for each in (task, again):
            each.ready(MOST_SAMPLES, metric, max_new_tokens)
        read = f"its {task.size} samples are read, not made"
        faults.skipped |= dict.fromkeys(("length", "different", "subtasks"), read)
        _check_samples(task, again, tokenizer, LONG_CONTEXT, faults)
        return [*faults.findings(), *(Finding("keys", "", (), text) for text in task.remarks)]
    fitting = [context for context in CONTEXTS if _long_enough(task, tokenizer, context)]
    for context in fitting or [LONG_CONTEXT]:
        _check_samples(task, again, tokenizer, context, faults)
    if not fitting and not _long_enough(task, tokenizer, LONG_CONTEXT):
        fault = f"no sample can be made; expected some with at most {LONG_CONTEXT} tokens"
        faults.add("samples", fault, "with the embedded model's tokenizer")
    return faults.findings()


def _long_enough(task: Task, tokenizer: Any, context: int) -> bool:
    """Whether a context is long enough for the task's first sample, as the task says."""
    try:
        task.sample(0, seed=0, context=context, tokenizer=tokenizer)
    except InputError:
        return False
    except Exception:
        return True  # met again when samples are checked
    return True


def _check_samples(task: Task, again: Task, tokenizer: Any, context: int, faults: Faults) -> None:
    """Check some samples of one length; `again` is another object of the same task."""
    where = f"context of {context} tokens"

    def make(index: int, seed: int = 0, maker: Task = task) -> Sample:
        return maker.sample(index, seed=seed, context=context, tokenizer=tokenizer)

    prompts: dict[str, int] = {}
    count = max(4, 2 * len(task.subtasks))
    for index in range(count if task.size is None else min(count, task.size)):
        try:
            sample = check_sample(make(index), task, index)
            random.seed(index)  # a task must not draw from the global generator
            torch.manual_seed(index)
            twin, other = make(index, maker=again), make(index, seed=1)
            tokens = len(tokenizer.encode(sample.prompt))
        except InputError as error:
            faults.add("length", f"sample {index}: {one_line(error)}", where)
            continue
        except Exception as error:
            faults.add("samples", f"sample {index}: {one_line(error)}", where)
            continue
        if not tokens:
            faults.add("samples", f"sample {index}: its prompt is empty", where)
        if tokens + sample.max_new_tokens > context and not task.reads:
            need = f"{tokens} tokens and {sample.max_new_tokens} of its answer"
            faults.add("length", f"sample {index} has {need}; expected {context} at most", where)
        if sample != twin:
            faults.add("repeatable", f"sample {index} differs when it is made again", where)
        if not task.reads:
            _check_made(task, sample, other, prompts, faults, where)
        _check_scores(task, sample, faults, where)
        _check_reference(task, sample, faults, where)


def _check_made(
    task: Task, sample: Sample, other: Sample, prompts: dict[str, int], faults: Faults, where: str
) -> None:
    """Compare a sample with that of another seed, and with the prompts of earlier indices."""
    index = sample.index
    if sample.prompt == other.prompt:
        faults.add("different", f"sample {index} is the same with seeds 0 and 1", where)
    if sample.prompt in prompts:
        same = f"samples {prompts[sample.prompt]} and {index} are the same"
        faults.add("different", same, where)
    prompts.setdefault(sample.prompt, index)
    turn = task.subtasks[index % len(task.subtasks)] if task.subtasks else "(none)"
    if sample.subtask != turn:
        fault = f"sample {index} is of subtask '{sample.subtask}'; expected '{turn}'"
        faults.add("subtasks", fault, where)


def _check_scores(task: Task, sample: Sample, faults: Faults, where: str) -> None:
    """Score odd predictions, each twice."""
    for prediction in (*ODD_PREDICTIONS, sample.prompt):
        text = prediction if len(prediction) <= 20 else f"{prediction[:20]}..."
        before = deepcopy(sample)
        try:
            score = float(task.score(prediction, sample))
            again = float(task.score(prediction, sample))
        except Exception as error:
            faults.add("scores", f"the score of {text!r} raises {one_line(error)}", where)
            return
        if not 0 <= score <= 1:
            faults.add("scores", f"the score of {text!r} is {score}; expected 0 to 1", where)
        elif score != again:
            faults.add("scores", f"{text!r} scores {score}, then {again}; expected equal", where)
        if sample != before:
            faults.add("scores", "scoring changes the sample", where)


def _check_reference(task: Task, sample: Sample, faults: Faults, where: str) -> None:
    """Score the perfect answer, if the task can give one, or texts made of the reference."""
    try:
        if isinstance(task, EpisodicTask):
            units = task.smallest(sample.subtask) + 2
            turn = task.episode(random.Random(0), sample.subtask, units, 1).turns[0]
            score = task.score(turn.answer, replace(sample, reference=turn.reference))
            if score != 1:
                faults.add("reference", f"the perfect answer {turn.answer!r} scores {score}", where)
            return
        best = max(float(task.score(text, sample)) for text in _texts(sample.reference))
    except Exception as error:
        faults.add("reference", f"scoring the reference raises {one_line(error)}", where)
        return
    if best < 1:
        tried = " and ".join(repr(text[:40]) for text in _texts(sample.reference)[:2])
        faults.skipped["reference"] = (
            f"the reference of sample {sample.index} as text ({tried}) scores {best:g} at most; if "
            "a right answer is written otherwise, score one by hand"
        )


def _texts(reference: Any) -> list[str]:
    """A reference as a model might write it."""
    texts = [str(reference), json.dumps(reference)]
    if isinstance(reference, list):
        texts += [join.join(map(str, reference)) for join in (" ", ", ", "\n")]
    return texts
