"""A control for head splits."""

import random
from dataclasses import dataclass

from kvbench.heads import HeadSplit, Table
from kvbench.method import KVShape
from kvbench.registry import register_method


@register_method("random-heads")
@dataclass(frozen=True)
class RandomHeads(HeadSplit):
    """Retrieval heads drawn at random: what learnt head scores must beat to know anything."""

    draw: int = 0

    def head_scores(self, shape: KVShape, budget: float) -> Table:
        """Uniform scores, the same at every budget; another `draw` gives another order."""
        rng = random.Random(f"random-heads/{self.draw}")
        return [[rng.random() for _ in range(shape.kv_heads)] for _ in range(shape.layers)]
