"""A model's chat template: a prompt becomes a user's turn, on a fixed day and with given options.

`plan.py` encodes prompts by it.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kvbench.errors import InputError

TEMPLATE_DATE = "2025-01-01"  # a fixed day, so that the same command makes the same prompts
MOST_LINES = 1_000_000  # of a template, run to write two prompts; usual ones take some hundreds
# Put before a chat template: its `strftime_now` then writes a fixed day. Templates are given data
# only, no functions, and the line's end is not part of what they write.
TODAY = (
    "{% macro strftime_now(format) %}{% set day = namespace(text=format) %}"
    "{% for code, part in kvbench_today.items() %}"
    "{% set day.text = day.text.replace(code, part) %}{% endfor %}{{ day.text }}{% endmacro %}\n"
)


def parts_of_day(day: str) -> dict[str, str]:
    """What each code of `strftime` writes for a day, at noon."""
    noon = datetime.fromisoformat(day).replace(hour=12)
    codes = [f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYZ" for flag in ("-", "")]
    return {code: noon.strftime(code) for code in codes}


@contextmanager
def limited() -> Iterator[None]:
    """Raise RuntimeError in a template that runs too many lines: it may loop without an end."""
    left = MOST_LINES

    def count(frame: Any, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != "<template>":
            return None
        left -= 1
        if left < 0:
            raise RuntimeError("it does not come to an end")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


@dataclass(frozen=True)
class Chat:
    """What a chat template is given beside the prompt: a fixed day, and options."""

    date: str = TEMPLATE_DATE
    options: tuple[tuple[str, Any], ...] = ()

    def text(self, tokenizer: Any, content: str | Sequence[Mapping[str, str]]) -> str:
        """The prompt as a user's turn, or several turns, up to where the answer starts.

        A last turn of the assistant's is the start of the answer. InputError if the template fails.
        Templates that write the date would otherwise make another prompt every day.
        """
        turns = [{"role": "user", "content": content}] if isinstance(content, str) else content
        begun = turns[-1]["role"] == "assistant"
        given = {**dict(self.options), "kvbench_today": parts_of_day(self.date)}
        try:
            template = TODAY + tokenizer.get_chat_template()
            with limited():
                first, second = (
                    tokenizer.apply_chat_template(
                        turns,
                        chat_template=template,
                        tokenize=False,
                        add_generation_prompt=not begun,
                        continue_final_message=begun,
                        **given,
                    )
                    for _ in range(2)
                )
            if first != second:
                raise ValueError("it writes something else each time")
            return str(first)
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
