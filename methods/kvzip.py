"""KVzip: what the model needs to read the prompt once more."""

from dataclasses import dataclass, field

from torch import Tensor

from kvbench.method import Competition, Family, LayerView, Method, Need
from kvbench.registry import register_method


@register_method("kvzip")
@dataclass(frozen=True)
class KVzip(Method):
    """Keep what is attended to as the prompt is read once more (Kim et al., arXiv 2505.23416)."""

    family = Family.POST_FILL
    needs = frozenset({Need.REPLAY})
    sinks: int = field(default=4, metadata={"help": "First entries, which stay."})
    uniform: bool = field(
        default=False, metadata={"help": "Keep as many entries in every layer and KV head."}
    )

    def __post_init__(self) -> None:
        self.check(self.sinks >= 0, f"sinks must be at least 0, not {self.sinks}")

    @property
    def competition(self) -> Competition:
        """Entries of all layers compete, unless the budget is uniform."""
        return Competition.HEAD if self.uniform else Competition.MODEL

    def scores(self, view: LayerView) -> Tensor:
        """[K, E], the most attention that an entry gets in the replay."""
        assert view.replayed is not None
        return view.replayed.masked_fill(view.positions < self.sinks, 2)  # attention is at most 1
