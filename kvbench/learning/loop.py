"""The training loop of head scores: on one process or, under `accelerate launch`, on several."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from kvbench.errors import InputError
from kvbench.learning.checkpoint import Checkpoints, resume_log, writing
from kvbench.learning.objective import Objective
from kvbench.learning.recipe import HeadRecipe
from kvbench.learning.rows import Rows

FORWARD_TOKENS = 8192  # tokens of a forward pass, unless one row is longer
LOG = "log.jsonl"


def learn(
    model: Any,
    objective: Objective,
    rows: Rows,
    recipe: HeadRecipe,
    out: Path,
    accelerator: Any,
    report: Callable[[dict[str, float]], None],
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, float]]:
    """Train to the recipe's last step, continuing from a checkpoint in `out`; return the log.

    A line of the log has `step`, `loss`, the objective's `state` and `seconds`; `report` gets each
    as it is written, and `note` what a user should know. Every process computes its share of each
    step's rows. Gradients are summed over processes, so the number of processes changes nothing but
    rounding. A checkpoint is saved every minute or more often, and on an interrupt. InputError if
    the training diverges, if a file cannot be written, or if the checkpoint is unusable. On
    processes other than the first, nothing is written and the log is empty.
    """
    writes = accelerator.is_main_process
    out.mkdir(parents=True, exist_ok=True)
    weights, optimizers = {}, [objective.optimizer()]
    if recipe.weights_rate:
        weights = {f"model.{name}": p for name, p in model.named_parameters()}
        share = recipe.weights_rate / recipe.rate
        optimizers.append(torch.optim.Adam([{"params": list(weights.values()), "rate": share}]))
    learnt = objective.tensors() | weights
    settings = {**asdict(recipe), "dtype": str(next(model.parameters()).dtype)[6:]}
    checkpoints = Checkpoints(out, settings, learnt, optimizers)
    step = int((checkpoints.restore() or {"step": 0})["step"])
    log: list[dict[str, float]] = []
    if writes:
        with writing(out):
            log = resume_log(out / LOG, step, ("loss", "seconds", *objective.state(0)))
        if checkpoints.note:
            note(checkpoints.note)
    diverged = False
    try:
        while step < recipe.steps:
            for group in chain.from_iterable(each.param_groups for each in optimizers):
                group["lr"] = group["rate"] * objective.rate_at(step)
            started = time.monotonic()
            loss = gradients(model, objective, rows, recipe, step, accelerator)
            for tensor in learnt.values():
                if tensor.grad is not None:
                    tensor.grad = accelerator.reduce(tensor.grad, "sum")
            line = {"step": step, "loss": loss, **objective.state(step)}
            with uninterrupted():  # a checkpoint of half a step would repeat it on resuming
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                objective.settle(step)
                step += 1
                line["seconds"] = time.monotonic() - started
                if writes:
                    log.append(line)
                    with writing(out), (out / LOG).open("a") as file:
                        file.write(json.dumps(line) + "\n")
            diverged = not all(torch.isfinite(t).all() for t in learnt.values())
            if diverged:
                raise InputError(f"the training diverged at step {step - 1}: give a smaller --rate")
            if writes:
                report(line)
            if writes and checkpoints.due:
                checkpoints.save({"step": step})
    finally:
        if writes and not diverged:
            checkpoints.save({"step": step})
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
    if (penalty := objective.penalty(step)) is not None:
        (penalty / accelerator.num_processes).backward()
    return float(accelerator.reduce(total, "sum"))
