"""What the training loop needs of a way to learn head scores, and what the two ways share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow
from kvbench.learning.recipe import HeadRecipe


class Objective(ABC):
    """A loss on the data, a penalty that does not depend on the data, and the learnt tensors."""

    recipe: HeadRecipe

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is learnt and checkpointed, by name."""

    def optimizer(self) -> torch.optim.Optimizer:
        """Steps the learnt tensors; `rate` of a parameter group is a multiple of `rate_at`."""
        return torch.optim.Adam([{"params": list(self.tensors().values()), "rate": 1.0}])

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        return self.recipe.rate * self.recipe.rate_at(step)

    @abstractmethod
    def data_loss(
        self, model: Any, rows: Sequence[TrainingRow], step: int, indices: Sequence[int]
    ) -> Tensor:
        """The sum of the rows' losses; `indices` are the rows' indices in the whole batch."""

    def penalty(self, step: int) -> Tensor | None:
        """The term that is added to the mean loss of a step's rows; None for no term."""
        return None

    def settle(self, step: int) -> None:
        """Bring the learnt tensors to where they may be, after the optimizer's step `step`."""
        return None

    @abstractmethod
    def scores(self) -> Tensor:
        """Head scores [layers, K], larger for heads that need the whole cache."""

    @abstractmethod
    def state(self, step: int) -> dict[str, float]:
        """Numbers to log beside the loss; `sparsity` (0..1) is one of them if heads are chosen."""


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor, converted to float32 if it is in half precision, so that sums are accurate."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def seeded(*parts: int) -> torch.Generator:
    """A generator on the CPU whose seed is made from several numbers."""
    seed = 0
    for part in parts:
        seed = seed * 1_000_003 + part
    return torch.Generator().manual_seed(seed % 2**62)


def forward(model: Any, ids: Tensor, attention: GatedAttention, **wanted: Any) -> Any:
    """The model's output for `ids` [B, T] with `attention`; `wanted` are arguments of the model."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        kv=attention,
        kv_positions=positions,
        **wanted,
    )
