"""Training the embedded model: `kvbench train tiny`.

A small Llama learns the synthetic tasks from their own generators; only the answers count in the
loss. Three things make it learn on two cores: many turns about each context, an initialisation with
parts of induction heads (`tiny_model.py`), and contexts that grow once the present length is
learnt.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvbench.files import write_atomically
from kvbench.learning.checkpoint import (
    Checkpoints,
    digest,
    holding,
    resume_log,
    save_model,
    writing,
)
from kvbench.learning.examples import ExampleMaker, TrainingRow, padded
from kvbench.learning.loop import LOG, uninterrupted
from kvbench.learning.recipe import TinyRecipe
from kvbench.learning.tiny_model import tiny_model
from kvbench.learning.tiny_tokenizer import tiny_tokenizer
from kvbench.machine import limit_threads
from kvbench.models.load import quiet

LEAST_STEPS = 100  # of a stage


@dataclass
class Progress:
    """How far a training has come."""

    step: int = 0
    stage: int = 0
    stage_began: int = 0  # step
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)  # running mean, by "task/subtask"

    def count(self, subtask: str, share: float) -> None:
        """Update a running mean with the share of right answers of one example."""
        old = self.accuracy.get(subtask, 0.0)
        self.accuracy[subtask] = old + 0.05 * (share - old)

    def maybe_next_stage(self, recipe: TinyRecipe, done: float) -> None:
        """Start the next stage if this one is learnt or overdue, not before `LEAST_STEPS`.

        `done` is the share of the training time that is over.
        """
        learnt = min(self.accuracy.values()) >= recipe.pass_mark
        overdue = done > recipe.growth * (self.stage + 1) / len(recipe.stages)
        last = self.stage == len(recipe.stages) - 1
        if self.step - self.stage_began >= LEAST_STEPS and not last and (learnt or overdue):
            self.stage += 1
            self.stage_began = self.step


def train_tiny(
    recipe: TinyRecipe, out: Path, say: Callable[[str], None], start: Path | None = None
) -> Progress:
    """Train as long as the recipe says and write the model, its tokenizer and the log to `out`.

    `start` is the folder of an earlier training, to continue from its weights and tokenizer.
    `say` gets a line of progress now and then. A training that is in `out` is continued from its
    last checkpoint. Returns how far the training has come. InputError if `out` cannot be written
    to, or holds a training with other settings.
    """
    quiet()
    limit_threads()
    with holding(out):
        tokenizer = (
            PreTrainedTokenizerFast.from_pretrained(start) if start else tiny_tokenizer(recipe.seed)
        )
        model = tiny_model(recipe, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id)
        if start:
            earlier = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
            model.load_state_dict(earlier.state_dict())
        model.train()
        optimizers = make_optimizers(model, recipe)
        checkpoints = Checkpoints(
            out,
            {**asdict(recipe), "start": weights_hash(model) if start else None},
            dict(model.named_parameters()),
            [optimizer for optimizer, _ in optimizers],
        )
        progress = Progress(**(checkpoints.restore() or {}))
        if checkpoints.note:
            say(checkpoints.note)
        with writing(out):
            write_atomically(out / "recipe.json", json.dumps(asdict(recipe), indent=1) + "\n")
            resume_log(out / LOG, progress.step + 1)
        try:
            train_steps(recipe, model, tokenizer, optimizers, progress, checkpoints, say)
        finally:
            checkpoints.save(asdict(progress))
        with writing(out):
            save_model(out, model, tokenizer)
    return progress


def train_steps(
    recipe: TinyRecipe,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: list[tuple[torch.optim.Optimizer, float]],
    progress: Progress,
    checkpoints: Checkpoints,
    say: Callable[[str], None],
) -> None:
    """Make the steps that are left, with a line of the log every 25 and checkpoints in between."""
    maker = ExampleMaker(tokenizer, tokenizer.eos_token_id)
    started = time.monotonic() - progress.seconds
    while (done := recipe.done(progress.step, progress.seconds)) < 1:
        warmth = min(1.0, (progress.step + 1) / recipe.warm_up)
        factor = warmth * min(1.0, (1 - done) / recipe.cool_down)
        examples = draw_examples(recipe, progress, maker)
        loss, shares = answer_loss(model, *padded(examples, tokenizer.pad_token_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with uninterrupted():
            for optimizer, rate in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
                optimizer.step()
                optimizer.zero_grad()
            for example, share in zip(examples, shares.tolist(), strict=True):
                progress.count(example.subtask, share)
            progress.step += 1
            progress.seconds = time.monotonic() - started
            progress.maybe_next_stage(recipe, done)
        if progress.step % 25 == 0:
            line = log_line(recipe, progress, loss.item())
            with writing(checkpoints.folder), (checkpoints.folder / LOG).open("a") as log:
                log.write(json.dumps(line) + "\n")
            if progress.step % 100 == 0:
                say(progress_text(line, recipe))
        if checkpoints.due:
            checkpoints.save(asdict(progress))


def weights_hash(model: LlamaForCausalLM) -> str:
    """A hash of a model's weights."""
    return digest(model.state_dict(), "")[:20]


def draw_examples(recipe: TinyRecipe, progress: Progress, maker: ExampleMaker) -> list[TrainingRow]:
    """The examples of one step: all of one length, weaker subtasks more often.

    A quarter of the steps use the length of a random stage so far, so that the model does not
    forget short contexts.
    """
    rng = random.Random(f"train/{recipe.seed}/{progress.step}")
    stage = progress.stage if rng.random() < 0.75 else rng.randint(0, progress.stage)
    length = recipe.stages[stage]
    weights = [1.1 - progress.accuracy.get(name, 0.0) for name in maker.subtasks]
    chosen = rng.choices(maker.subtasks, weights, k=max(1, recipe.tokens_a_step // length))
    return [maker.make(name, rng, length) for name in chosen]


def answer_loss(model: LlamaForCausalLM, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """The answers' cross-entropy, averaged over examples; [B] the share of exactly right answers.

    `ids` and `answers` [B, T] are those of `padded`.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state
    rows, places = answers.nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, places].float())
    wanted = ids[rows, places + 1]
    each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
    # Each example counts once, or the long answers of tables would outweigh those of rankings.
    loss = (each / (answers > 0).sum(1)[rows]).sum() / len(ids)
    with torch.no_grad():
        wrong = torch.zeros_like(answers)
        wrong[rows, places] = (logits.argmax(-1) != wanted).long()
        count = answers.amax(1)
        per_answer = torch.zeros(len(ids), int(count.max()) + 1, dtype=torch.long)
        per_answer.scatter_add_(1, answers, wrong)
        failed = (per_answer[:, 1:] > 0).sum(1)
        share = 1 - failed / count
    return loss, share


def make_optimizers(
    model: LlamaForCausalLM, recipe: TinyRecipe
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the layers' matrices and AdamW for the rest, each with its highest rate."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(
        matrices,
        lr=recipe.matrix_rate,
        weight_decay=recipe.decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, recipe.matrix_rate), (adamw, recipe.rate)]


def log_line(recipe: TinyRecipe, progress: Progress, loss: float) -> dict[str, Any]:
    """A line of log.jsonl: `length` is in tokens, `accuracy` a running mean by subtask."""
    return {
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "length": recipe.stages[progress.stage],
        "loss": round(loss, 4),
        "accuracy": {n: round(a, 3) for n, a in sorted(progress.accuracy.items())},
    }


def progress_text(line: dict[str, Any], recipe: TinyRecipe) -> str:
    """A line of the log as a user reads it."""
    weakest, accuracy = min(line["accuracy"].items(), key=lambda item: item[1])
    passed = f"{line['seconds'] / 60:.1f} of {recipe.minutes:g} min, step {line['step']}"
    if recipe.steps is not None:
        passed = f"step {line['step']} of {recipe.steps}"
    return (
        f"{passed}, {line['length']} tokens, loss {line['loss']:.3f}, "
        f"weakest {weakest} {accuracy:.2f}"
    )
