"""Checkpoints of a training: written whole, checked when they are read, the one before kept.

A training holds its folder while it runs, so that no second one writes there too.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbench.errors import InputError
from kvbench.files import write_atomically

CHECKPOINT, BEFORE = "checkpoint.safetensors", "checkpoint-before.safetensors"
DRAFT, LOCK = "checkpoint.part", ".lock"
SECONDS = 60  # between checkpoints, at most
SHARE = 50  # seconds of training between checkpoints for each second that saving one takes


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what goes wrong with a file in `folder` into InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(
            f"cannot write to '{folder}': {reason}; what is saved is kept: free some space, or "
            "choose another --out, and give the same command again"
        ) from None


@contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; InputError if another process does. A kill lets go of it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise InputError(
                f"another process trains in '{folder}': wait for it, or choose another --out"
            ) from None
    try:
        yield
    finally:
        lock.release()


@dataclass
class Checkpoints:
    """The checkpoints of a training in its folder."""

    folder: Path
    settings: Mapping[str, Any]  # JSON-serialisable; a checkpoint of others is refused
    learnt: Mapping[str, Tensor]
    optimizers: Sequence[torch.optim.Optimizer]
    note: str = field(default="", init=False)  # for the user, after `restore`
    _saved: float = field(default_factory=time.monotonic, init=False)
    _cost: float = field(default=0.0, init=False)  # seconds of the last save

    def __post_init__(self) -> None:
        self.settings = json.loads(json.dumps(self.settings))  # as they are read

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint: after a second, or later if saving takes long."""
        return time.monotonic() - self._saved > min(SECONDS, max(1.0, SHARE * self._cost))

    def save(self, progress: Mapping[str, Any]) -> None:
        """Write what is learnt, the optimizers' state and `progress` (JSON-serialisable).

        InputError if it cannot be written; the checkpoints that are there are kept.
        """
        started = time.monotonic()
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.learnt.items()}
        for name, tensor in self.learnt.items():
            for key, value in self._state(tensor).items():
                tensors[f"state.{key}/{name}"] = value.contiguous()
        about = json.dumps({"settings": self.settings, "progress": progress}, sort_keys=True)
        draft, path = self.folder / DRAFT, self.folder / CHECKPOINT
        with writing(self.folder):
            try:
                save_file(tensors, draft, {"about": about, "sha256": digest(tensors, about)})
                with draft.open("rb") as file:
                    os.fsync(file.fileno())
                if path.exists():
                    os.replace(path, self.folder / BEFORE)
                os.replace(draft, path)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
        self._saved = time.monotonic()
        self._cost = self._saved - started

    def restore(self) -> dict[str, Any] | None:
        """Load the newest whole checkpoint and return its progress; None if there is none.

        InputError if all are broken, or if it belongs to other settings or data.
        """
        broken = []
        for path in (self.folder / CHECKPOINT, self.folder / BEFORE):
            if not path.is_file():
                continue
            try:
                tensors, about = read(path)
                self._check_settings(about["settings"])
                self._load(tensors)
            except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
                broken.append(f"'{path}' is broken ({' '.join(str(error).split())})")
                continue
            if broken:
                self.note = f"checkpoint {broken[0]}; going on from the one before it"
            return dict(about["progress"])
        if broken:
            raise InputError(f"checkpoint {' and '.join(broken)}; delete it to start again")
        return None

    def _check_settings(self, known: Mapping[str, Any]) -> None:
        names = {**known, **self.settings}
        different = [name for name in names if known.get(name) != self.settings.get(name)]
        if different == ["data_hash"]:
            raise InputError(
                f"'{self.folder}' holds a training on other data: '{self.settings['data']}' has "
                "changed since; bring back what it was, or choose another --out to start anew"
            )
        if different:
            changes = "; ".join(
                f"{n} was {known.get(n)}, now {self.settings.get(n)}" for n in different
            )
            raise InputError(
                f"'{self.folder}' holds a training with other settings ({changes}): choose another "
                "--out"
            )

    def _load(self, tensors: Mapping[str, Tensor]) -> None:
        wanted = {name: tensor.shape for name, tensor in self.learnt.items()}
        found = {name: tensors[name].shape for name in wanted}
        if found != wanted:
            raise ValueError("its tensors have other shapes")
        states: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, slash, of = name.partition("/")
            if slash and kind.startswith("state."):
                states.setdefault(of, {})[kind.removeprefix("state.")] = tensor
        with torch.no_grad():
            for name, tensor in self.learnt.items():
                tensor.copy_(tensors[name])
                if name in states and (optimizer := self._optimizer(tensor)):
                    moved = {k: v.clone().to(tensor.device) for k, v in states[name].items()}
                    optimizer.state[tensor] = moved

    def _optimizer(self, tensor: Tensor) -> torch.optim.Optimizer | None:
        """The optimizer that steps a tensor; None for what an objective keeps beside these."""
        for optimizer in self.optimizers:
            if any(tensor is each for group in optimizer.param_groups for each in group["params"]):
                return optimizer
        return None

    def _state(self, tensor: Tensor) -> dict[str, Tensor]:
        optimizer = self._optimizer(tensor)
        return dict(optimizer.state.get(tensor, {})) if optimizer else {}


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint, and what it says of itself; ValueError if it is damaged."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = metadata["about"]
    if metadata["sha256"] != digest(tensors, about):
        raise ValueError("its content has changed")
    return tensors, json.loads(about)


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write a model and its tokenizer so that each file is whole, also if it replaces another."""
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for file in sorted(draft.iterdir()):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def digest(tensors: Mapping[str, Tensor], about: str) -> str:
    """A hash of everything that a checkpoint holds."""
    found = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def resume_log(path: Path, step: int, names: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The log's lines before `step`; lines that a killed run added after its checkpoint go.

    So do those that are no lines of a log: an object with a `step` after that of the line before,
    and with a finite number for each of `names`.
    """
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            last = lines[-1]["step"] if lines else -1
            with suppress(ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
                line = json.loads(text)
                numbers = [line[name] for name in ("step", *names)]
                if all(type(each) in (int, float) and math.isfinite(each) for each in numbers):
                    lines += [line] if last < line["step"] < step else []
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def seconds_of(log: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """The seconds of all steps of a training; None if its log no longer has them all."""
    found = [line["seconds"] for line in log if line["seconds"] >= 0]
    return round(sum(found), 1) if len(found) == steps else None
