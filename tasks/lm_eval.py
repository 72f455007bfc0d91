"""Generation tasks of lm-evaluation-harness, a user's own YAML included: `docs/lm-eval.md`.

lm-eval makes the prompts, says what ends an answer, filters answers and scores them; kvbench runs
the model. Nothing of lm-eval is imported before a user names one of its tasks.
"""

import hashlib
import json
import logging
import os
import random
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from kvbench.errors import InputError
from kvbench.registry import register_task_source
from kvbench.task import Sample, Task, Tokenizer

PREFIX = "lm-eval"
ALLOWED = "HF_ALLOW_CODE_EVAL"  # the variable that the library `evaluate` reads
RANDOM, NUMPY, SHOTS = 0, 1234, 1234  # seeds: the defaults of `lm_eval`
ANSWER = 256  # tokens where a task does not say, as for lm-eval's `hf` models
RULER = tuple(4096 * 2**power for power in range(6))  # lengths in tokens
GREEDY = {"do_sample", "temperature", "top_p", "top_k", "until", "max_gen_toks"}  # understood


@register_task_source(PREFIX)
def open_lm_eval(rest: str) -> Task:
    """A generation task, group or tag of lm-evaluation-harness: lm-eval:NAME, lm-eval:FOLDER/NAME.

    After a name, :METRIC or :METRIC:FILTER chooses among several; without, the first is taken.
    InputError if lm-eval is not installed, or has no such task.
    """
    where, *choice = rest.split(":")
    folder, _, name = where.rpartition("/")
    if not name or len(choice) > 2 or not all(choice):
        raise InputError(
            f"'{PREFIX}:{rest}' is not {PREFIX}:NAME, {PREFIX}:FOLDER/NAME, or one of these with "
            ":METRIC or :METRIC:FILTER after it"
        )
    return LmEvalTask(name, Path(folder) if folder else None, *choice)


class LmEvalTask(Task):
    """Documents of a test split, in order, as `lm_eval --limit N` takes them.

    The tasks of a group are its subtasks. They are loaded with the first sample, because some make
    their prompts with the model's tokenizer.
    """

    def __init__(self, name: str, folder: Path | None, metric: str = "", filter: str = "") -> None:
        self.name = ":".join(part for part in (name, metric, filter) if part)
        self.metric, self.subtasks = f"{PREFIX} {metric}".strip(), (name,)
        self.wanted, self.folder, self.choice = name, folder, (metric, filter)
        self.length, self.parts = 0, list[Part]()  # tokens that the parts are loaded for
        self.metadata: dict[str, Any] = {"tokenizer": "none yet"}  # as of `lm_eval --metadata`
        self.manager = task_manager(name, folder, self.metadata)

    def fingerprint(self) -> str:
        """A hash of lm-eval's version, and of the YAML and Python files of the user's folder."""
        found = hashlib.sha256(version("lm_eval").encode())
        for path in sorted(self.folder.rglob("*")) if self.folder else ():
            if path.is_file() and path.suffix in (".py", ".yaml", ".yml", ""):
                found.update(path.name.encode() + path.read_bytes())
        return found.hexdigest()[:20]

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """Document `index // n` of subtask `index % n`, whatever the seed.

        InputError if the task cannot be run, if it has no such document, or if the prompt is too
        long.
        """
        length = max((fits for fits in RULER if fits <= context), default=context)
        if length != self.length:
            self.load(length, tokenizer)
        part, number = self.place(index)
        held = part.sample(number, tokenizer)
        tokens = len(tokenizer.encode(held["prompt"])) + held["max_new_tokens"]
        if tokens > context:
            part.refuse(
                f"takes {tokens} tokens for document {number} and its answer, more than {context}; "
                f"choose --context {tokens} or more"
            )
        return Sample(self.name, part.name, index, chat=False, **held)

    def score(self, prediction: str, sample: Sample) -> float:
        """What lm-eval's filter and metric make of an answer."""
        part, number = self.place(sample.index)
        return part.score(prediction, number, sample.prompt)

    def place(self, index: int) -> "tuple[Part, int]":
        """The subtask of a sample, and its number there."""
        return self.parts[index % len(self.parts)], index // len(self.parts)

    def load(self, length: int, tokenizer: Any) -> None:
        """Load the tasks that were named; RULER's make prompts of `length` tokens."""
        import numpy as np
        from transformers import AutoTokenizer

        name = getattr(tokenizer, "name_or_path", "") or f"tokenizer {id(tokenizer)}"
        self.metadata |= {"tokenizer": name, "pretrained": name}
        if self.folder is None:
            self.metadata["max_seq_lengths"] = [length]
        random.seed(RANDOM)
        np.random.seed(NUMPY)
        try:
            # Tasks that count tokens get the tokenizer that kvbench has loaded: lm-eval would load
            # it with the code that comes with a model.
            with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
                found = self.manager.load([self.wanted])["tasks"]
            self.parts = [Part(name, task, *self.choice) for name, task in found.items()]
        except InputError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InputError(f"lm-eval task '{self.wanted}' cannot be loaded: {reason}") from None
        self.length, self.subtasks = length, tuple(part.name for part in self.parts)
        self.metric = f"{PREFIX} {self.parts[0].metrics[0]}"


class Part:
    """One task of lm-eval.

    InputError if it is of another kind, or if its metrics are not a mean over samples.
    """

    def __init__(self, name: str, task: Any, metric: str, filter: str) -> None:
        self.name, self.task, self.choice = name, task, metric
        if task.OUTPUT_TYPE != "generate_until":
            self.refuse(f"is of the kind {task.OUTPUT_TYPE}; kvbench runs generate_until tasks")
        if getattr(task, "MULTIMODAL", False):
            self.refuse("shows images or plays sound; kvbench runs tasks of text")
        if getattr(task, "UNSAFE_CODE", False) and os.environ.get(ALLOWED) != "1":
            self.refuse(f"is marked unsafe: it may run what a model writes; {ALLOWED}=1 allows it")
        means, better = task.aggregation(), task.higher_is_better()
        if metric and metric not in means:
            self.refuse(f"has no metric '{metric}'; it has {', '.join(means)}")
        asked = [metric] if metric else list(means)
        self.metrics = [each for each in asked if better.get(each) is not False]
        self.metrics = [each for each in self.metrics if is_mean(means[each])]
        if not self.metrics:
            self.refuse(
                f"has no score for each sample: {', '.join(asked)} is none, or less is better"
            )
        self.filters = {each.name: each for each in task._filters}
        self.filter = filter or next(iter(self.filters))
        if self.filter not in self.filters:
            self.refuse(f"has no filter '{filter}'; it has {', '.join(self.filters)}")
        task.set_fewshot_seed(seed=SHOTS)
        self.docs = task.eval_docs
        self.prompts: list[tuple[str, Any]] = []

    def refuse(self, why: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"lm-eval task '{self.name}' {why}")

    def sample(self, number: int, tokenizer: Any) -> dict[str, Any]:
        """What a Sample of document `number` holds."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        if number >= len(self.docs):
            self.refuse(f"has {len(self.docs)} documents; choose fewer --samples")
        while len(self.prompts) <= number:  # in order, since demonstrations are drawn one by one
            self.prompts.append(self.prompt(self.docs[len(self.prompts)]))
        doc, (text, turns) = self.docs[number], self.prompts[number]
        request = self.request(doc, number, text)
        how = normalize_gen_kwargs(request.args[1], ANSWER)
        strange = [key for key in how if key not in GREEDY and (key, how[key]) != ("num_beams", 1)]
        if how["do_sample"] or strange:
            keys = ", ".join(strange or ["do_sample"])
            self.refuse(f"sets {keys} in generation_kwargs; kvbench decodes greedily")
        stop = handle_stop_sequences(how["until"], getattr(tokenizer, "eos_token", None))
        known = json.dumps(doc, sort_keys=True, default=str).encode()
        return {
            "prompt": request.args[0],
            "reference": json.loads(json.dumps(self.task.doc_to_target(doc), default=str)),
            "max_new_tokens": how["max_gen_toks"],
            "stop": tuple(stop),
            "metadata": {"turns": turns, "document": hashlib.sha256(known).hexdigest()[:20]},
        }

    def prompt(self, doc: Any) -> tuple[str, Any]:
        """The prompt of the next document, as text and as the turns of a chat."""
        task = self.task
        draws = getattr(getattr(task, "sampler", None), "rnd", None) or task.fewshot_rnd
        shots, before = task.config.num_fewshot or 0, draws.getstate()
        given = {"num_fewshot": shots, "gen_prefix": task.doc_to_prefix(doc)}
        text = task.fewshot_context(doc, **given)
        draws.setstate(before)  # both have the same demonstrations
        chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
        turns = task.fewshot_context(doc, chat_template=lambda turns, **_: turns, **chat, **given)
        return text, turns

    def request(self, doc: Any, number: int, prompt: str) -> Any:
        """What lm-eval would ask a model."""
        about = self.name, number, self.task.config.repeats
        how = {"apply_chat_template": False, "chat_template": None}
        request = self.task.construct_requests(doc=doc, ctx=prompt, metadata=about, **how)
        requests = request if isinstance(request, list) else [request]
        if [each.request_type for each in requests] != ["generate_until"]:
            self.refuse("asks more than one thing about a document; kvbench asks one")
        return requests[0]

    def score(self, prediction: str, number: int, prompt: str) -> float:
        """The score of an answer to document `number`."""
        doc = self.docs[number]
        request = self.request(doc, number, prompt)
        request.resps = [prediction] * (request.repeats or 1)
        self.filters[self.filter].apply([request])
        found: Mapping[str, Any] = self.task.process_results(
            doc, [request.filtered_resps[self.filter]]
        )
        # RULER's tasks give -1 for the lengths that a prompt does not have.
        names = self.metrics if self.choice else [*self.metrics, *found]
        return float(next(found[name] for name in names if found.get(name, -1) != -1))


def is_mean(aggregation: Callable[[Any], Any]) -> bool:
    """Whether lm-eval makes the score of a task as a mean of numbers, one of each sample."""
    try:
        return abs(float(aggregation([0.0, 1.0, 1.0])) - 2 / 3) < 1e-9
    except Exception:  # it wants texts, or pairs
        return False


def task_manager(name: str, folder: Path | None, metadata: dict[str, Any]) -> Any:
    """lm-eval's list of tasks, with `name` in it; those of a user's folder come first."""
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"tasks of lm-eval need a package ({error}): pip install 'kvbench[lm-eval]'"
        ) from None
    if folder is not None and not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder with YAML files of lm-eval tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    known: list[str] = []
    for built_in in (False, True) if folder else (True,):  # reading the built-in ones takes a while
        manager = TaskManager(include_path=folder, include_defaults=built_in, metadata=metadata)
        known = manager.all_tasks
        if name in manager.all_subtasks or (built_in and name in known):
            return manager
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "'lm_eval ls tasks' shows them"
    raise InputError(f"lm-eval has no task '{name}': {hint}")
