"""The training loop of head scores: on one process or, under `accelerate launch`, on many."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvbench.errors import InputError
from kvbench.learning.objective import Objective
from kvbench.learning.recipe import Recipe
from kvbench.learning.rows import Rows

AT_ONCE = 8192  # tokens of a forward pass, as far as rows are shorter than that
CHECKPOINT_SECONDS = 60
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"


def learn(
    model: Any,
    objective: Objective,
    rows: Rows,
    recipe: Recipe,
    out: Path,
    accelerator: Any,
    report: Callable[[dict[str, float]], None],
) -> list[dict[str, float]]:
    """Train to the recipe's last step, on from `out`'s checkpoint if it has one; return the log.

    Every process computes its share of each step's rows; gradients are summed over processes, so
    their number changes nothing but rounding. Interrupting saves a checkpoint.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights = {}
    if recipe.weights_rate:
        weights = {f"model.{name}": p for name, p in model.named_parameters()}
    groups = objective.groups()
    if weights:
        share = recipe.weights_rate / recipe.rate
        groups.append({"params": list(weights.values()), "rate": share})
    optimizer = torch.optim.Adam(groups, lr=recipe.rate)
    learnt = objective.tensors() | weights
    step = restore(out / CHECKPOINT, recipe, learnt, optimizer)
    log = resume_log(out / LOG, step) if accelerator.is_main_process else []

    def checkpoint() -> None:
        if accelerator.is_main_process and not diverged:
            save_checkpoint(out / CHECKPOINT, recipe, learnt, optimizer, step)

    saved = time.monotonic()
    diverged = False
    try:
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * group["rate"] * recipe.rate_at(step)
            started = time.monotonic()
            loss = gradients(model, objective, rows, recipe, step, accelerator)
            for tensor in learnt.values():
                if tensor.grad is not None:
                    tensor.grad = accelerator.reduce(tensor.grad, "sum")
            state = objective.state(step)
            with uninterrupted():  # a checkpoint of half a step would repeat it on resuming
                optimizer.step()
                optimizer.zero_grad()
                objective.settle()
                step += 1
                line = {"step": step - 1, "loss": loss, **state}
                line["seconds"] = time.monotonic() - started
                if accelerator.is_main_process:
                    log.append(line)
                    append_line(out / LOG, line)
            diverged = not all(torch.isfinite(t).all() for t in learnt.values())
            if diverged:
                raise InputError(f"the training diverged at step {step - 1}: give a smaller --rate")
            if accelerator.is_main_process:
                report(line)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                checkpoint()
                saved = time.monotonic()
    finally:
        checkpoint()
    return log


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended."""
    waiting: list[tuple[int, FrameType | None]] = []
    if threading.current_thread() is not threading.main_thread():
        yield  # signals never interrupt another thread
        return
    before = signal.signal(signal.SIGINT, lambda *call: waiting.append(call))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting and callable(before):
            before(*waiting[0])


def gradients(
    model: Any, objective: Objective, rows: Rows, recipe: Recipe, step: int, accelerator: Any
) -> float:
    """Add a step's gradients of this process's rows; return the loss over all processes' rows."""
    mine = range(accelerator.process_index, recipe.batch, accelerator.num_processes)
    total = torch.zeros((), device=accelerator_device(objective))
    together = max(1, AT_ONCE // recipe.length)
    for first in range(0, len(mine), together):
        indices = mine[first : first + together]
        made = [rows.row(step, index) for index in indices]
        loss = objective.data_loss(model, made, step, indices) / recipe.batch
        loss.backward()
        total += loss.detach()
    (objective.penalty(step) / accelerator.num_processes).backward()
    return float(accelerator.reduce(total, "sum"))


def accelerator_device(objective: Objective) -> torch.device:
    """Where an objective's tensors are."""
    return next(iter(objective.tensors().values())).device


def adam_tensors(
    learnt: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """Adam's state of each tensor, by name."""
    for name, tensor in learnt.items():
        for key, value in optimizer.state[tensor].items():
            yield f"adam.{key}/{name}", value


def save_checkpoint(
    path: Path,
    recipe: Recipe,
    learnt: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Write what is learnt, Adam's state and the step; an earlier checkpoint is replaced whole."""
    tensors = {name: t.detach().contiguous() for name, t in learnt.items()}
    tensors |= {name: t.contiguous() for name, t in adam_tensors(learnt, optimizer)}
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"step": str(step), "recipe": recipe_text(recipe)})
    os.replace(part, path)


def restore(
    path: Path, recipe: Recipe, learnt: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint and return its step; 0 if there is none.

    InputError if it is of other settings or broken.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint '{path}' is broken ({error}); delete it to start") from None
    if metadata.get("recipe") != recipe_text(recipe):
        raise InputError(
            f"'{path.parent}' holds a training with other settings: choose another --out"
        )
    with torch.no_grad():
        for name, tensor in learnt.items():
            tensor.copy_(tensors[name])
            state = {
                key.removeprefix("adam.").partition("/")[0]: value.to(tensor.device)
                for key, value in tensors.items()
                if key.startswith("adam.") and key.partition("/")[2] == name
            }
            if state:
                optimizer.state[tensor] = state
    return int(metadata["step"])


def recipe_text(recipe: Recipe) -> str:
    """A recipe as text, to compare."""
    return json.dumps(asdict(recipe), sort_keys=True)


def resume_log(path: Path, step: int) -> list[dict[str, float]]:
    """The log's lines before `step`; what a killed run logged after its checkpoint is dropped."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["step"] < step:
                lines.append(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def append_line(path: Path, line: dict[str, float]) -> None:
    """One JSON line, flushed."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
