"""PruLong: masks learnt end to end by next-token loss under a sparsity target (2506.17121, 4)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.learning.attention import GatedAttention
from kvbench.learning.masks import constraint, expected_sparsity, hard_concrete, target_at
from kvbench.learning.objective import at_least_float32, forward, padded
from kvbench.learning.recipe import Recipe
from kvbench.learning.rows import Row
from kvbench.method import KVShape

START = 4.0  # of log_alpha: nearly all masks are 1
SPREAD = 0.01  # of the noise around it
BOUND = math.log(100)  # of log_alpha: beyond it masks are settled and P(mask = 0) has no slope left


class PruLong:
    """One hard-concrete mask per KV head, sampled anew for every row of every step."""

    def __init__(self, shape: KVShape, recipe: Recipe, device: torch.device) -> None:
        noise = torch.randn(
            shape.layers, shape.kv_heads, generator=torch.Generator().manual_seed(recipe.seed)
        )
        self.recipe = recipe
        self.log_alpha = (START + SPREAD * noise).to(device).requires_grad_()
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)

    def tensors(self) -> dict[str, Tensor]:
        """The masks' parameters and the multipliers."""
        return {"log_alpha": self.log_alpha, "multipliers": self.multipliers}

    def groups(self) -> list[dict[str, Any]]:
        """The masks descend, the multipliers ascend."""
        assert self.recipe.multiplier_rate is not None
        ascent = self.recipe.multiplier_rate / self.recipe.rate
        return [
            {"params": [self.log_alpha], "rate": 1.0},
            {"params": [self.multipliers], "rate": ascent, "maximize": True},
        ]

    def gates(self, step: int, indices: Sequence[int]) -> Tensor:
        """Masks [layers, B, K]; a row's noise depends on its place in the step's whole batch."""
        noise = []
        for index in indices:
            seed = (self.recipe.seed * 1_000_003 + step) * 1_000_003 + index
            generator = torch.Generator().manual_seed(seed % 2**62)
            noise.append(torch.rand(self.log_alpha.shape, generator=generator))
        uniform = torch.stack(noise, dim=1).to(self.log_alpha.device)
        return hard_concrete(self.log_alpha[:, None], uniform)

    def data_loss(
        self, model: Any, rows: Sequence[Row], step: int, indices: Sequence[int]
    ) -> Tensor:
        """Next-token cross-entropy, the mean over each row's predicted tokens."""
        ids, counts = padded(rows, self.log_alpha.device)
        counts &= self.drawn(counts, step)
        places = counts.any(0).nonzero()[:, 0]
        attention = GatedAttention(self.gates(step, indices), self.recipe.sinks, self.recipe.window)
        logits = at_least_float32(forward(model, ids, attention, logits_to_keep=places).logits)
        wanted = ids[:, places + 1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), wanted.flatten(), reduction="none"
        ).view_as(wanted)
        counted = counts[:, places]
        return ((each * counted).sum(1) / counted.sum(1).clamp(min=1)).sum()

    def drawn(self, counts: Tensor, step: int) -> Tensor:
        """Which places [T] of a long row are predicted: logits of all would not fit at 128K."""
        length, most = counts.shape[1], self.recipe.loss_tokens
        assert most is not None
        chosen = torch.zeros(length, dtype=torch.bool)
        seed = self.recipe.seed * 1_000_003 + step
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed % 2**62))
        chosen[order[:most]] = True
        return chosen.to(counts.device)

    def penalty(self, step: int) -> Tensor:
        """The Lagrangian of the sparsity constraint at the step's target."""
        return constraint(expected_sparsity(self.log_alpha), self.target(step), self.multipliers)

    def target(self, step: int) -> float:
        """The sparsity target of a step."""
        assert self.recipe.target is not None
        return target_at(step, self.recipe.steps, self.recipe.target)

    @torch.no_grad()
    def settle(self) -> None:
        """Keep log_alpha where the constraint can still move it."""
        self.log_alpha.clamp_(-BOUND, BOUND)

    def scores(self) -> Tensor:
        """log_alpha."""
        return self.log_alpha.detach()

    def state(self, step: int) -> dict[str, float]:
        """Sparsity, its target, and the multipliers."""
        l1, l2 = self.multipliers.tolist()
        return {
            "sparsity": expected_sparsity(self.log_alpha.detach()).item(),
            "target": self.target(step),
            "l1": l1,
            "l2": l2,
        }
