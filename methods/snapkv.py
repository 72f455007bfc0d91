"""SnapKV: the attention of the prompt's last queries."""

from dataclasses import dataclass, field

from torch import Tensor, cat
from torch.nn.functional import avg_pool1d, pad

from kvbench.method import Family, LayerView, Method
from kvbench.registry import register_method


@register_method("snapkv")
@dataclass(frozen=True)
class SnapKV(Method):
    """Keep what the prompt's last queries attend to, smoothed (Li et al., arXiv 2404.14469)."""

    family = Family.POST_FILL
    window: int = field(default=64, metadata={"help": "Queries of the observation window."})
    kernel: int = field(
        default=5, metadata={"help": "Entries that the scores are averaged over; odd."}
    )
    chunk_softmax: bool = field(
        default=False, metadata={"help": "Normalise attention over the prefill chunk alone."}
    )
    window_floor: bool = field(
        default=False, metadata={"help": "Keep the observation window at any budget."}
    )

    def __post_init__(self) -> None:
        self.check(self.window >= 1, f"window must be at least 1, not {self.window}")
        self.check(
            self.kernel >= 1 and self.kernel % 2 == 1,
            f"kernel must be odd and at least 1, not {self.kernel}",
        )

    @property
    def observation_window(self) -> int:
        """W, the option `window`."""
        return self.window

    def own_window(self, view: LayerView) -> int:
        """How many of the new entries belong to the observation window."""
        return 0 if view.patched else min(self.window, view.new)

    def capacity(self, view: LayerView, budget: float) -> int:
        """The budget's share; with `window_floor` not less than the observation window."""
        floor = self.own_window(view) if self.window_floor else 0
        return max(floor, super().capacity(view, budget))

    def scores(self, view: LayerView) -> Tensor:
        """[K, E]: attention from the window, average-pooled over the entries that may go."""
        seen = view.latest(view.new + view.patched) if self.chunk_softmax else view
        start = seen.entries - seen.patched - seen.new
        stop = seen.entries - (seen.patched or seen.queries.shape[2])
        attention = seen.attention
        pooled = avg_pool1d(attention[:, start:stop], self.kernel, 1, self.kernel // 2)
        scores = cat([attention[:, :start], pooled, attention[:, stop:]], dim=1)
        return pad(scores, (view.entries - seen.entries, 0))
