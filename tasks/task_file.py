"""Task files: JSON Lines, and folders of them.

`docs/task-files.md` describes the keys of a line, and `_lines.py` reads one. Lines are found by
their offsets and read when they are asked for, so that a file may be larger than memory. Of a file,
only the lines that a run uses are read and checked.
"""

import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from kvbench.errors import InputError
from kvbench.metrics import metrics, whole_answer
from kvbench.registry import register_task_source
from kvbench.task import Sample, Task, Tokenizer

from ._lines import KEYS, parsed, sample_of, shown

BLOCK = 1 << 22  # bytes that are searched for line ends at a time
MOST_NAMED = 8  # subtasks in a remark
LONGEST_LINE = 1 << 26  # bytes; more than any model reads
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


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

    def has_more(self, count: int) -> bool:
        """Whether anything comes after the first `count` lines, which have been found."""
        return self.ends[count] < self.path.stat().st_size

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
        if len(self.files) > 1:
            for lines in self.files:
                if not lines.path.stat().st_size:
                    raise InputError(f"{lines.shown} is empty; fill it, or move it away")
        self.order += islice(self.turns, max(0, count - len(self.order)))
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
        remarks = []
        used = Counter(lines for lines, _ in self.order[: self.size])
        if any(lines.has_more(used[lines]) for lines in self.files):
            taken = "the first sample" if count == 1 else f"the first {count} samples"
            remarks.append(f"{self.name}: {taken}; there are more")
        if unused := [lines.subtask for lines in self.files if not used[lines]]:
            remarks.append(
                f"{self.name}: no sample of {len(unused)} of {len(self.files)} subtasks, which "
                f"count nothing in its score: {', '.join(unused[:MOST_NAMED])}"
                f"{', ...' * (len(unused) > MOST_NAMED)}; --samples {len(self.files)} takes one of "
                "each"
            )
        if unknown:
            keys = ", ".join(shown(key, '"') for key in sorted(unknown))
            remarks.append(f"{self.name}: keys that are not used: {keys}")
        self.remarks = tuple(remarks)

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
        metric = str(sample.metric)
        text = prediction if sample.chat else whole_answer(metric, sample.answer_prefix, prediction)
        return metrics.get(metric)(text, sample.reference)


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
