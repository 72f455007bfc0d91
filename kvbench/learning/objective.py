"""What the training loop needs of a way to learn head scores, and what the two ways share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.learning.attention import GatedAttention
from kvbench.learning.examples import TrainingRow


class Objective(ABC):
    """A loss on the data, a penalty that does not depend on the data, and the learnt tensors."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is learnt and checkpointed, by name."""

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for Adam; their `rate` is a multiple of the recipe's rate."""
        return [{"params": list(self.tensors().values()), "rate": 1.0}]

    @abstractmethod
    def data_loss(
        self, model: Any, rows: Sequence[TrainingRow], step: int, indices: Sequence[int]
    ) -> Tensor:
        """The sum of the rows' losses; `indices` are the rows' indices in the whole batch."""

    @abstractmethod
    def penalty(self, step: int) -> Tensor:
        """The term that is added to the mean loss of a step's rows."""

    @abstractmethod
    def clip(self) -> None:
        """Bring the learnt tensors back into their bounds after a step."""

    @abstractmethod
    def scores(self) -> Tensor:
        """Head scores [layers, K], larger for heads that need the whole cache."""

    @abstractmethod
    def state(self, step: int) -> dict[str, float]:
        """Numbers to log beside the loss; `sparsity` (0..1) is one of them."""


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
