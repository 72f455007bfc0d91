"""PruLong, a head split."""

from dataclasses import dataclass

from kvbench.heads import LearntHeads
from kvbench.registry import register_method


@register_method("prulong")
@dataclass(frozen=True)
class PruLong(LearntHeads):
    """Retrieval heads learnt by next-token loss on long text (Bhaskar et al., arXiv 2506.17121)."""
