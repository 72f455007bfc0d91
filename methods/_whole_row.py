"""SnapKV's scores as a row in which the observation window competes, for methods that select."""

from dataclasses import dataclass

from torch import Tensor

from kvbench.method import LayerView

from .snapkv import SnapKV


@dataclass(frozen=True)
class WholeRow(SnapKV):
    """SnapKV as kvpress has it: the window's entries are scored above all others of the layer."""

    @property
    def protected(self) -> int:
        """None: the observation window takes part in the selection."""
        return 0

    def scores(self, view: LayerView) -> Tensor:
        """[K, E]: the mean attention from the window, pooled; its own entries have 1 more.

        Where no entry comes before the window, its entries compete by their attention.
        """
        queries, end = view.queries.shape[2], view.entries - view.patched
        first, window = end - view.new, end - self.own_window(view)
        if first == window:
            return view.attention / queries
        scores = super().scores(view) / queries
        scores[:, window:end] = scores[:, first:window].max() + 1
        return scores
