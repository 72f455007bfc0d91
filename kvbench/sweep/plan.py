"""What a sweep measures: cells, each a sample under one method and budget, by fingerprint."""

import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvbench
from kvbench.errors import InputError
from kvbench.records import BASELINE
from kvbench.registry import tasks as task_registry
from kvbench.task import Sample, Task

if TYPE_CHECKING:
    from kvbench.models.load import LoadedModel
    from kvbench.spec import MethodSpec

ANSWER_PREFIX = "answer_prefix"
TEMPLATE_DATE = "2025-01-01"  # a fixed day, so that the same command makes the same prompts
# Put before a chat template: its `strftime_now` then writes a fixed day. Templates are given data
# only, no functions, and the line's end is not part of what they write.
TODAY = (
    "{% macro strftime_now(format) %}{% set day = namespace(text=format) %}"
    "{% for code, part in kvbench_today.items() %}"
    "{% set day.text = day.text.replace(code, part) %}{% endfor %}{{ day.text }}{% endmacro %}\n"
)

# What can change a result: folders with all they hold, and the contract.
_MEASURING = ("engine", "models", "heads.py", "method.py", "registry.py", "spec.py", "task.py")


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

    @property
    def tokens(self) -> int:
        """Tokens to process at most: the prompt's and the answer's."""
        return len(self.prompt) + self.sample.max_new_tokens


@dataclass(frozen=True)
class Settings:
    """What all cells of a sweep have in common."""

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


def parts_of_day(day: str) -> dict[str, str]:
    """What each code of `strftime` writes for a day, at noon."""
    noon = datetime.fromisoformat(day).replace(hour=12)
    codes = [f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYZ" for flag in ("-", "")]
    return {code: noon.strftime(code) for code in codes}


@dataclass(frozen=True)
class Chat:
    """What a chat template is given beside the prompt: a fixed day, and options."""

    date: str = TEMPLATE_DATE
    options: tuple[tuple[str, Any], ...] = ()

    def text(self, tokenizer: Any, content: str) -> str:
        """The prompt as a user's turn, up to where the answer starts.

        InputError if the template fails. Templates that write the date would otherwise make another
        prompt every day.
        """
        turns = [{"role": "user", "content": content}]
        given = {**dict(self.options), "kvbench_today": parts_of_day(self.date)}
        try:
            template = TODAY + tokenizer.get_chat_template()
            return str(
                tokenizer.apply_chat_template(
                    turns,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=True,
                    **given,
                )
            )
        except Exception as error:  # templates raise whatever they like
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"the model's chat template fails ({reason}); give it what it wants with "
                "--template-option, or use --chat-template off"
            ) from None

    def opens_thinking(self, tokenizer: Any) -> str | None:
        """The tag of a thinking block that the template opens before the answer, if it does."""
        text = self.text(tokenizer, "")
        for tag in ("think", "thinking", "thought", "reasoning"):
            if text.rfind(f"<{tag}>") > text.rfind(f"</{tag}>"):
                return f"<{tag}>"
        return None


def common_settings(model: "LoadedModel", settings: Settings) -> dict[str, Any]:
    """What all records of one run directory must agree in, JSON-serialisable."""
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
        "kvbench": f"{kvbench.__version__}+{_code_hash()}",
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }


def make_plan(
    model: "LoadedModel",
    tasks: Sequence[Task],
    specs: Sequence["MethodSpec"],
    settings: Settings,
) -> list[Cell]:
    """All cells of a sweep, sample by sample, the tasks taking turns.

    The baseline is in it once per sample, whatever the budgets; so is, once per budget, a method
    that does not depend on the prefill chunk. Raises InputError if a sample does not fit.
    """
    common = common_settings(model, settings)
    method = {spec.name: [spec.name, spec.options, _source_hash(spec)] for spec in specs}
    cells = []
    for index in range(settings.samples):
        for task in tasks:
            sample = make_sample(model, task, index, settings)
            prompt = encode_prompt(model.tokenizer, sample, chat=settings.chat)
            _check_length(model, task, sample, prompt)
            what = {
                "common": common,
                "task": [task.name, _file_hash(type(task))],
                "sample": index,
                "prompt": digest(prompt),
                "max_new_tokens": sample.max_new_tokens,
            }
            for spec, budget, chunk in _variants(specs, settings):
                how = {
                    "method": method[spec.name],
                    "budget": budget,
                    "prefill_chunk": chunk,
                }
                fingerprint = digest({**what, **how})
                seed = int(digest([settings.seed, task.name, index])[:8], 16)
                cells.append(Cell(fingerprint, sample, prompt, spec, budget, chunk, seed))
    return cells


def _variants(
    specs: Sequence["MethodSpec"], settings: Settings
) -> Iterable[tuple["MethodSpec", float, int | None]]:
    for spec in specs:
        budgets = (1.0,) if spec.name == BASELINE else settings.budgets
        for budget in budgets:
            for chunk in settings.prefill_chunks if spec.depends_on_chunk else (None,):
                yield spec, budget, chunk


def make_sample(model: "LoadedModel", task: Task, index: int, settings: Settings) -> Sample:
    """Sample `index` of a task, short enough to leave room for the chat template if there is."""
    room = settings.context
    if settings.chat is not None:
        room -= len(_in_chat(model.tokenizer, settings.chat, "", ""))
    return task.sample(index, seed=settings.seed, context=room, tokenizer=model.tokenizer)


def encode_prompt(tokenizer: Any, sample: Sample, *, chat: Chat | None) -> list[int]:
    """The prompt's token ids, with `chat` as a user's turn in the tokenizer's chat template.

    Where the prompt ends with the beginning of the answer (`metadata["answer_prefix"]`), that part
    goes behind the template's assistant header, so that the model continues it.
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


def digest(value: Any) -> str:
    """A hash of JSON-serialisable data, 20 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _source_hash(spec: "MethodSpec") -> list[str]:
    parts = [spec.method] if spec.post_fill is None else [spec.method, spec.post_fill]
    return [_file_hash(type(part)) for part in parts]


def _file_hash(cls: type) -> str:
    """Hash of the source file that defines a class, so that an edited plug-in is measured anew."""
    file = inspect.getsourcefile(cls)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12] if file else ""


def _code_hash() -> str:
    digest = hashlib.sha256()
    home = Path(kvbench.__file__).parent
    for name in _MEASURING:
        for path in sorted([home / name, *(home / name).rglob("*")]):
            if path.suffix in (".py", ".c"):
                digest.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def get_tasks(names: Sequence[str]) -> list[Task]:
    """Task objects by name; InputError with the nearest name for an unknown one."""
    return [task_registry.get(name)() for name in names]
