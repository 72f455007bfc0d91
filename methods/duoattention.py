"""DuoAttention, a head split."""

from dataclasses import dataclass

from kvbench.heads import LearntHeads
from kvbench.registry import register_method


@register_method("duoattention")
@dataclass(frozen=True)
class DuoAttention(LearntHeads):
    """Retrieval heads learnt by distillation on passkeys (Xiao et al., arXiv 2410.10819)."""
