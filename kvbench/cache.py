"""The ragged KV cache of one row: every KV head of every layer holds its own number of entries.

KV heads of a layer that hold equally many entries share storage (a `HeadGroup`), so the usual
method has one group a layer and a head split two. Keys are cached after RoPE; an entry keeps the
position it had in the text. Where entries lie in storage means nothing to attention, so a streaming
head overwrites what it evicts, and no decoded token copies more than itself.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from kvbench.footprint import Meter
from kvbench.method import Window


class HeadGroup:
    """KV heads of one layer that hold equally many entries.

    keys [Kg, capacity, D], values [Kg, capacity, Dv], positions [Kg, capacity]; the first `length`
    are resident. With a `window`, one of them at most is free: `hole`, which the next token takes.
    """

    def __init__(self, heads: Tensor, window: Window | None, meter: Meter) -> None:
        self.heads = heads
        self.window = window
        self.meter = meter
        self.length = 0
        self.hole: int | None = None
        if window is not None:
            self._newest = window.sinks + window.size  # where a full window's newest entry lies
        self.keys: Tensor
        self.values: Tensor
        self.positions: Tensor

    @property
    def resident(self) -> int:
        """Entries of each KV head."""
        return self.length - (self.hole is not None)

    def append(self, keys: Tensor, values: Tensor, positions: Tensor, reserve: int) -> None:
        """Add entries, [Kg, T, D], [Kg, T, Dv], [T], making room for `reserve` in all if needed."""
        new = keys.shape[1]
        start = self.length if self.hole is None else self.hole
        stop = start + new
        if not self.length or stop > self.positions.shape[1]:
            self._move(keys, values, slice(0, self.length), max(reserve, stop))
        self.keys[:, start:stop] = keys
        self.values[:, start:stop] = values
        self.positions[:, start:stop] = positions
        self.length = max(self.length, stop)
        self.hole = None
        self.meter.hold(new * len(self.keys))

    def keep(self, chosen: Tensor, reserve: int) -> None:
        """Keep the entries `chosen` [Kg, c], indices in the order to keep, in storage of their own.

        The storage has room for `reserve` entries, or c if that is more.
        """
        gone = self.resident - chosen.shape[1]
        self._move(self.keys, self.values, chosen, max(reserve, chosen.shape[1]))
        self.length = chosen.shape[1]
        self.hole = None
        self.meter.hold(-gone * len(self.keys))

    def drop_last(self, count: int) -> None:
        """Forget the newest `count` entries; their storage stays until the next `keep`."""
        self.length -= count
        self.meter.hold(-count * len(self.keys))

    def slide(self) -> None:
        """After a decoded token: evict the oldest entry of a full window; its place is the hole."""
        if self.window is None or self.length <= self.window.sinks + self.window.size:
            return
        sinks, places = self.window.sinks, self.window.size + 1
        self.hole = sinks + (self._newest - sinks + 1) % places
        self._newest = self.hole
        self.meter.hold(-len(self.keys))

    def _move(self, keys: Tensor, values: Tensor, chosen: slice | Tensor, capacity: int) -> None:
        """Move the `chosen` entries to new storage, keys before values to keep the peak low."""
        heads = len(self.heads)
        old_positions = getattr(self, "positions", None)
        positions = torch.empty((heads, capacity), dtype=torch.int32, device=keys.device)
        for name, like in (("keys", keys), ("values", values)):
            old = getattr(self, name, None)
            moved = torch.empty(
                (heads, capacity, like.shape[-1]), dtype=like.dtype, device=like.device
            )
            self.meter.allocate(moved.nbytes)
            if old is not None:
                kept = _take(old, chosen)
                moved[:, : kept.shape[1]] = kept
                self.meter.allocate(-old.nbytes)
            setattr(self, name, moved)
        if old_positions is not None:
            kept = _take(old_positions, chosen)
            positions[:, : kept.shape[1]] = kept
        self.positions = positions


def _take(tensor: Tensor, chosen: slice | Tensor) -> Tensor:
    if isinstance(chosen, slice):
        return tensor[:, chosen]
    return tensor[torch.arange(len(tensor), device=tensor.device)[:, None], chosen]


class RowCache:
    """All layers of one row, and the meter of what they hold."""

    def __init__(self, windows: Sequence[Sequence[Window | None]], device: torch.device) -> None:
        self.meter = Meter()
        self.layers: list[list[HeadGroup]] = []
        for layer in windows:
            kinds = dict.fromkeys(layer)
            self.layers.append(
                [
                    HeadGroup(
                        torch.tensor([h for h, w in enumerate(layer) if w == kind], device=device),
                        kind,
                        self.meter,
                    )
                    for kind in kinds
                ]
            )

    def kept(self, layer: int) -> dict[int, list[int]]:
        """The positions that each KV head of a layer holds, sorted."""
        found = {}
        for group in self.layers[layer]:
            for row, head in enumerate(group.heads.tolist()):
                places = group.positions[row, : group.length].tolist()
                found[head] = sorted(p for i, p in enumerate(places) if i != group.hole)
        return found

    def fork(self) -> "RowCache":
        """An independent copy, its meter included; storage is copied at once."""
        twin = copy(self)
        twin.meter = copy(self.meter)
        twin.layers = []
        for groups in self.layers:
            copies = [copy(group) for group in groups]
            for group in copies:
                group.meter = twin.meter
                if group.length:
                    group.keys, group.values = group.keys.clone(), group.values.clone()
                    group.positions = group.positions.clone()
            twin.layers.append(copies)
        return twin
