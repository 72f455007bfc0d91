"""Stop strings: decoding of a row ends when its answer contains one, and the text is cut there."""

from collections.abc import Sequence
from typing import Any

from kvbench.errors import InputError

BEFORE = 4  # tokens decoded before the first that can belong to a stop string: a character's bytes


def stopped(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> bool:
    """Whether an answer, which did not contain any of the texts `stop` before its last token, does.

    The text of special tokens counts as part of the answer. Only a tail of the answer is decoded: a
    token is at least one byte of text, so a stop string has at most as many tokens as bytes.
    """
    if not stop:
        return False
    longest = max(len(text.encode()) for text in stop)
    tail = tokenizer.decode(tokens[-longest - BEFORE :], skip_special_tokens=False)
    return any(text in tail for text in stop)


def cut(answer: str, stop: Sequence[str]) -> str:
    """An answer without what follows a stop string; where they overlap, the first of `stop` wins.

    This is how lm-evaluation-harness cuts answers.
    """
    for text in stop:
        answer = answer.partition(text)[0]
    return answer


def check_stop(tokenizer: Any, stop: Sequence[str]) -> None:
    """InputError for stop strings that cannot be looked for."""
    if "" in stop:
        raise InputError("a stop string is empty; give a text, or no stop string")
    if stop and tokenizer is None:
        raise InputError("stop strings need a tokenizer, and the model has none")
