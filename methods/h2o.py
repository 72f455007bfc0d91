"""H2O: heavy hitters and a recent window."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.method import EVERY_QUERY, DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("h2o")
@dataclass(frozen=True)
class H2O(DecodingMethod):
    """Keep recent entries and those of most attention so far (Zhang et al., arXiv 2306.14048)."""

    recent: float = field(
        default=0.5, metadata={"help": "Share of the capacity for the most recent entries."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(0 <= self.recent <= 1, f"recent must be from 0 to 1, not {self.recent}")

    @property
    def observation_window(self) -> int:
        """All queries, so that attention is summed over all of them."""
        return EVERY_QUERY

    def gather(self, view: LayerView) -> Tensor:
        """[K, E], the attention that each entry has got from all queries so far."""
        return view.attention if view.gathered is None else view.gathered + view.attention

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], what was gathered."""
        assert view.gathered is not None
        return view.gathered

    def select(self, view: LayerView, scores: Tensor, capacity: int) -> Tensor:
        """The most recent entries, and of the others those of most attention."""
        recent = int(self.recent * capacity)
        older = scores.shape[1] - recent
        best = scores[:, :older].topk(capacity - recent).indices
        latest = torch.arange(older, scores.shape[1], device=scores.device)
        return torch.cat([best, latest.expand(len(scores), -1)], dim=1)
