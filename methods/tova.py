"""TOVA: the attention of the last query."""

from dataclasses import dataclass

from torch import Tensor

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("tova")
@dataclass(frozen=True)
class Tova(DecodingMethod):
    """Keep what the last query attends to, one choice a layer (Oren et al., arXiv 2401.06104)."""

    @property
    def observation_window(self) -> int:
        """The last query; its own entry always stays."""
        return 1

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the mean attention over all query heads of the layer."""
        return view.attention.mean(0, keepdim=True).expand(len(view.kv_heads), -1)
