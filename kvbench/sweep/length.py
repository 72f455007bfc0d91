"""Samples of their own length: what becomes of one that is too long (`docs/task-files.md`).

`plan.py` asks for this where a task reads its samples. Contexts are cut as in HELMET (arXiv
2410.02694): at their end, by the tokens of the model that is measured.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from typing import Any

from kvbench.errors import InputError
from kvbench.task import Sample

TOO_LONG = ("error", "cut", "skip")
Encode = Callable[[Sample], list[int]]


class TooLong(InputError):
    """A sample does not fit. `needed`: its tokens, answer included; `most`: those it may have."""

    def __init__(self, needed: int, most: int, can_be_cut: bool) -> None:
        cut = "shorten contexts with --too-long cut, " if can_be_cut else ""
        super().__init__(
            f"it takes {needed} tokens with its answer, {most} is the most; {cut}leave such "
            "samples out with --too-long skip, or choose another --context or model"
        )


def fitting(
    sample: Sample, encode: Encode, most: int, too_long: str, tokenizer: Any
) -> tuple[Sample, list[int], int]:
    """The sample, the token ids of its prompt, and how many tokens were cut to fit `most` tokens.

    `encode` gives the ids of a sample's prompt, and `most` covers prompt and answer. Raises TooLong
    for a longer sample, unless `too_long` is "cut"; InputError if it cannot be cut.
    """
    prompt = encode(sample)
    room, before = most - sample.max_new_tokens, len(prompt)
    if before <= room:
        return sample, prompt, 0
    if too_long != "cut":
        raise TooLong(before + sample.max_new_tokens, most, sample.context_span is not None)
    if sample.context_span is None:
        raise InputError(
            "its context is not known, so it cannot be cut; say it with context_span, or leave "
            "such samples out with --too-long skip"
        )
    start, end = sample.context_span
    starts = token_starts(tokenizer, sample.prompt[start:end])
    left, shorter = len(starts), sample
    while len(prompt) > room:  # cut text may take a token more or less than the same text did whole
        left -= len(prompt) - room
        if left < 1 or starts[left] == 0:
            raise InputError(
                f"nothing of its context fits into {most} tokens beside its question and its "
                "answer; choose a longer --context, or --too-long skip"
            )
        shorter = without(sample, start + starts[left], end)
        prompt = encode(shorter)
    return shorter, prompt, before - len(prompt)


def without(sample: Sample, at: int, end: int) -> Sample:
    """The sample without the characters from `at` to the end of its context, which is at `end`."""
    span, question = sample.context_span, sample.question_at
    return replace(
        sample,
        prompt=sample.prompt[:at] + sample.prompt[end:],
        context_span=span and (span[0], at),
        question_at=question and (question - (end - at) if question >= end else min(question, at)),
    )


def token_starts(tokenizer: Any, text: str) -> list[int]:
    """The character of `text` at which each of its tokens starts.

    A tokenizer that reads a word as bytes, for want of a token, says of each that it is the whole
    word. These tokens are bytes of its characters in turn.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            "the model's tokenizer does not say where tokens start, so contexts cannot be cut; "
            "use --too-long skip"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts: list[int] = []
    for (start, end), run in groupby(found["offset_mapping"]):
        sizes = [len(character.encode()) for character in text[start:end]]
        of_byte = [start + at for at, size in enumerate(sizes) for _ in range(size)] or [start]
        count = len(list(run))
        starts += [of_byte[number * len(of_byte) // count] for number in range(count)]
    return starts
