"""Generation tasks of lm-evaluation-harness, a user's own YAML included: `docs/lm-eval.md`.

lm-eval makes the prompts, says what ends an answer, filters answers and scores them; kvbench runs
the model. Nothing of lm-eval is imported before a user names one of its tasks.
"""

import hashlib
import json
import logging
import os
import random
import re
from collections.abc import Callable, Iterable
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

    The tasks of a group are its subtasks: they take turns, and end one after the other.
    """

    default = False
    reads = True

    def __init__(self, name: str, folder: Path | None, metric: str = "", filter: str = "") -> None:
        self.name = ":".join(part for part in (name, metric, filter) if part)
        self.metric, self.subtasks = f"{PREFIX} {metric}".strip(), (name,)
        self.source = f"{PREFIX}:{folder or ''}{'/' * bool(folder)}{self.name}"
        self.wanted, self.folder, self.choice = name, folder, (metric, filter)
        self.metadata: dict[str, Any] = {"": ""}  # as of `lm_eval --metadata`; lm-eval holds it too
        self.manager = task_manager(name, folder, self.metadata)
        self.order: list[tuple[Part, int]] = []  # of each sample, its task and its document
        self.length: int | None = None  # tokens that prompts were made for, where a task makes them

    def ready(self, count: int, metric: str | None, max_new_tokens: int | None) -> None:
        """Load the tasks, unless they need the model's tokenizer to make prompts."""
        for given, how in (
            (metric, f"--metric {metric}: choose one with {PREFIX}:NAME:METRIC"),
            (max_new_tokens, "--max-new-tokens: set max_gen_toks in generation_kwargs of its YAML"),
        ):
            if given is not None:
                raise InputError(f"lm-eval task '{self.wanted}' does not heed {how}")
        self.size = count
        try:
            self.load({})
        except InputError:
            raise
        except Exception:  # `sample` tries again, with the tokenizer
            return
        self.size = min(count, len(self.order))

    def fingerprint(self) -> str:
        """lm-eval's version, the YAML and Python files of the user's folder, and the documents."""
        found = hashlib.sha256(version("lm_eval").encode())
        for path in sorted(self.folder.rglob("*")) if self.folder else ():
            if path.is_file() and re.search(r"\.py$|ya?ml", path.name):
                found.update(path.name.encode() + path.read_bytes())
        for part, number in self.order if self.length is None else ():
            found.update(json.dumps(part.docs[number], sort_keys=True, default=str).encode())
        return found.hexdigest()[:20]

    def place(self, index: int) -> str:
        """The task and the document of a sample."""
        part, number = self.order[index] if index < len(self.order) else (self, index)
        return f"document {number} of lm-eval task '{part.name}'"

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """Sample `index`, whatever the seed; RULER's fit the largest of its lengths in `context`.

        InputError if the task cannot be run, or has no such document.
        """
        length = max((fits for fits in RULER if fits <= context), default=context)
        if not self.order or self.length not in (None, length):
            name = getattr(tokenizer, "name_or_path", "") or f"tokenizer {id(tokenizer)}"
            made_for = {} if self.folder else {"max_seq_lengths": [length]}
            try:
                self.load({"tokenizer": name, "pretrained": name, **made_for}, tokenizer)
            except InputError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise InputError(f"lm-eval cannot load '{self.wanted}': {reason}") from None
            self.length = length
        if index >= len(self.order):
            raise InputError(
                f"'{self.name}' has {len(self.order)} documents; choose less --samples"
            )
        part, number = self.order[index]
        return Sample(self.name, part.name, index, chat=False, **part.sample(number, tokenizer))

    def score(self, prediction: str, sample: Sample) -> float:
        """What lm-eval's filter and metric make of an answer."""
        part, number = self.order[sample.index]
        return part.score(prediction, number)

    def load(self, metadata: dict[str, Any], tokenizer: Any = None) -> None:
        """Load the tasks that were named."""
        import numpy as np
        from transformers import AutoTokenizer

        self.metadata.clear()
        self.metadata |= metadata
        random.seed(RANDOM)
        np.random.seed(NUMPY)
        # Tasks that count tokens get the tokenizer that kvbench has loaded: lm-eval would load it
        # with the code that comes with a model.
        with mock.patch.object(AutoTokenizer, "from_pretrained", return_value=tokenizer):
            found = self.manager.load([self.wanted])["tasks"]
        check_single(self.folder, found)
        parts = [Part(name, task, *self.choice) for name, task in found.items()]
        self.subtasks = tuple(part.name for part in parts)
        self.metric = f"{PREFIX} {parts[0].metrics[0]}"
        most = max(len(part.docs) for part in parts)
        turns = ((part, number) for number in range(most) for part in parts)
        self.order = [(part, number) for part, number in turns if number < len(part.docs)]


class Part:
    """One task of lm-eval.

    InputError if it is of another kind, or if none of its metrics is a mean over samples.
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
        known = getattr(task, "_metric_fn_list", {}) if task.config.process_results is None else {}
        if unknown := [str(each) for each, function in known.items() if function is None]:
            self.refuse(f"has metrics that lm-eval does not have: {', '.join(unknown)}")
        asked = [metric] if metric else list(means)
        rising = [each for each in asked if better.get(each) is not False]
        self.metrics = [each for each in rising if is_mean(means[each])]
        if not self.metrics:
            names = ", ".join(asked)
            self.refuse(f"has no score for each sample: {names} is none, or less is better")
        self.filters = {each.name: each for each in task._filters}
        self.filter = filter or next(iter(self.filters))
        if self.filter not in self.filters:
            self.refuse(f"has no filter '{filter}'; it has {', '.join(self.filters)}")
        self.docs = task.eval_docs
        task.set_fewshot_seed(seed=SHOTS)
        self.draws = getattr(getattr(task, "sampler", None), "rnd", None) or task.fewshot_rnd
        self.states = [self.draws.getstate()]  # before each document's demonstrations are drawn

    def refuse(self, why: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"lm-eval task '{self.name}' {why}")

    def sample(self, number: int, tokenizer: Any) -> dict[str, Any]:
        """What a Sample of document `number` holds."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        prompt, given = self.request(number, self.context(number)).args[:2]
        how = normalize_gen_kwargs(given, ANSWER)
        strange = [key for key in how if key not in GREEDY and (key, how[key]) != ("num_beams", 1)]
        if how["do_sample"] or strange:
            keys = ", ".join(strange or ["do_sample"])
            self.refuse(f"sets {keys} in generation_kwargs; kvbench decodes greedily")
        chat = {"apply_chat_template": True, "fewshot_as_multiturn": True}
        turns = self.context(number, chat_template=lambda turns, **_: turns, **chat)
        target = self.task.doc_to_target(self.docs[number])
        return {
            "prompt": prompt,
            "reference": json.loads(json.dumps(target, default=str)),
            "max_new_tokens": how["max_gen_toks"],
            "stop": tuple(handle_stop_sequences(how["until"], tokenizer.eos_token)),
            "metadata": {"turns": turns},
        }

    def context(self, number: int, **chat: Any) -> Any:
        """The prompt of document `number`; its turns, if lm-eval is told to make a chat."""
        shots = self.task.config.num_fewshot or 0
        while shots and len(self.states) <= number:  # lm-eval draws for one document after another
            self.context(len(self.states) - 1)
        self.draws.setstate(self.states[number if shots else 0])
        doc = self.docs[number]
        chat["gen_prefix"] = self.task.doc_to_prefix(doc)
        made = self.task.fewshot_context(doc, num_fewshot=shots, **chat)
        if len(self.states) == number + 1:
            self.states.append(self.draws.getstate())
        return made

    def request(self, number: int, prompt: str) -> Any:
        """What lm-eval would ask a model."""
        how = {"metadata": (self.name, number, self.task.config.repeats), "chat_template": None}
        made = self.task.construct_requests(
            doc=self.docs[number], ctx=prompt, apply_chat_template=False, **how
        )
        requests = made if isinstance(made, list) else [made]
        if [each.request_type for each in requests] != ["generate_until"]:
            self.refuse("asks several things about a document; kvbench asks one")
        return requests[0]

    def score(self, prediction: str, number: int) -> float:
        """The score of an answer to document `number`."""
        request = self.request(number, "")
        request.resps = [prediction] * (request.repeats or 1)
        self.filters[self.filter].apply([request])
        answer = request.filtered_resps[self.filter]
        found: dict[str, Any] = self.task.process_results(self.docs[number], [answer])
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
        raise InputError(f"{error}; for lm-eval's tasks: pip install 'kvbench[lm-eval]'") from None
    if folder is not None and not folder.is_dir():
        raise InputError(f"'{folder}' is not a folder with YAML files of lm-eval tasks")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for built_in in (False, True) if folder else (True,):  # reading the built-in ones takes a while
        manager = TaskManager(include_path=folder, include_defaults=built_in, metadata=metadata)
        if name in manager.all_subtasks or (built_in and name in manager.all_tasks):
            return manager
        if folder and not built_in and name not in manager.all_tasks:
            for path, reason in names_in(folder)[1].items():
                raise InputError(f"lm-eval cannot read '{path}': {reason}")
    near = get_close_matches(name, manager.all_tasks, n=1)
    hint = f"did you mean '{near[0]}'?" if near else "'lm_eval ls tasks' shows them"
    raise InputError(f"lm-eval has no task '{name}': {hint}")


def names_in(folder: Path) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """The tasks of a folder, each with its YAML files; and the files that lm-eval cannot read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    names: dict[str, list[Path]] = {}
    damaged = {}
    for path in sorted(folder.rglob("*.yaml")):
        try:
            name = load_yaml(path, resolve_func=False, recursive=True).get("task")
        except Exception as error:
            damaged[path] = " ".join(str(error).split())[:300] or type(error).__name__
            continue
        if isinstance(name, str):
            names.setdefault(name, []).append(path)
    return names, damaged


def check_single(folder: Path | None, wanted: Iterable[str]) -> None:
    """InputError if two YAML files of a folder are one of the tasks; lm-eval takes the first."""
    names = names_in(folder)[0] if folder else {}
    for name in wanted:
        if len(paths := names.get(name, ())) > 1:
            files = " and ".join(f"'{path}'" for path in paths)
            raise InputError(f"{files} are both the task '{name}'; rename one of them")
