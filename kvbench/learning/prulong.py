"""PruLong: masks learnt by next-token loss under a sparsity target (2506.17121, section 4)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.errors import InputError
from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow, padded
from kvbench.learning.masks import constraint, expected_sparsity, hard_concrete, target_at
from kvbench.learning.objective import Objective, at_least_float32, forward, seeded
from kvbench.learning.recipe import HeadRecipe
from kvbench.method import KVShape

START = 4.0  # of log_alpha: nearly all masks are 1
SPREAD = 0.01  # standard deviation of log_alpha around START
BOUND = math.log(100)  # largest |log_alpha|; beyond it P(mask = 0) has almost no gradient


class PruLong(Objective):
    """One hard-concrete mask per KV head, sampled for every row of every step."""

    def __init__(self, shape: KVShape, recipe: HeadRecipe, device: torch.device) -> None:
        noise = torch.randn(shape.layers, shape.kv_heads, generator=seeded(recipe.seed))
        self.recipe, self.acting = recipe, shape.acting
        self.log_alpha = (START + SPREAD * noise).to(device).requires_grad_()
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)

    def tensors(self) -> dict[str, Tensor]:
        return {"log_alpha": self.log_alpha, "multipliers": self.multipliers}

    def groups(self) -> list[dict[str, Any]]:
        """The masks descend on the loss, the multipliers ascend."""
        assert self.recipe.multiplier_rate is not None
        ascent = self.recipe.multiplier_rate / self.recipe.rate
        return [
            {"params": [self.log_alpha], "rate": 1.0},
            {"params": [self.multipliers], "rate": ascent, "maximize": True},
        ]

    def gates(self, step: int, indices: Sequence[int]) -> Tensor:
        """Masks [layers, B, K]; a row's noise depends on its index in the step's whole batch."""
        noise = [
            torch.rand(self.log_alpha.shape, generator=seeded(self.recipe.seed, step, index))
            for index in indices
        ]
        uniform = torch.stack(noise, dim=1).to(self.log_alpha.device)
        return hard_concrete(self.log_alpha[:, None], uniform)

    def data_loss(
        self, model: Any, rows: Sequence[TrainingRow], step: int, indices: Sequence[int]
    ) -> Tensor:
        """Next-token cross-entropy, averaged over each row's predicted tokens."""
        ids, answers = (tensor.to(self.log_alpha.device) for tensor in padded(rows))
        counts = (answers > 0) & self.drawn(answers.shape[1], step).to(answers.device)
        if not counts.any():
            raise InputError(
                f"step {step} has no token to predict: {self.recipe.loss_tokens} of "
                f"{answers.shape[1]} tokens were drawn for the loss, and no answer is among them; "
                "give a larger --option loss_tokens"
            )
        places = counts.any(0).nonzero()[:, 0]
        gates, sinks, window = self.gates(step, indices), self.recipe.sinks, self.recipe.window
        attention = GatedAttention(gates, sinks, window, self.acting)
        logits = at_least_float32(forward(model, ids, attention, logits_to_keep=places).logits)
        wanted = ids[:, places + 1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none"
        ).view_as(wanted)
        counted = counts[:, places]
        return ((each * counted).sum(1) / counted.sum(1).clamp(min=1)).sum()

    def drawn(self, length: int, step: int) -> Tensor:
        """Which places [T] count in the loss: the logits of a whole long row need much memory."""
        chosen = torch.zeros(length, dtype=torch.bool)
        order = torch.randperm(length, generator=seeded(self.recipe.seed, step))
        chosen[order[: self.recipe.loss_tokens]] = True
        return chosen

    def penalty(self, step: int) -> Tensor:
        """The Lagrangian of the sparsity constraint at the step's target."""
        return constraint(expected_sparsity(self.log_alpha), self.target(step), self.multipliers)

    def target(self, step: int) -> float:
        """The sparsity target of a step."""
        assert self.recipe.target is not None
        return target_at(step, self.recipe.steps, self.recipe.target)

    @torch.no_grad()
    def clip(self) -> None:
        self.log_alpha.clamp_(-BOUND, BOUND)

    def scores(self) -> Tensor:
        return self.log_alpha.detach()

    def state(self, step: int) -> dict[str, float]:
        l1, l2 = self.multipliers.tolist()
        return {
            "sparsity": expected_sparsity(self.log_alpha.detach()).item(),
            "target": self.target(step),
            "l1": l1,
            "l2": l2,
        }
