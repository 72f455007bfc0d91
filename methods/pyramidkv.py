"""PyramidKV: SnapKV with a capacity for each layer."""

from dataclasses import dataclass, field

from kvbench.method import LayerView
from kvbench.registry import register_method

from .snapkv import SnapKV


@register_method("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with more entries for low layers than for high ones (Cai et al., arXiv 2406.02069)."""

    beta: int = field(
        default=20,
        metadata={"help": "The last layer keeps 1/beta of the mean outside the window."},
    )

    equal_above_half: bool = field(
        default=False, metadata={"help": "Equal capacities if they exceed half of the chunk."}
    )
    whole_steps: bool = field(
        default=False,
        metadata={"help": "Layers differ by a whole number of entries, rounded down."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(self.beta >= 1, f"beta must be at least 1, not {self.beta}")

    def capacity(self, view: LayerView, budget: float) -> int:
        """Falls linearly over the layers; its mean over the layers is SnapKV's capacity."""
        mean = super().capacity(view, budget)
        window = self.own_window(view)
        spread = mean - window
        layer, layers = view.depth
        equal = self.equal_above_half and 2 * spread > view.new + view.patched
        if spread <= 0 or equal or layers == 1:
            return mean
        low = spread // self.beta
        high = 2 * spread - low
        if high >= view.new - window:
            high = view.new - window
            low = 2 * spread - high
        if self.whole_steps:
            return window + high - layer * ((high - low) // (layers - 1))
        fall = (high - low) / (layers - 1)
        # Differences of rounded sums keep the total over the layers within one entry.
        below, here = (round(n * high - fall * n * (n - 1) / 2) for n in (layer, layer + 1))
        return window + here - below
