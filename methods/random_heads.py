"""A random head split, a control."""

import random
from dataclasses import dataclass, field

from kvbench.heads import HeadSplit, Table
from kvbench.method import KVShape
from kvbench.registry import register_method


@register_method("random-heads")
@dataclass(frozen=True)
class RandomHeads(HeadSplit):
    """Random retrieval heads: a control that learnt head scores should beat."""

    draw: int = field(default=0, metadata={"help": "Another number draws other heads."})

    def head_scores(self, shape: KVShape, budget: float) -> Table:
        """Uniform scores, the same at every budget."""
        rng = random.Random(f"random-heads/{self.draw}")
        return [[rng.random() for _ in range(shape.kv_heads)] for _ in range(shape.layers)]
