"""Random eviction from the answer, a control for eviction while decoding."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("random-decoding")
@dataclass(frozen=True)
class RandomDecoding(DecodingMethod):
    """Keep the prompt and random entries of the answer: a control (arXiv 2609.03430)."""

    draw: int = field(default=0, metadata={"help": "Another number draws other entries."})

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], uniform in 0..1 for entries of the answer, in 1..2 for those of the prompt."""
        view.generator.manual_seed(view.generator.initial_seed() + self.draw)
        drawn = torch.rand(view.positions.shape, generator=view.generator)
        return drawn.to(view.positions.device, non_blocking=True) + (view.positions < view.prompt)
