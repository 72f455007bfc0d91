"""Random eviction, a control."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.method import Family, LayerView, Method
from kvbench.registry import register_method


@register_method("random")
@dataclass(frozen=True)
class Random(Method):
    """Keep random entries in each KV head: a control that every method should beat."""

    family = Family.POST_FILL
    draw: int = field(default=0, metadata={"help": "Another number draws other entries."})

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], uniform."""
        view.generator.manual_seed(view.generator.initial_seed() + self.draw)
        return torch.rand(view.positions.shape, generator=view.generator)
