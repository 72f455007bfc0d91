"""A line of a task file as a sample, with every mistake named; see `docs/task-files.md`."""

import json
from typing import Any

from kvbench.errors import InputError
from kvbench.metrics import check_reference
from kvbench.task import Sample

MOST_DIGITS = 4000  # of a whole number; Python reads a few more
SHOWN = 60  # characters of a value in a message
PARTS = ("instruction", "context", "question", "answer_prefix")  # of a prompt, in this order
KEYS = {
    *PARTS,
    *("prompt", "context_span", "question_at", "answer", "reference", "metric", "max_new_tokens"),
    *("chat", "cluster", "id", "subtask", "stop", "metadata"),
}


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; ValueError says what is wrong."""
    if line[:2].count(0) == 1 or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("not UTF-8 text but UTF-16: iconv -f UTF-16 -t UTF-8 makes such a file")
    if line.startswith(b"\x1f\x8b"):
        raise ValueError("it is compressed; unpack the file first")
    if not line.strip():
        raise ValueError("it is empty; delete the line")
    try:
        text = line.decode()
        values = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_whole,
        )
        if b"\\u" in line:
            json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        hint = "" if text.lstrip().startswith(("{", "[")) else "; a line is a JSON object"
        if text.strip() in ("{", "["):
            hint = "; each sample is one line: jq -c makes such a file"
        raise ValueError(f"not JSON ({error.msg} at character {error.pos + 1}){hint}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (at byte {error.start + 1})") from None
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair (\\ud800 to \\udfff)") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if isinstance(values, list):
        raise ValueError("it is a list; each sample is one line: jq -c '.[]' makes such a file")
    if not isinstance(values, dict):
        raise ValueError(f"it is {shown(values)}; expected a JSON object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return values


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    if (value := float(text)) in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:SHOWN]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"the number {text[:SHOWN]}... of {len(text)} digits is too large")
    return int(text)


def shown(value: Any, quote: str = "") -> str:
    """A value as a message shows it: as ASCII JSON on one line, and not too long."""
    text = json.dumps(value)
    text = text.strip(quote) if quote else text
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def sample_of(task: str, index: int, values: dict[str, Any]) -> Sample:
    """The sample of a line's keys; ValueError or InputError says what is wrong."""
    prompt, question_at, span = prompt_of(values)
    prefix = text_of(values, "answer_prefix", "")
    if not prompt.endswith(prefix):
        raise ValueError(f"its prompt does not end with its answer_prefix {shown(prefix)}")
    if span is not None and span[1] > len(prompt) - len(prefix):
        raise ValueError(f"context_span is {shown(span)}, which reaches into its answer_prefix")
    metadata = get(values, "metadata", dict, "an object", {})
    own = get(values, "id", str | int, "a text", None)
    limit = get(values, "max_new_tokens", int, "a whole number", None)
    if limit is None:
        raise ValueError("it says no max_new_tokens; add the key, or --max-new-tokens N")
    if limit < 1:
        raise ValueError(f"max_new_tokens is {shown(limit)}; expected at least 1")
    subtask = text_of(values, "subtask")
    if not subtask.strip() or not subtask.isprintable():
        raise ValueError(f"subtask is {shown(subtask)}; expected a name")
    stop = get(values, "stop", list, "a list of texts", [])
    if not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop is {shown(stop)}; expected a list of texts that are not empty")
    if (name := text_of(values, "metric")) is None:
        raise ValueError(
            "it says no metric; add the key, or --metric NAME ('kvbench list metrics' shows them)"
        )
    unused = {key: value for key, value in values.items() if key not in KEYS}
    return Sample(
        task=task,
        subtask=subtask,
        index=index,
        prompt=prompt,
        reference=reference_of(values, name, prefix),
        max_new_tokens=limit,
        metadata={**unused, **metadata, **({} if own is None else {"id": str(own)})},
        cluster=text_of(values, "cluster"),
        question_at=question_at,
        context_span=span,
        metric=name,
        chat=get(values, "chat", bool, "true or false", None),
        answer_prefix=prefix,
        stop=tuple(stop),
    )


def prompt_of(values: dict[str, Any]) -> tuple[str, int | None, tuple[int, int] | None]:
    """The prompt, where its question starts, and its context, in characters of the prompt."""
    if "prompt" not in values:
        if "context" not in values or "question" not in values:
            raise ValueError("it has no prompt; expected prompt, or context and question")
        if both := [key for key in ("context_span", "question_at") if key in values]:
            raise ValueError(f"{both[0]} belongs to a prompt; context and question say it already")
        parts = {name: text_of(values, name, "") for name in PARTS}
        prompt, start = "".join(parts.values()), len(parts["instruction"])
        end: int = start + len(parts["context"])
        if not prompt:
            raise ValueError("its context and question are empty")
        return prompt, end if 0 < end < len(prompt) else None, (start, end)
    if given := [key for key in PARTS[:3] if key in values]:
        raise ValueError(f"it has a prompt and {given[0]}; expected one of them")
    prompt = text_of(values, "prompt")
    if not prompt:
        raise ValueError("its prompt is empty")
    at = get(values, "question_at", int, "a whole number", None)
    if at is not None and not 0 < at < len(prompt):
        raise ValueError(f"question_at is {shown(at)}; expected 1 to {len(prompt) - 1}")
    span = get(values, "context_span", list, "[start, end]", None)
    if span is None:
        return prompt, at, None
    whole = [type(end) for end in span] == [int, int]
    if not whole or not 0 <= span[0] <= span[1] <= (at or len(prompt)):
        raise ValueError(
            f"context_span is {shown(span)}; expected [start, end] from 0 to {at or len(prompt)}, "
            + ("where the prompt ends" if at is None else "where the question starts")
        )
    return prompt, at, (span[0], span[1])


def reference_of(values: dict[str, Any], metric: str, prefix: str = "") -> Any:
    """What the metric compares with; it is tried, so that a wrong one is found at once.

    `prefix` is the start of the answer that belongs to the prompt.
    """
    given = [key for key in ("answer", "reference") if key in values]
    if len(given) != 1:
        what = "no answer" if not given else "an answer and a reference"
        raise ValueError(f"it has {what}; expected answer, or reference")
    reference = values[given[0]]
    if given[0] == "answer":
        texts = reference if isinstance(reference, list) else [reference]
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                f"answer is {shown(reference)}; expected a text or a list of texts, none empty"
            )
    try:
        check_reference(metric, reference, prefix)
    except InputError as error:
        raise ValueError(f"metric {shown(metric, '')}: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise ValueError(f"metric '{metric}' does not take its {given[0]} ({reason})") from None
    return reference


def get(values: dict[str, Any], key: str, kind: Any, expected: str, default: Any) -> Any:
    """A value of a kind; `default` if it is missing. ValueError says what was expected."""
    if (value := values.get(key)) is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{key} is {shown(value)}; expected {expected}")
    return value


def text_of(values: dict[str, Any], key: str, default: str | None = None) -> Any:
    """A text; `default` if it is missing."""
    return get(values, key, str, "a text", default)
