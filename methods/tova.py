"""TOVA: the attention of the last query."""

from dataclasses import dataclass

from torch import Tensor

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("tova")
@dataclass(frozen=True)
class Tova(DecodingMethod):
    """Keep what the last query attends to, one choice a layer (Oren et al., arXiv 2401.06104)."""

    ties_by_topk = True  # many may be 0 in float32

    @property
    def observation_window(self) -> int:
        """The last query."""
        return 1

    @property
    def protected(self) -> int:
        """None: the last entry stays by its score."""
        return 0

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the mean attention over all query heads of the layer; the last entry has more."""
        attention = view.attention.mean(0, keepdim=True)
        attention[:, -1] = attention.max() + 1
        return attention.expand(len(view.kv_heads), -1)
