"""Data sets of the Hugging Face hub: rows with the keys of a task file, read in streaming."""

import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from kvbench.errors import InputError
from kvbench.registry import register_task_source
from kvbench.task import Task

from .task_file import Lines, ReadTask, printable


@register_task_source("hf")
def task_of_hub(rest: str) -> Task:
    """The rows of a data set: NAME, NAME:CONFIG, NAME:CONFIG:SPLIT or NAME::SPLIT."""
    name, config, split, *more = [*rest.split(":"), "", ""]
    if not Path(name).name or more[2:] or any(more):
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
