"""SnapKV: the attention of the prompt's last queries."""

from dataclasses import dataclass, field

from torch import Tensor, cat
from torch.nn.functional import avg_pool1d

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

    def scores(self, view: LayerView) -> Tensor:
        """[K, E]: attention from the window, average-pooled over the entries that may go."""
        stop = view.entries - view.patched
        start = stop - view.new
        if not view.patched:
            stop -= view.queries.shape[2]
        candidates = view.attention[:, start:stop]
        pooled = avg_pool1d(candidates, self.kernel, stride=1, padding=self.kernel // 2)
        return cat([view.attention[:, :start], pooled, view.attention[:, stop:]], dim=1)
