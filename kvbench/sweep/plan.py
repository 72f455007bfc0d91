"""The plan of a sweep: its cells, each one sample under one method and budget.

Tasks make samples, the tokenizer turns prompts into token ids, and every cell gets its fingerprint
(`fingerprint.py`). `runner.py` measures the cells.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.errors import InputError
from kvbench.records import BASELINE
from kvbench.registry import tasks as task_registry
from kvbench.sweep.chat import TEMPLATE_DATE, Chat
from kvbench.sweep.fingerprint import digest, measuring_code, source_code
from kvbench.task import Sample, Task

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.spec import MethodSpec

ANSWER_PREFIX = "answer_prefix"


@dataclass(frozen=True)
class Cell:
    """One measurement: a sample (its prompt as token ids) under one method and budget."""

    fingerprint: str
    sample: Sample
    prompt: list[int]
    spec: "MethodSpec"
    budget: float
    prefill_chunk: int | None  # tokens; None where the method does not depend on it
    seed: int  # for methods that draw; equal for all methods and budgets of a sample
    method_code: str = ""  # a hash of the method's source
    task_code: str = ""  # a hash of the task's source

    @property
    def tokens(self) -> int:
        """Tokens to process at most: the prompt's and the answer's."""
        return len(self.prompt) + self.sample.max_new_tokens


@dataclass(frozen=True)
class Settings:
    """The settings of all cells of a sweep."""

    context: int  # tokens
    seed: int
    samples: int
    prefill_chunks: tuple[int, ...]
    budgets: tuple[float, ...]
    chat_template: bool
    template_date: str = TEMPLATE_DATE  # the day that a chat template takes for today, ISO 8601
    template_options: tuple[tuple[str, Any], ...] = ()  # what else the chat template is given

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
        "template_options": dict(settings.template_options) if settings.chat_template else {},
        "rope": None if model.long_rope is None else model.long_rope.name_for(settings.context),
        "kvbench": f"{kvbench.__version__}+{measuring_code()}",
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def make_plan(
    model: "LoadedModel",
    tasks: Sequence[Task],
    specs: Sequence["MethodSpec"],
    settings: Settings,
) -> list[Cell]:
    """All cells of a sweep: sample by sample, and for each the tasks in turn.

    The baseline has one cell per sample, whatever the budgets. A method that does not depend on the
    prefill chunk has one cell per budget. Raises InputError if a sample does not fit the model.
    """
    common = common_settings(model, settings)
    codes = {spec.name: method_code(spec) for spec in specs}
    cells = []
    for index in range(settings.samples):
        for task in tasks:
            task_code = source_code(type(task))
            sample = make_sample(model, task, index, settings)
            prompt = encode_prompt(model.tokenizer, sample, chat=settings.chat)
            _check_length(model, task, sample, prompt)
            what = {
                "common": common,
                "task": [task.name, task_code],
                "sample": index,
                "prompt": digest(prompt),
                "max_new_tokens": sample.max_new_tokens,
            }
            for spec, budget, chunk in _variants(specs, settings):
                how = {
                    "method": [spec.name, spec.options, codes[spec.name]],
                    "budget": budget,
                    "prefill_chunk": chunk,
                    "read_chunk": chunk or settings.prefill_chunks[0],
                }
                fingerprint = digest({**what, **how})
                seed = int(digest([settings.seed, task.name, index])[:8], 16)
                code = codes[spec.name]
                cells.append(
                    Cell(fingerprint, sample, prompt, spec, budget, chunk, seed, code, task_code)
                )
    return cells


def method_code(spec: "MethodSpec") -> str:
    """A hash of a method's source; of a combination, of both parts."""
    parts = [spec.method] if spec.post_fill is None else [spec.method, spec.post_fill]
    return source_code(*map(type, parts))


def _variants(
    specs: Sequence["MethodSpec"], settings: Settings
) -> Iterable[tuple["MethodSpec", float, int | None]]:
    for spec in specs:
        budgets = (1.0,) if spec.name == BASELINE else settings.budgets
        for budget in budgets:
            for chunk in settings.prefill_chunks if spec.depends_on_chunk else (None,):
                yield spec, budget, chunk


def make_sample(model: "LoadedModel", task: Task, index: int, settings: Settings) -> Sample:
    """Sample `index` of a task; with the chat template it fits the context."""
    tokens = settings.context
    if settings.chat is not None:
        tokens -= len(_in_chat(model.tokenizer, settings.chat, "", ""))
    return task.sample(index, seed=settings.seed, context=tokens, tokenizer=model.tokenizer)


def encode_prompt(tokenizer: Any, sample: Sample, *, chat: Chat | None) -> list[int]:
    """The token ids of a prompt; with `chat`, as a user's turn in the model's chat template.

    If the prompt ends with the beginning of the answer (`metadata["answer_prefix"]`), that part is
    put after the template's assistant header, so that the model continues it.
    """
    if chat is None:
        return list(tokenizer.encode(sample.prompt))
    prefix = str(sample.metadata.get(ANSWER_PREFIX, ""))
    return _in_chat(tokenizer, chat, sample.prompt.removesuffix(prefix).rstrip(), prefix.lstrip())


def _in_chat(tokenizer: Any, chat: Chat, content: str, answer: str) -> list[int]:
    text = chat.text(tokenizer, content)
    return list(tokenizer.encode(text + answer, add_special_tokens=False))


def _check_length(model: "LoadedModel", task: Task, sample: Sample, prompt: Sequence[int]) -> None:
    needed = len(prompt) + sample.max_new_tokens
    if needed > model.max_context:
        raise InputError(
            f"sample {sample.index} of {task.name} takes {needed} tokens with its answer, "
            f"{model.name} takes {model.max_context}; choose a shorter --context"
        )


def get_tasks(names: Sequence[str]) -> list[Task]:
    """Task objects by name; InputError with the nearest name for an unknown one."""
    return [task_registry.get(name)() for name in names]
