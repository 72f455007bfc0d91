"""PruLong: masks learnt by next-token loss under a sparsity target (2506.17121, section 4)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow
from kvbench.learning.masks import (
    constraint,
    expected_sparsity,
    hard_concrete,
    shifted_to,
    target_at,
    zero_probability,
)
from kvbench.learning.objective import Objective, seeded
from kvbench.learning.optimizer import SharedAdam
from kvbench.learning.recipe import HeadRecipe
from kvbench.learning.text_loss import make_focus, text_loss
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
        self.exact = recipe.constraint == "exact"
        self.mean = torch.zeros_like(self.log_alpha, requires_grad=False)  # over all steps
        if self.exact:
            self.log_alpha.register_hook(self.along_target)
        self.focus = make_focus(recipe, shape)

    def tensors(self) -> dict[str, Tensor]:
        if self.exact:
            return {"log_alpha": self.log_alpha, "mean": self.mean}
        return {"log_alpha": self.log_alpha, "multipliers": self.multipliers}

    def optimizer(self) -> torch.optim.Optimizer:
        """The masks descend on the loss; the multipliers, if there are any, ascend."""
        if self.exact:
            return SharedAdam([{"params": [self.log_alpha], "rate": 1.0}])
        assert self.recipe.multiplier_rate is not None
        ascent = self.recipe.multiplier_rate / self.recipe.rate
        return torch.optim.Adam(
            [
                {"params": [self.log_alpha], "rate": 1.0},
                {"params": [self.multipliers], "rate": ascent, "maximize": True},
            ]
        )

    @torch.no_grad()
    def along_target(self, gradient: Tensor) -> Tensor:
        """The gradient without the common part, which the shift to the target would take back."""
        zero = zero_probability(self.log_alpha)
        pull = zero * (1 - zero)  # how the sparsity follows each head's log_alpha
        return gradient - (pull * gradient).sum() / pull.sum()

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
        attention = GatedAttention(
            self.gates(step, indices),
            self.recipe.sinks,
            self.recipe.window,
            self.acting,
            chunk=self.recipe.train_chunk,
            fixed=True,
        )
        return text_loss(model, rows, step, self.recipe, attention, self.focus)

    def penalty(self, step: int) -> Tensor | None:
        """The Lagrangian of the sparsity constraint at the step's target, if it has one."""
        if self.exact:
            return None
        return constraint(expected_sparsity(self.log_alpha), self.target(step), self.multipliers)

    def target(self, step: int) -> float:
        """The sparsity target of a step."""
        assert self.recipe.target is not None
        return target_at(step, self.recipe.steps, self.recipe.target)

    @torch.no_grad()
    def settle(self, step: int) -> None:
        if self.exact:
            self.log_alpha.copy_(shifted_to(self.log_alpha, self.target(step + 1), BOUND))
            self.mean += self.log_alpha / self.recipe.steps
        self.log_alpha.clamp_(-BOUND, BOUND)

    def scores(self) -> Tensor:
        """log_alpha at the end, as in the paper; with `constraint=exact` its mean over all steps.

        The mean has less of the noise of the last steps, and orders heads that reached the same
        bound by when they reached it.
        """
        return self.mean if self.exact else self.log_alpha.detach()

    def state(self, step: int) -> dict[str, float]:
        sparsity = expected_sparsity(self.log_alpha.detach()).item()
        shown = {"sparsity": sparsity, "target": self.target(step)}
        if not self.exact:
            shown["l1"], shown["l2"] = self.multipliers.tolist()
        return shown
