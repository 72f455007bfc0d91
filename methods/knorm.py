"""Eviction by key norms."""

from dataclasses import dataclass

from torch import Tensor

from kvbench.method import Family, LayerView, Method
from kvbench.registry import register_method


@register_method("knorm")
@dataclass(frozen=True)
class KeyNorm(Method):
    """Keep the entries whose keys have the smallest norms (Devoto et al., arXiv 2406.11430)."""

    family = Family.POST_FILL

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the negative norm of each key."""
        return -view.keys.float().norm(dim=-1)
