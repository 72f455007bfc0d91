"""KeyDiff: the keys that differ most from the others."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("keydiff")
@dataclass(frozen=True)
class KeyDiff(DecodingMethod):
    """Keep the keys least like the mean key of their KV head (Park et al., arXiv 2504.15364)."""

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], minus the cosine of each key with the mean of the normalised keys."""
        keys = view.keys.float()
        mean = normalize(keys, dim=-1).mean(1, keepdim=True)
        return -cosine_similarity(keys, mean, dim=-1)
