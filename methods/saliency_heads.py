"""Heads ranked by a gradient, a control for learnt masks."""

from dataclasses import dataclass

from kvbench.heads import LearntHeads
from kvbench.registry import register_method


@register_method("saliency-heads")
@dataclass(frozen=True)
class SaliencyHeads(LearntHeads):
    """Retrieval heads by the gradient of the loss at full attention: learnt masks should beat it.

    The score of a head is how much the next-token loss rises, to first order, if it streams.
    """

    training = "saliency"
