"""Saliency: the gradient of the next-token loss by each head's gate, at full attention.

No mask is learnt; it is the control that learnt masks must beat. A head's score is the rise of the
loss, to first order, if the head alone streams (as Michel et al., 1905.10650, score heads, but with
its sign).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow
from kvbench.learning.objective import Objective
from kvbench.learning.recipe import HeadRecipe
from kvbench.learning.text_loss import make_focus, text_loss
from kvbench.method import KVShape


class Saliency(Objective):
    """One score per KV head: minus the mean gradient of its gate over all rows."""

    def __init__(self, shape: KVShape, recipe: HeadRecipe, device: torch.device) -> None:
        self.recipe, self.acting = recipe, shape.acting
        self.score = torch.zeros(shape.layers, shape.kv_heads, device=device, requires_grad=True)
        self.focus = make_focus(recipe, shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"score": self.score}

    def optimizer(self) -> torch.optim.Optimizer:
        """Plain gradient descent at a constant rate of 1 / steps: its sum is the mean."""
        return torch.optim.SGD([{"params": [self.score], "rate": 1.0}])

    def rate_at(self, step: int) -> float:
        return 1 / self.recipe.steps

    def data_loss(
        self, model: Any, rows: Sequence[TrainingRow], step: int, indices: Sequence[int]
    ) -> Tensor:
        """The loss at full attention; all gates are 1 and have a gradient."""
        gates = 1 + self.score - self.score.detach()
        attention = GatedAttention(
            gates[:, None],
            self.recipe.sinks,
            self.recipe.window,
            self.acting,
            chunk=self.recipe.train_chunk,
        )
        return text_loss(model, rows, step, self.recipe, attention, self.focus)

    def scores(self) -> Tensor:
        return self.score.detach()

    def state(self, step: int) -> dict[str, float]:
        return {}
