"""What a way of learning head scores is, to the training loop."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from kvbench.learning.rows import Row


class Objective(Protocol):
    """A loss of the data, a penalty that does not depend on it, and what they are minimised in."""

    def tensors(self) -> dict[str, Tensor]:
        """All that is learnt, by name; checkpointed."""
        ...

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups for Adam; `rate` is a share of the recipe's."""
        ...

    def data_loss(
        self, model: Any, rows: Sequence[Row], step: int, indices: Sequence[int]
    ) -> Tensor:
        """The sum over rows of each row's loss; `indices` are their places in the whole batch."""
        ...

    def penalty(self, step: int) -> Tensor:
        """What is added to the mean loss of a step's rows."""
        ...

    def settle(self) -> None:
        """Bring what was learnt back into its bounds after a step."""
        ...

    def scores(self) -> Tensor:
        """[layers, K], larger for heads that need the whole cache."""
        ...

    def state(self, step: int) -> dict[str, float]:
        """What to log beside the loss."""
        ...


def padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T], and whether the *next* token's prediction counts [B, T]; padded at the right.

    Causal attention never looks at what is to the right, so padding needs no mask.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    counts = torch.zeros((len(rows), length), dtype=torch.bool)
    for place, row in enumerate(rows):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        counts[place, : len(row.ids) - 1] = torch.tensor(row.counts[1:])
    return ids.to(device), counts.to(device)


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor whose sums can be trusted: half precision as float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def forward(model: Any, ids: Tensor, attention: Any, **wanted: Any) -> Any:
    """The model's output with `attention` in place of a KV cache; gradients as they are enabled."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        kv=attention,
        kv_positions=positions,
        **wanted,
    )
