"""The ragged KV cache: every KV head of every layer of a row holds its own number of entries.

KV heads of a layer that hold equally many entries share storage, a `HeadGroup`. Keys are cached
after RoPE; an entry keeps the position it had in the text. Where entries lie in storage means
nothing to attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.method import Entries, Window

EVERYTHING = Window(0, 2**62)  # of a KV head that does not stream, where one is asked for


@dataclass
class Ledger:
    """The bytes of keys and values that all rows of a batch have allocated, and the most so far."""

    bytes: int = 0
    peak: int = 0

    def allocate(self, size: int) -> None:
        """Add (or, if negative, free) bytes."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class HeadGroup:
    """KV heads of one layer that hold equally many entries.

    keys [Kg, capacity, D], values [Kg, capacity, Dv], positions [Kg, capacity]; the first `length`
    are resident. With a `window`, position p lies at p if it is a sink and otherwise at
    `sinks + (p - sinks) % size`, so that it overwrites the entry that leaves the window.
    """

    def __init__(
        self, heads: Sequence[int], window: Window | None, ledger: Ledger, device: torch.device
    ) -> None:
        self.heads = tuple(heads)
        together = self.heads == tuple(range(heads[0], heads[0] + len(heads)))
        self._index: slice | Tensor = slice(heads[0], heads[0] + len(heads))
        if not together:
            self._index = torch.tensor(heads, device=device)
        self.window = window
        self.ledger = ledger
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Entries of each KV head that there is room for."""
        return 0 if self.positions is None else self.positions.shape[1]

    def of(self, tensor: Tensor) -> Tensor:
        """This group's KV heads of a tensor [K, ...]."""
        return tensor[self._index]

    def resident(self) -> Entries | None:
        """The entries there are, None for none."""
        if not self.length:
            return None
        return Entries(*(tensor[:, : self.length] for tensor in self.entries()))

    def add(self, new: Entries, capacity: int) -> None:
        """Add entries [Kg, T, ...], in storage with room for `capacity` if there is none yet."""
        for place, given in zip(self._places(new, new.keys.shape[1], capacity), new, strict=True):
            place.copy_(given)

    def take(self, new: Entries, chosen: Tensor | None, capacity: int) -> None:
        """Add the entries `chosen` [Kg, c] of `new`, None for all."""
        if chosen is None:
            self.add(new, capacity)
            return
        places = self._places(new, chosen.shape[1], capacity)
        for place, given in zip(places, new, strict=True):
            _gather(given.to(place.dtype), chosen, out=place)

    def _places(self, like: Entries, count: int, capacity: int) -> list[Tensor]:
        """Where `count` more entries go, which are resident from now on."""
        start, stop = self.length, self.length + count
        if not start:
            self._allocate(like, max(capacity, stop))
        elif stop > self.capacity:
            self.reserve(max(capacity, stop))
        self.length = stop
        return [stored[:, start:stop] for stored in self.entries()]

    def reserve(self, capacity: int) -> None:
        """Have room for `capacity` entries, those there are moved if there was not.

        Keys move before values: old and new storage are never there both in full.
        """
        for name in ("keys", "values", "positions"):
            old: Tensor = getattr(self, name)
            grown = old.new_empty((len(old), capacity, *old.shape[2:]))
            if name != "positions":
                self.ledger.allocate(grown.nbytes)
            grown[:, : self.length] = old[:, : self.length]
            self.free(name)
            setattr(self, name, grown)

    def slide(self, new: Entries, start: int, capacity: int) -> None:
        """Add a chunk's entries, the first at position `start`, of which the window's stay."""
        assert self.window is not None
        sinks, size = self.window.sinks, self.window.size
        count = new.positions.shape[1]
        first = min(max(0, sinks - start), count)  # so many of the chunk are sinks
        rest = max(first, count - size)
        if self.positions is None:
            self._allocate(new, capacity)
        order = torch.arange(start + rest, start + count, device=new.keys.device)
        slots = sinks + (order - sinks) % size
        for stored, given in zip(self.entries(), new, strict=True):
            stored[:, start : start + first] = given[:, :first]
            stored[:, slots] = given[:, rest:].to(stored.dtype)
        self.length = min(start + count, sinks + size)

    def replace(self, source: "HeadGroup", own: Entries, chosen: Tensor, capacity: int) -> None:
        """Hold the entries `chosen` [Kg, c], ascending, of a group's and then own ones.

        `source` may be this group. Keys move before values, so that old and new storage are never
        there both in full.
        """
        pick = _Pick(source.length, own, chosen, capacity)
        own = Entries(own.keys, own.values, own.positions.int())
        for name, new in zip(("keys", "values", "positions"), own, strict=True):
            taken = pick.of(getattr(source, name), new)
            if name != "positions":
                self.ledger.allocate(taken.nbytes)
            self.free(name)
            setattr(self, name, taken)
        self.length = chosen.shape[1]

    def clear(self) -> None:
        """Free the storage."""
        self.free("keys")
        self.free("values")
        self.positions = None
        self.length = 0

    def entries(self) -> Entries:
        """The storage, resident or not."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        return Entries(self.keys, self.values, self.positions)

    def _allocate(self, like: Entries, capacity: int) -> None:
        for name, given in zip(("keys", "values", "positions"), like, strict=True):
            dtype = torch.int32 if name == "positions" else given.dtype
            shape = (len(self.heads), capacity, *given.shape[2:])
            made = torch.empty(shape, dtype=dtype, device=given.device)
            if name != "positions":
                self.ledger.allocate(made.nbytes)
            setattr(self, name, made)

    def free(self, name: str) -> None:
        """Free the storage of `keys`, `values` or `positions`."""
        old = getattr(self, name)
        if old is not None and name != "positions":
            self.ledger.allocate(-old.nbytes)
        setattr(self, name, None)


def _gather(tensor: Tensor, chosen: Tensor, out: Tensor) -> None:
    """Write the entries `chosen` [k, c] of [k, e, ...] to `out`."""
    if tensor.dim() == 3:
        chosen = chosen[..., None].expand(-1, -1, tensor.shape[2])
    torch.gather(tensor, 1, chosen, out=out)


class _Pick:
    """Takes the entries `chosen` [k, c], ascending, of `before` stored and then own ones.

    They come with room for `capacity`. Rows of flattened storage are copied whole, ten times faster
    than elements are gathered; and past and own entries are not put side by side first.
    """

    def __init__(self, before: int, own: Entries, chosen: Tensor, capacity: int) -> None:
        new, self.count = own.keys.shape[1], chosen.shape[1]
        self.before = before
        self.capacity = capacity
        self.heads = torch.arange(len(chosen), device=chosen.device)[:, None]
        self.past = pad(chosen.clamp(max=before - 1), (0, capacity - self.count))
        late = chosen[:, max(0, self.count - new) :] - before  # own entries come last
        self.is_own = late >= 0
        self.own = late.clamp(min=0)

    def of(self, stored: Tensor | None, own: Tensor) -> Tensor:
        """From [k, stored, ...] and [k, T, ...]: [k, capacity, ...], the first c of them chosen."""
        late = own[self.heads, self.own]
        if stored is None or not self.before:
            if self.capacity == self.count:
                return late
            taken = late.new_empty((len(late), self.capacity, *late.shape[2:]))
            taken[:, : self.count] = late
            return taken
        rows = (self.heads * stored.shape[1] + self.past).flatten()
        taken = stored.flatten(0, 1).index_select(0, rows).unflatten(0, self.past.shape)
        place = taken[:, self.count - late.shape[1] : self.count]
        is_own = self.is_own if late.dim() == 2 else self.is_own[..., None]
        place.copy_(torch.where(is_own, late, place))
        return taken


class RowCache:
    """All layers of one row.

    With `apart`, a KV head that does not stream has storage of its own, so that evicting it later
    takes the memory of one head besides and not of a layer.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[Window | None]],
        ledger: Ledger,
        device: torch.device,
        *,
        apart: bool = False,
    ) -> None:
        self.layers: list[list[HeadGroup]] = []
        self.orders: list[Tensor | None] = []  # where each KV head is among a layer's groups
        for layer in windows:
            kinds: dict[object, list[int]] = {}
            for head, window in enumerate(layer):
                kinds.setdefault(head if apart and window is None else window, []).append(head)
            self.layers.append(
                [HeadGroup(heads, layer[heads[0]], ledger, device) for heads in kinds.values()]
            )

            flat = [head for heads in kinds.values() for head in heads]
            ordered = flat == sorted(flat)
            order = None if ordered else torch.tensor(flat, device=device).argsort()
            self.orders.append(order)

    def group_like(self, layer: int, other: HeadGroup) -> HeadGroup:
        """The group of the same KV heads as another cache's."""
        return next(group for group in self.layers[layer] if group.heads == other.heads)

    def clear(self) -> None:
        """Free all storage."""
        for groups in self.layers:
            for group in groups:
                group.clear()

    def joined(self, layer: int, parts: Sequence[Tensor]) -> Tensor:
        """What was computed for each of a layer's groups, [Kg, ...], as [K, ...], in order."""
        if len(parts) == 1:
            return parts[0]
        order = self.orders[layer]
        together = torch.cat(list(parts))
        return together if order is None else together[order]

    def lengths(self) -> list[list[tuple[int, int, int | None]]]:
        """Of every layer's groups: KV heads, entries of each, and the most it ever holds."""
        return [
            [
                (
                    len(group.heads),
                    group.length,
                    None if group.window is None else group.window.sinks + group.window.size,
                )
                for group in groups
            ]
            for groups in self.layers
        ]

    def addresses(self, layer: int) -> list[list[int]]:
        """Of each KV head of a layer: where its keys, values and positions start, how many entries
        it holds, and the sinks and the size of its window.
        """
        found = {}
        for group in self.layers[layer]:
            window = group.window or EVERYTHING
            held = [group.length, window.sinks, window.size]
            starts = [(t.data_ptr(), t.stride(0) * t.itemsize) for t in group.entries()]
            for row, head in enumerate(group.heads):
                found[head] = [start + row * step for start, step in starts] + held
        return [found[head] for head in sorted(found)]

    def kept(self, layer: int) -> dict[int, list[int]]:
        """The positions that each KV head of a layer holds, sorted."""
        found = {}
        for group in self.layers[layer]:
            entries = group.resident()
            for row, head in enumerate(group.heads):
                found[head] = sorted(entries.positions[row].tolist()) if entries else []
        return found
