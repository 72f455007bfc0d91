"""A control."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.method import Family, LayerView, Method
from kvbench.registry import register_method


@register_method("random")
@dataclass(frozen=True)
class Random(Method):
    """Keep entries drawn at random for each KV head: what a method must beat to know anything."""

    family = Family.POST_FILL
    draw: int = 0

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], uniform; another `draw` gives another choice."""
        view.generator.manual_seed(view.generator.initial_seed() + self.draw)
        return torch.rand(view.positions.shape, generator=view.generator)
