"""DuoAttention: gates learnt by distillation on synthetic passkeys (2410.10819, section 3.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow, padded
from kvbench.learning.objective import Objective, at_least_float32, forward
from kvbench.learning.recipe import HeadRecipe
from kvbench.method import KVShape


class DuoAttention(Objective):
    """One gate in [0, 1] per KV head, 1 at the start, pulled down by an L1 penalty."""

    def __init__(self, shape: KVShape, recipe: HeadRecipe, device: torch.device) -> None:
        self.recipe, self.acting = recipe, shape.acting
        self.gate = torch.ones(shape.layers, shape.kv_heads, device=device, requires_grad=True)

    def tensors(self) -> dict[str, Tensor]:
        return {"gate": self.gate}

    def data_loss(
        self, model: Any, rows: Sequence[TrainingRow], step: int, indices: Sequence[int]
    ) -> Tensor:
        """Mean squared difference to full attention's last hidden states, over the answers."""
        ids, answers = (tensor.to(self.gate.device) for tensor in padded(rows))
        counts = answers > 0
        sinks, window = self.recipe.sinks, self.recipe.window
        with torch.no_grad():
            full = last_hidden(model, ids, GatedAttention(None, sinks, window))
        gated = GatedAttention(
            self.gate[:, None], sinks, window, self.acting, chunk=self.recipe.train_chunk
        )
        mixed = last_hidden(model, ids, gated)
        distance = (at_least_float32(mixed) - at_least_float32(full)).square().mean(-1)
        return ((distance * counts).sum(1) / counts.sum(1).clamp(min=1)).sum()

    def penalty(self, step: int) -> Tensor:
        """L1, divided by the number of heads so that its weight suits models of any size."""
        assert self.recipe.l1 is not None
        return self.recipe.l1 * self.gate.abs().mean()

    @torch.no_grad()
    def settle(self, step: int) -> None:
        self.gate.clamp_(0, 1)

    def scores(self) -> Tensor:
        return self.gate.detach()

    def state(self, step: int) -> dict[str, float]:
        """The sparsity of the gates: one minus their mean."""
        return {"sparsity": 1 - self.gate.mean().item()}


def last_hidden(model: Any, ids: Tensor, attention: GatedAttention) -> Tensor:
    """The last hidden states [B, T, hidden], after the final norm."""
    out = forward(model, ids, attention, output_hidden_states=True, logits_to_keep=1)
    states: Tensor = out.hidden_states[-1]
    return states
