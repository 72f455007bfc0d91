"""CurDKV: the leverage of keys and values, approximately."""

from dataclasses import dataclass, field

from torch import Tensor
from torch.nn.functional import pad

from kvbench.method import DecodingMethod, LayerView
from kvbench.registry import register_method


@register_method("cur")
@dataclass(frozen=True)
class Cur(DecodingMethod):
    """Keep keys and values of high leverage: large norms (Sengupta et al., arXiv 2509.15038)."""

    ties_by_topk = True  # a repeated token may have equal scores
    sinks: int = field(default=4, metadata={"help": "First entries, which stay."})
    local: int = field(
        default=16, metadata={"help": "Neighbours among which norms are compared first."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")
        self.check(self.local >= 1, f"local must be at least 1, not {self.local}")

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the product of the key's and the value's leverage as a share of all; 1 for sinks.

        An entry's leverage is its squared norm as a share of its block of `local` entries.
        """
        leverage = self._leverage(view.keys) * self._leverage(view.values)
        scores = leverage / leverage.sum(-1, keepdim=True)
        scores[:, : self.sinks] = 1
        return scores

    def _leverage(self, states: Tensor) -> Tensor:
        squares = states.float().square().sum(-1)
        entries = squares.shape[1]
        blocks = pad(squares, (0, -entries % self.local)).unflatten(1, (-1, self.local))
        return (blocks / blocks.sum(-1, keepdim=True)).flatten(1)[:, :entries]
