"""Tasks that are read: JSON Lines files, folders of them, and data sets of the Hugging Face hub.

`docs/task-files.md` describes the keys of a line. Lines are found by their offsets and read when
they are asked for, so that a file may be larger than memory. Of a file, only the lines that a run
uses are read and checked.
"""

import json
import stat
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.metrics import metrics
from kvbench.registry import register_task_source
from kvbench.task import Sample, Task, Tokenizer

BLOCK = 1 << 22  # bytes that are searched for line ends at a time
LONGEST_LINE = 1 << 26  # bytes; more than any model reads
SHOWN = 60  # characters of a value in a message
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARTS = ("instruction", "context", "question", "answer_prefix")  # of a prompt, in this order
KEYS = {
    *PARTS,
    *("prompt", "context_span", "question_at", "answer", "reference", "metric", "max_new_tokens"),
    *("chat", "cluster", "id", "subtask", "stop", "metadata"),
}


class Lines:
    """The lines of a file, found when they are needed; `subtask` is what they are by default."""

    def __init__(self, path: Path, shown: str, subtask: str, unit: str = "line") -> None:
        self.path, self.shown, self.subtask, self.unit = path, shown, subtask, unit
        self.ends = array("q", [0])  # offsets: where the first line starts, where each one ends
        self.complete = False

    def has(self, index: int) -> bool:
        """Whether there is a line `index`, from 0."""
        if len(self.ends) - 1 <= index and not self.complete:
            self.find(index + 1)
        return len(self.ends) - 1 > index

    def find(self, count: int) -> None:
        """Find the ends of at least `count` lines, or of all."""
        position = self.ends[-1]
        with self.path.open("rb") as file:
            file.seek(position)
            while len(self.ends) <= count:
                if position - self.ends[-1] > LONGEST_LINE:
                    raise self.fault(len(self.ends) - 1, "it is longer than 64 MiB")
                if not (block := file.read(BLOCK)):
                    self.complete = True
                    if position > self.ends[-1]:  # the last line has no newline
                        self.ends.append(position)
                    return
                at = block.find(b"\n")
                while at >= 0:
                    self.ends.append(position + at + 1)
                    at = block.find(b"\n", at + 1)
                position += len(block)

    def read(self, index: int) -> bytes:
        """Line `index`; the file may have changed since the line was found."""
        start, end = self.ends[index], self.ends[index + 1]
        with self.path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start)
        return line.removeprefix(BYTE_ORDER_MARK) if index == 0 else line

    def fault(self, index: int, reason: str) -> InputError:
        """What to raise if line `index` cannot be used."""
        return InputError(f"{self.shown}, {self.unit} {index + 1}: {reason}")


class ReadTask(Task):
    """A task whose samples are lines; files take turns, and end one after the other."""

    default = False
    reads = True

    def __init__(self, name: str, source: str, files: Sequence[Lines]) -> None:
        if not name.isprintable():
            raise InputError(f"the name {name!a} cannot be shown; rename the file or the folder")
        self.name, self.source, self.files = name, source, files
        self.subtasks = tuple(lines.subtask for lines in files)
        self.metric = "as its samples say"
        self.given_metric: str | None = None
        self.given_limit: int | None = None
        self.order: list[tuple[Lines, int]] = []  # of each sample, its file and its line
        self.turns = self.take_turns()

    def take_turns(self) -> Iterator[tuple[Lines, int]]:
        """All lines: the first of each file, the second of each file, and so on."""
        files, index = list(self.files), 0
        while files := [lines for lines in files if lines.has(index)]:
            yield from ((lines, index) for lines in files)
            index += 1

    def ready(self, count: int, metric: str | None, max_new_tokens: int | None) -> None:
        """Read and check the lines of `count` samples."""
        if metric is not None:
            metrics.get(metric)
        self.given_metric, self.given_limit = metric, max_new_tokens
        self.order += islice(self.turns, count - len(self.order))
        self.size = min(count, len(self.order))
        if not self.size:
            raise InputError(f"{self.source} has no lines; a line is a JSON object (one sample)")
        ids: dict[tuple[str, str], int] = {}
        unknown: dict[str, None] = {}
        named: dict[str, None] = {}
        for index in range(self.size):
            lines, line = self.order[index]
            sample, extra = self.load(index)
            unknown |= dict.fromkeys(extra)
            named[str(sample.metric)] = None
            own = sample.metadata.get("id")
            if own is not None and (first := ids.setdefault((lines.shown, own), line)) != line:
                raise lines.fault(
                    line,
                    f"its id {shown(own)} is that of {lines.unit} {first + 1} too; samples of one "
                    "question have the same cluster, not the same id",
                )
        self.metric = ", ".join(sorted(named))
        if unknown:
            keys = ", ".join(shown(key, '"') for key in sorted(unknown))
            self.remarks = (f"{self.name}: keys that are not used: {keys}",)

    def sample(self, index: int, *, seed: int, context: int, tokenizer: Tokenizer) -> Sample:
        """Sample `index`, as long as it is."""
        return self.load(index)[0]

    def place(self, index: int) -> str:
        """The file and the line of sample `index`."""
        lines, line = self.order[index]
        return f"{lines.shown}, {lines.unit} {line + 1}"

    def load(self, index: int) -> tuple[Sample, list[str]]:
        """Sample `index`, and the keys of its line that mean nothing here."""
        self.order += islice(self.turns, max(0, index + 1 - len(self.order)))
        if index >= len(self.order):
            raise InputError(f"{self.source} has {len(self.order)} samples, none of index {index}")
        lines, line = self.order[index]
        try:
            values = parsed(lines.read(line))
            extra = [key for key in values if key not in KEYS]
            defaults = {
                "subtask": lines.subtask,
                "metric": self.given_metric,
                "max_new_tokens": self.given_limit,
            }
            given = {key: value for key, value in values.items() if value is not None}
            return sample_of(self.name, index, defaults | given), extra
        except (ValueError, InputError) as error:
            raise lines.fault(line, str(error)) from None
        except OSError as error:
            raise InputError(f"cannot read {lines.shown}: {error.strerror}") from None

    def score(self, prediction: str, sample: Sample) -> float:
        """The value of the sample's metric.

        Without a chat template, the start of the answer belongs to the prompt. It is put before the
        prediction again, as in HELMET (`kvbench/metrics.py`).
        """
        text = prediction if sample.chat else sample.answer_prefix + prediction
        return metrics.get(str(sample.metric))(text, sample.reference)


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; ValueError says what is wrong."""
    if line.startswith(b"\x1f\x8b"):
        raise ValueError("it is compressed; unpack the file first")
    if not line.strip():
        raise ValueError("it is empty; delete the line")
    try:
        text = line.decode()
        values = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite
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
        reference=reference_of(values, name),
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


def reference_of(values: dict[str, Any], metric: str) -> Any:
    """What the metric compares with; it is tried, so that a wrong one is found at once."""
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
        metrics.get(metric)("", reference)
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


@register_task_source("file")
def task_of_path(path: str) -> Task:
    """The samples of a .jsonl file, or of a folder of them: one task, each file a subtask."""
    home = Path(path)
    try:
        kind = home.stat().st_mode
        if not stat.S_ISDIR(kind):
            if not stat.S_ISREG(kind):
                raise InputError(f"{printable(home)} is no file and no folder; name a .jsonl file")
            home.open("rb").close()
            return ReadTask(home.stem, str(home.resolve()), [lines_of(home)])
        files = sorted(each for each in home.glob("*.jsonl") if not each.name.startswith("."))
        folders = sorted({each.parent.name for each in home.glob("*/*.jsonl")})
        for each in files:
            if not each.is_file():
                raise InputError(f"{printable(each)} is no file; move it away")
            each.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read the task {printable(home)}: {reason}") from None
    if not files:
        hint = f"; folders in it that do: {', '.join(map(printable, folders))}" if folders else ""
        raise InputError(f"the folder {printable(home)} holds no .jsonl file{hint}")
    return ReadTask(home.resolve().name, str(home.resolve()), [lines_of(each) for each in files])


def lines_of(path: Path) -> Lines:
    """The lines of a file, whose stem is their subtask."""
    if not path.stem.isprintable():
        raise InputError(f"the name of {printable(path)} cannot be shown; rename the file")
    return Lines(path, str(path), path.stem)


def printable(path: Path | str) -> str:
    """A path as a message shows it, without line ends and control characters."""
    return str(path) if str(path).isprintable() else ascii(str(path))


@register_task_source("hf")
def task_of_hub(rest: str) -> Task:
    """The rows of a data set: NAME, NAME:CONFIG, NAME:CONFIG:SPLIT or NAME::SPLIT."""
    name, config, split, *more = [*rest.split(":"), "", ""]
    if not name or more[2:] or any(more):
        raise InputError(f"hf:{printable(rest)} names no data set; write hf:NAME:CONFIG:SPLIT")
    return HubTask(name, config or None, split or None)


class HubTask(ReadTask):
    """Rows of a data set, read in streaming into a temporary file, and from there as lines."""

    def __init__(self, name: str, config: str | None, split: str | None) -> None:
        self.wanted = name, config, split
        self.file = tempfile.NamedTemporaryFile(suffix=".jsonl")  # noqa: SIM115  (as long as self)
        source = ":".join(["hf", name, *([config or "", split or ""] if config or split else [])])
        source = source.rstrip(":")
        rows = Lines(Path(self.file.name), printable(source), Path(name).name, "row")
        super().__init__(Path(name).name, source, [rows])
        self.rows: Iterator[Any] | None = None
        self.known = 0  # rows in the file

    def ready(self, count: int, metric: str | None, max_new_tokens: int | None) -> None:
        """Fetch and check the rows of `count` samples."""
        rows = self.files[0]
        try:
            self.rows = self.rows or iter(self.stream())
            for row in islice(self.rows, max(0, count - self.known)):
                try:
                    text = json.dumps({key: row[key] for key in row if row[key] is not None})
                except (TypeError, ValueError) as error:
                    raise rows.fault(self.known, f"not text or numbers ({error})") from None
                self.file.write(text.encode() + b"\n")
                self.known += 1
        except InputError:
            raise
        except Exception as error:  # the library raises what the network raises
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"cannot read {self.source}: {reason}") from None
        self.file.flush()
        rows.complete, self.turns = False, islice(self.take_turns(), len(self.order), None)
        super().ready(count, metric, max_new_tokens)

    def stream(self) -> Any:
        """The data set's rows; InputError if it has several splits and none was named."""
        try:
            from datasets import load_dataset
        except ImportError:
            raise InputError(
                f"{self.source} needs the package datasets: pip install 'kvbench[data]'"
            ) from None
        name, config, split = self.wanted
        found = load_dataset(name, config, split=split, streaming=True)
        if split is not None:
            return found
        if len(found) > 1 and "test" not in found:
            raise InputError(
                f"{self.source} has several splits ({', '.join(found)}); write hf:{name}:"
                f"{config or ''}:SPLIT"
            )
        return found["test"] if "test" in found else next(iter(found.values()))
