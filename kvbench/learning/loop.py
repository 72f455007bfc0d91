"""The training loop of head scores: on one process or, under `accelerate launch`, on several."""

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
from kvbench.files import write_atomically
from kvbench.learning.objective import Objective
from kvbench.learning.recipe import HeadRecipe
from kvbench.learning.rows import Rows

FORWARD_TOKENS = 8192  # tokens of a forward pass, unless one row is longer
CHECKPOINT_SECONDS = 60
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
ADAM = ("step", "exp_avg", "exp_avg_sq")  # Adam's state of a tensor


def learn(
    model: Any,
    objective: Objective,
    rows: Rows,
    recipe: HeadRecipe,
    out: Path,
    accelerator: Any,
    report: Callable[[dict[str, float]], None],
) -> list[dict[str, float]]:
    """Train to the recipe's last step, continuing from a checkpoint in `out`; return the log.

    A line of the log has `step`, `loss`, the objective's `state` and `seconds`; `report` gets each
    as it is written. Every process computes its share of each step's rows. Gradients are summed
    over processes, so the number of processes changes nothing but rounding. A checkpoint is saved
    every minute and on an interrupt. InputError if the training diverges, or if the checkpoint is
    unusable. On processes other than the first, nothing is written and the log is empty.
    """
    out.mkdir(parents=True, exist_ok=True)
    weights, groups = {}, objective.groups()
    if recipe.weights_rate:
        weights = {f"model.{name}": p for name, p in model.named_parameters()}
        share = recipe.weights_rate / recipe.rate
        groups.append({"params": list(weights.values()), "rate": share})
    optimizer = torch.optim.Adam(groups, lr=recipe.rate)
    learnt = objective.tensors() | weights
    step = restore(out / CHECKPOINT, recipe, learnt, optimizer)
    writes = accelerator.is_main_process
    log = resume_log(out / LOG, step) if writes else []
    saved, diverged = time.monotonic(), False
    try:
        while step < recipe.steps:
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * group["rate"] * recipe.rate_at(step)
            started = time.monotonic()
            loss = gradients(model, objective, rows, recipe, step, accelerator)
            for tensor in learnt.values():
                if tensor.grad is not None:
                    tensor.grad = accelerator.reduce(tensor.grad, "sum")
            line = {"step": step, "loss": loss, **objective.state(step)}
            with uninterrupted():  # a checkpoint of half a step would repeat it on resuming
                optimizer.step()
                optimizer.zero_grad()
                objective.clip()
                step += 1
                line["seconds"] = time.monotonic() - started
                if writes:
                    log.append(line)
                    with (out / LOG).open("a") as file:
                        file.write(json.dumps(line) + "\n")
            diverged = not all(torch.isfinite(t).all() for t in learnt.values())
            if diverged:
                raise InputError(f"the training diverged at step {step - 1}: give a smaller --rate")
            if writes:
                report(line)
            if writes and time.monotonic() - saved > CHECKPOINT_SECONDS:
                save_checkpoint(out / CHECKPOINT, recipe, learnt, optimizer, step)
                saved = time.monotonic()
    finally:
        if writes and not diverged:
            save_checkpoint(out / CHECKPOINT, recipe, learnt, optimizer, step)
    return log


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block has ended."""
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
    model: Any, objective: Objective, rows: Rows, recipe: HeadRecipe, step: int, accelerator: Any
) -> float:
    """Add the gradients of this process's rows; return the mean loss of all processes' rows."""
    mine = range(accelerator.process_index, recipe.batch, accelerator.num_processes)
    total = torch.zeros((), device=objective.scores().device)
    together = max(1, FORWARD_TOKENS // recipe.length)
    for first in range(0, len(mine), together):
        indices = mine[first : first + together]
        made = [rows.row(step, index) for index in indices]
        loss = objective.data_loss(model, made, step, indices) / recipe.batch
        loss.backward()
        total += loss.detach()
    (objective.penalty(step) / accelerator.num_processes).backward()
    return float(accelerator.reduce(total, "sum"))


def save_checkpoint(
    path: Path,
    recipe: HeadRecipe,
    learnt: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
) -> None:
    """Write the learnt tensors, Adam's state and the step; an earlier file is replaced at once."""
    tensors = {name: t.detach().contiguous() for name, t in learnt.items()}
    for name, tensor in learnt.items():
        for key, value in optimizer.state.get(tensor, {}).items():
            tensors[f"adam.{key}/{name}"] = value.contiguous()
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"step": str(step), "recipe": recipe_text(recipe)})
    os.replace(part, path)


def restore(
    path: Path, recipe: HeadRecipe, learnt: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load a checkpoint and return its step, 0 if there is none.

    InputError if the checkpoint is broken or belongs to other settings.
    """
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"checkpoint '{path}' is broken ({error}); delete it to start again"
        ) from None
    if metadata.get("recipe") != recipe_text(recipe):
        raise InputError(
            f"'{path.parent}' holds a training with other settings: choose another --out"
        )
    with torch.no_grad():
        for name, tensor in learnt.items():
            tensor.copy_(tensors[name])
            if f"adam.step/{name}" in tensors:
                optimizer.state[tensor] = {
                    key: tensors[f"adam.{key}/{name}"].to(tensor.device) for key in ADAM
                }
    return int(metadata["step"])


def recipe_text(recipe: HeadRecipe) -> str:
    """A recipe as text, to compare."""
    return json.dumps(asdict(recipe), sort_keys=True)


def resume_log(path: Path, step: int) -> list[dict[str, float]]:
    """The log's lines before `step`; lines that a killed run added after its checkpoint go."""
    lines = []
    if path.is_file():
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if line["step"] < step:
                lines.append(line)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines
