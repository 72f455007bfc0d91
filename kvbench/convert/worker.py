"""Runs the loader of a HELMET or LongProc checkout and prints its samples as lines of JSON.

`command.py` starts this file with a Python that has what the loader imports. It uses nothing but
the standard library and the checkout, and runs from Python 3.9 on. Its one argument is a request in
JSON: `benchmark`, `checkout`, `data` (folder of the data), `name`, `path` and `demos` of the data
set, `settings` (what HELMET calls `args`), `chat`, `question` (columns that tell the question) and
`one_row` (of each question).

Lines are {"versions": ...}, then {"sample": ...} for each row, then {"done": number of rows}; or
{"error": ..., "package": ...} and an end. What the loader prints goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import random
import sys
import traceback
from collections.abc import Iterator
from string import Formatter
from types import SimpleNamespace
from typing import Any

PACKAGES = ("datasets", "numpy", "transformers", "pandas")  # whose versions are told
SHORT = 100  # characters of a text that is kept as metadata
# Fields that are not metadata: a sample has them already, or they are long.
ELSEWHERE = {"context", "demos", "question", "answer", "html_str", "problem", "reference_output"}
# What holds the context or the question of a LongProc item.
CONTEXTS = {"html_to_tsv": "html_str"}
QUESTIONS = {"travel_planning": "problem"}
ASKS = ("question", "query")  # fields of HELMET's templates that ask


def main() -> None:
    """Answer the request."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    if hasattr(os, "register_at_fork"):  # a loader's child that outlives us must not hold the pipe
        os.register_at_fork(after_in_child=lambda: os.close(out.fileno()))
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path = [path for path in sys.path if os.path.abspath(path) != here]

    def tell(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    request = json.loads(sys.argv[1])
    os.chdir(request["checkout"])
    sys.path.insert(0, request["checkout"])
    try:
        count = 0
        for sample in {"helmet": helmet, "longproc": longproc}[request["benchmark"]](request):
            if count == 0:
                tell(versions=versions())
            tell(sample=sample)
            count += 1
        tell(done=count)
    except ModuleNotFoundError as error:
        tell(error=f"{error}", package=error.name)
    except Exception as error:
        tell(error=describe(error))


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that the loader imported."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in PACKAGES}
    found = {name: version for name, version in loaded.items() if version}
    return {"python": platform.python_version(), **found}


def describe(error: Exception) -> str:
    """An exception in a line, with the place that raised it."""
    if isinstance(error, Unusable):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({os.path.basename(last.filename)}:{last.lineno})"


class Unusable(Exception):
    """The loader gave an example that cannot become a sample."""


def helmet(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The samples of a HELMET data set, as its eval.py makes prompts of them."""
    load_data = importlib.import_module("data").load_data
    settings = SimpleNamespace(**request["settings"])
    random.seed(settings.seed)
    loaded = load_data(settings, request["name"], request["path"], request["demos"])
    rows = loaded["data"]
    question = next((c for c in request["question"] if len(rows) and c in rows[0]), None)
    template = loaded["user_template" if settings.use_chat_template else "prompt_template"]
    for index in chosen(rows, question if request["one_row"] else None):
        row = rows[index]
        try:
            prompt, spans = fill(template, row)
            prefix = "" if settings.use_chat_template else fill(loaded["system_template"], row)[0]
        except KeyError as error:
            raise Unusable(
                f"example {index} has no field {error}, which the prompt needs"
            ) from None
        if "context" not in spans or not row["context"]:
            raise Unusable(f"the prompt of example {index} has no context")
        if not row.get("question"):
            raise Unusable(f"example {index} has no question")
        grades = {document: int(grade) for document, grade in row.get("qrel", ())}
        end = spans["context"][-1][1]
        asked_before = any(start < end for name in ASKS for start, _ in spans.get(name, ()))
        yield {
            "prompt": prompt,
            # A context that is there twice cannot be cut; a question before its end does not start.
            "context_span": spans["context"][0] if len(spans["context"]) == 1 else None,
            "question_at": None if asked_before else end,
            "answer_prefix": prefix,
            "reference": grades or row["answer"],
            "cluster": None if question is None else f"{request['name']}/{row[question]}",
            "metadata": short_fields(row),
        }


def chosen(rows: Any, question: str | None) -> list[int]:
    """Indices of the rows to give: all, or one of each question, taking turns among its rows."""
    if question is None:
        return list(range(len(rows)))
    of: dict[Any, list[int]] = {}
    for index in range(len(rows)):
        of.setdefault(rows[index][question], []).append(index)
    return sorted(indices[turn % len(indices)] for turn, indices in enumerate(of.values()))


def fill(template: str, row: dict[str, Any]) -> tuple[str, dict[str, list[tuple[int, int]]]]:
    """`template.format(**row)`, and where in it each field came to lie, in order."""
    text = ""
    spans: dict[str, list[tuple[int, int]]] = {}
    for literal, field, spec, conversion in Formatter().parse(template):
        text += literal
        if field is not None:
            part = "{" + field + ("!" + conversion if conversion else "")
            value = (part + (":" + spec if spec else "") + "}").format(**row)
            spans.setdefault(field, []).append((len(text), len(text) + len(value)))
            text += value
    if text != template.format(**row):
        raise Unusable("the prompt's template cannot be taken apart")
    return text, spans


def longproc(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All samples of a LongProc data set, in the order of its file."""
    load = importlib.import_module("longproc.longproc_data").load_longproc_data
    kind = request["name"].rpartition("_")[0]
    for index, row in enumerate(load(request["name"], request["data"])[0]):
        prompt, item = row["input_prompt"], row["item"]
        context = question = None
        if kind in CONTEXTS:
            context = place(prompt, item[CONTEXTS[kind]], index, "context")
            question = context[1]
        elif kind in QUESTIONS:
            question = place(prompt, item[QUESTIONS[kind]], index, "question")[0]
        truth = {key: item[key] for key in item if key.startswith("ground_truth")}
        yield {
            "prompt": prompt,
            "context_span": context,
            "question_at": question,
            "reference": truth or row["reference_output"],
            "metadata": short_fields(item),
        }


def place(prompt: str, part: str, index: int, what: str) -> tuple[int, int]:
    """Where in the prompt its context or question lies, the last such place."""
    start = prompt.rfind(part) if part else -1
    if start < 0:
        raise Unusable(f"the prompt of example {index} has no {what}")
    return start, start + len(part)


def short_fields(row: dict[str, Any]) -> dict[str, Any]:
    """The numbers and short texts of a row."""
    return {name: row[name] for name in row if name not in ELSEWHERE and is_short(row[name])}


def is_short(value: Any) -> bool:
    """Whether a value is a number that JSON can hold, not a long one, or a short text."""
    if isinstance(value, (int, float)):
        return abs(value) < 2**63  # false for nan too
    return isinstance(value, str) and len(value) <= SHORT


if __name__ == "__main__":
    main()
