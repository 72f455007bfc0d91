"""CriticalKV: SnapKV's scores times the values' norms after the output projection."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.errors import InputError
from kvbench.method import LayerView, Need
from kvbench.registry import register_method

from ._whole_row import WholeRow

ROWS = 512  # entries whose values are projected at once


@register_method("criticalkv")
@dataclass(frozen=True)
class CriticalKV(WholeRow):
    """Keep half by attention, half by attention and values (Feng et al., arXiv 2502.03805)."""

    needs = frozenset({Need.MODULE})
    first: float = field(default=0.5, metadata={"help": "Share kept by attention alone."})
    epsilon: float = field(default=1e-4, metadata={"help": "Added to the scores of the rest."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 <= self.first <= 1, f"first must be from 0 to 1, not {self.first}")
        self.check(self.epsilon >= 0, f"epsilon must be at least 0, not {self.epsilon}")

    def select(self, view: LayerView, scores: Tensor, capacity: int) -> Tensor:
        """First those of highest scores, then those of highest score times projected norm."""
        end = view.entries - view.patched
        first = scores.topk(max(1, int(self.first * capacity))).indices
        second = (scores + self.epsilon) * self._norms(view)[:, end - view.new : end]
        return second.scatter(1, first, torch.inf).topk(capacity).indices

    def _norms(self, view: LayerView) -> Tensor:
        """[K, E], the L1 norm of each value after `o_proj`, averaged over the query group."""
        group, size = view.queries.shape[1], view.values.shape[2]
        weight = getattr(getattr(view.module, "o_proj", None), "weight", None)
        heads = 0 if weight is None else weight.shape[1] / (group * size)
        if weight is None or heads <= max(view.kv_heads) or heads % 1:
            raise InputError(
                f"criticalkv: the attention of layer {view.layer} has no o_proj.weight for "
                f"{group} x {size} values of each KV head; choose snapkv for this model"
            )
        projections = weight.float().T.unflatten(0, (-1, group, size))
        rows = []
        for head, values in zip(view.kv_heads, view.values, strict=True):
            pieces = values.split(ROWS)
            parts = (piece.float() @ projections[head] for piece in pieces)  # [G, rows, hidden]
            rows.append(torch.cat([part.abs().sum(-1).mean(0) for part in parts]))
        return torch.stack(rows)
