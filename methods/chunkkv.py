"""ChunkKV: SnapKV's scores, and chunks of neighbours that stay or go together."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.method import LayerView
from kvbench.registry import register_method

from ._whole_row import WholeRow


@register_method("chunkkv")
@dataclass(frozen=True)
class ChunkKV(WholeRow):
    """Keep whole chunks of neighbours, one choice a layer (Liu et al., arXiv 2502.00299)."""

    length: int = field(default=20, metadata={"help": "Entries of a chunk."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.length >= 1, f"length must be at least 1, not {self.length}")

    def select(self, view: LayerView, scores: Tensor, capacity: int) -> Tensor:
        """The chunks of highest mean, the same for all KV heads; of the last one its first part."""
        summed = scores.double().sum(0)  # so that chunks of equal entries have equal means
        entries, length = len(summed), self.length
        chunks = pad(summed, (0, -entries % length)).unflatten(0, (-1, length))
        starts = torch.arange(len(chunks), device=summed.device) * length
        means = chunks.sum(1) / (entries - starts).clamp_max(length)
        best = starts[means.topk(len(means)).indices]
        chosen = (best[:, None] + torch.arange(length, device=summed.device)).flatten()
        there = (chosen >= entries).argsort(stable=True)  # what is padding goes last
        return chosen[there[:capacity]].expand(len(scores), -1)
