"""LagKV: entries that vary most, on the scale of those that follow."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("lagkv")
@dataclass(frozen=True)
class LagKV(DecodingMethod):
    """Keep what varies most, scaled by the next entries' range (Liang et al., arXiv 2504.04704)."""

    ties_by_topk = True  # many are equal: kvpress takes these
    sinks: int = field(default=4, metadata={"help": "First entries, which stay."})
    lag: int = field(default=128, metadata={"help": "Entries of a partition; at least 2."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")
        self.check(self.lag >= 2, f"lag must be at least 2, not {self.lag}")

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], below 1: an entry's rank in its partition, as a share; 1 for what stays.

        The sinks stay, and the last whole partition with all that follows it. With fewer than two
        partitions, entries after the sinks rank by position.
        """
        scores = torch.ones_like(view.positions, dtype=torch.float32)
        after = max(0, view.entries - self.sinks)
        partitions = after // self.lag
        if partitions < 2:
            scores[:, self.sinks :] = torch.arange(after, device=scores.device) / max(1, after)
            return scores
        last = self.sinks + (partitions - 1) * self.lag  # where the last whole partition starts
        inside = slice(self.sinks, last + self.lag)
        spread = self._spread(view.keys[:, inside]) + self._spread(view.values[:, inside])
        ranks = spread.argsort(-1).argsort(-1)
        scores[:, self.sinks : last] = ranks.flatten(1) / self.lag
        return scores

    def _spread(self, states: Tensor) -> Tensor:
        """[K, partitions - 1, lag], each entry's share of its partition's deviation."""
        parts = states.float().unflatten(1, (-1, self.lag))
        low, high = parts[:, 1:].amin(2, keepdim=True), parts[:, 1:].amax(2, keepdim=True)
        scaled = (parts[:, :-1] - low) / (high - low).clamp_min(1e-8)
        return scaled.std(-1).softmax(-1)
