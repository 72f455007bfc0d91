"""The ragged KV cache: every KV head of every layer of a row holds its own number of entries.

KV heads of a layer that hold equally many entries share storage, a `HeadGroup`. Keys are cached
after RoPE, and an entry keeps its position in the text, so the order in storage does not matter.
"""

from collections.abc import Container, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvbench.engine.pages import PageBounds
from kvbench.method import Entries, Limit, Window

EVERYTHING = Window(0, 2**62)  # stands for no window, for kernels


@dataclass(frozen=True)
class Visible(Window):
    """All that the model itself lets later tokens of a limited layer see."""

    chunked: bool = False

    @classmethod
    def under(cls, limit: Limit) -> "Visible":
        """What a layer with this limit holds under full attention."""
        return cls(0, limit.size, True) if limit.chunked else cls(0, max(1, limit.size - 1))


@dataclass
class Ledger:
    """Bytes of keys and values that all rows of a call have allocated, and their peak."""

    bytes: int = 0
    peak: int = 0

    def allocate(self, size: int) -> None:
        """Add (or, if negative, free) bytes."""
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


class HeadGroup:
    """KV heads of one layer that hold equally many entries.

    keys [Kg, capacity, D], values [Kg, capacity, Dv], positions [Kg, capacity]; the first `length`
    are resident. With a `window`, the entry of position p is stored at p if it is a sink, else at
    `sinks + (p - sinks) % size`, where it overwrites the entry that leaves the window. `limit` is
    the model's own, if it limits the layer.
    """

    def __init__(
        self,
        heads: Sequence[int],
        window: Window | None,
        ledger: Ledger,
        device: torch.device,
        limit: Limit | None = None,
    ) -> None:
        self.heads = tuple(heads)
        together = self.heads == tuple(range(heads[0], heads[0] + len(heads)))
        self._index: slice | Tensor = slice(heads[0], heads[0] + len(heads))
        if not together:
            self._index = torch.tensor(heads, device=device)
        self.window = window
        self.limit = limit
        self.ledger = ledger
        self.length = 0
        self.oldest = 0  # index of the entry that a full window loses next
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None
        self.bounds: PageBounds | None = None  # of its pages, while decoding

    @property
    def capacity(self) -> int:
        """Entries that are allocated for each KV head."""
        return 0 if self.positions is None else self.positions.shape[1]

    def of(self, tensor: Tensor) -> Tensor:
        """This group's KV heads of a tensor [K, ...]."""
        return tensor[self._index]

    def select(self, entries: Entries) -> Entries:
        """This group's KV heads of entries [K, ...]."""
        return Entries(*(self.of(tensor) for tensor in entries))

    def resident(self) -> Entries | None:
        """The resident entries, None if there are none."""
        if not self.length:
            return None
        return Entries(*(tensor[:, : self.length] for tensor in self.entries()))

    def in_order(self) -> list[Entries]:
        """The resident entries in order of position, in pieces, if they were stored in order."""
        cuts = [(self.oldest, self.length), (0, self.oldest)] if self.length else []
        return [
            Entries(*(tensor[:, start:stop] for tensor in self.entries()))
            for start, stop in cuts
            if stop > start
        ]

    def add(self, new: Entries, capacity: int) -> None:
        """Add entries [Kg, T, ...]; if there is no storage yet, allocate `capacity` entries."""
        for slot, given in zip(self._slots(new, new.keys.shape[1], capacity), new, strict=True):
            slot.copy_(given)

    def take(self, new: Entries, chosen: Tensor | None, capacity: int) -> None:
        """Add the entries `chosen` [Kg, c] of `new`; all if it is None."""
        if chosen is None:
            self.add(new, capacity)
            return
        slots = self._slots(new, chosen.shape[1], capacity)
        for slot, given in zip(slots, new, strict=True):
            index = chosen if given.dim() == 2 else chosen[..., None].expand(-1, -1, given.shape[2])
            torch.gather(given.to(slot.dtype), 1, index, out=slot)

    def _slots(self, like: Entries, count: int, capacity: int) -> list[Tensor]:
        """Storage for `count` more entries, which count as resident from now on."""
        start, stop = self.length, self.length + count
        if self.keys is None:
            self._allocate(like, max(capacity, stop))
        elif stop > self.capacity:
            self.reserve(max(capacity, stop))
        self.length = stop
        return [stored[:, start:stop] for stored in self.entries()]

    def reserve(self, capacity: int) -> None:
        """Move the resident entries to storage for `capacity` entries.

        Keys move before values, so that old and new storage never exist both in full.
        """
        for name in ("keys", "values", "positions"):
            old: Tensor = getattr(self, name)
            grown = old.new_empty((len(old), capacity, *old.shape[2:]))
            grown[:, : self.length] = old[:, : self.length]
            self._store(name, grown)

    def slide(self, new: Entries, start: int, capacity: int) -> None:
        """Add a chunk's entries, the first at position `start`; evict what leaves the window."""
        assert self.window is not None
        sinks, size = self.window.sinks, self.window.size
        count = new.positions.shape[1]
        first = min(max(0, sinks - start), count)  # entries of the chunk that are sinks
        rest = max(first, count - size)
        stop = start + count
        if isinstance(self.window, Visible) and self.window.chunked:
            rest = min(count, max(0, stop - stop % size - start))
        if self.positions is None:
            self._allocate(new, capacity)
        order = torch.arange(start + rest, stop, device=new.keys.device)
        slots = sinks + (order - sinks) % size
        for stored, given in zip(self.entries(), new, strict=True):
            stored[:, start : start + first] = given[:, :first]
            stored[:, slots] = given[:, rest:].to(stored.dtype)
        if isinstance(self.window, Visible) and self.window.chunked:
            self.length = stop % size
            return
        self.length = min(stop, sinks + size)
        self.oldest = stop % size if isinstance(self.window, Visible) and stop > size else 0

    def hold_as(self, other: "HeadGroup", capacity: int) -> None:
        """Hold what another window holds, in storage for `capacity` entries."""
        if other.positions is None:
            return
        self._allocate(other.entries(), capacity)
        for mine, theirs in zip(self.entries(), other.entries(), strict=True):
            count = min(mine.shape[1], theirs.shape[1])
            mine[:, :count] = theirs[:, :count]
        self.length, self.oldest = other.length, other.oldest

    def drop_hidden(self, position: int) -> int:
        """Evict what no token from `position` on can see; returns how many entries are left.

        KV heads of a group stay equally long, so that the one that sees most decides.
        """
        assert self.limit is not None
        positions = self.entries().positions[:, : self.length]
        hidden = self.limit.hides(torch.tensor(position, device=positions.device), positions)
        gone = int(hidden.sum(1).min()) if self.length else 0
        for stored in self.entries() if gone else ():
            stored[:, : self.length - gone] = stored[:, gone : self.length].clone()
        self.length -= gone
        return self.length

    def replace(self, source: "HeadGroup", own: Entries, chosen: Tensor, capacity: int) -> None:
        """Hold only the entries `chosen` [Kg, c] of `source` and then `own`; no window any more.

        The indices ascend, and count the entries of a window in order of position. `source` may be
        this group. Keys move before values, so that old and new
        storage never exist both in full.
        """
        if source.oldest:
            turned = (chosen + source.oldest) % source.length
            chosen = torch.where(chosen < source.length, turned, chosen)
        pick = _Pick(source.length, own, chosen, capacity)
        own = Entries(own.keys, own.values, own.positions.int())
        for name, new in zip(("keys", "values", "positions"), own, strict=True):
            self._store(name, pick.of(getattr(source, name), new))
        self.length = chosen.shape[1]
        self.window, self.oldest = None, 0

    def compact(self, chosen: Tensor) -> None:
        """Hold only the entries `chosen` [Kg, c], in the same storage; indices ascend."""
        count = chosen.shape[1]
        first = torch.arange(len(chosen), device=chosen.device)[:, None] * self.capacity
        rows = (first + chosen).flatten()
        for stored in self.entries():
            kept = stored.flatten(0, 1).index_select(0, rows)
            stored[:, :count] = kept.unflatten(0, chosen.shape)
        self.length = count

    def apart(self) -> list["HeadGroup"]:
        """A group for each KV head, which shares this group's storage."""
        if len(self.heads) == 1:
            return [self]
        parts = []
        for row, head in enumerate(self.heads):
            part = copy(self)
            part.heads, part._index = (head,), slice(head, head + 1)
            if self.positions is not None:
                part.keys, part.values, part.positions = (
                    tensor[row : row + 1] for tensor in self.entries()
                )
            parts.append(part)
        return parts

    def clear(self) -> None:
        """Free the storage."""
        for name in ("keys", "values", "positions"):
            self._store(name, None)
        self.length = self.oldest = 0
        self.bounds = None

    def entries(self) -> Entries:
        """The whole storage, resident or not."""
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        return Entries(self.keys, self.values, self.positions)

    def _allocate(self, like: Entries, capacity: int) -> None:
        for name, given in zip(("keys", "values", "positions"), like, strict=True):
            dtype = torch.int32 if name == "positions" else given.dtype
            shape = (len(self.heads), capacity, *given.shape[2:])
            self._store(name, torch.empty(shape, dtype=dtype, device=given.device))

    def _store(self, name: str, new: Tensor | None) -> None:
        """Replace the storage of `keys`, `values` or `positions`; the old one is freed."""
        old: Tensor | None = getattr(self, name)
        if name != "positions":
            self.ledger.allocate(0 if new is None else new.nbytes)
            self.ledger.allocate(0 if old is None else -old.nbytes)
        setattr(self, name, new)


class _Pick:
    """Copies the entries `chosen` [k, c], ascending, of `before` stored and then own ones.

    The copy has storage for `capacity` entries. Whole rows of the flattened storage are copied, ten
    times faster than gathering elements, and past and own entries are not joined first.
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
        """From stored [k, s, ...] and own [k, T, ...]: [k, capacity, ...], the first c chosen."""
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
    """The cache of all layers of one row.

    `windows` are the windows of each layer's KV heads, none for a layer that reads the keys of
    another one; `limits` are the model's own limits of the layers, `devices` where their keys and
    values are. In the layers `apart`, each KV head that does not stream has separate storage, so
    that evicting copies one head at a time and not a whole layer.
    """

    def __init__(
        self,
        windows: Sequence[Sequence[Window | None]],
        ledger: Ledger,
        devices: Sequence[torch.device],
        *,
        limits: Sequence[Limit | None],
        apart: Container[int] = (),
    ) -> None:
        self.layers: list[list[HeadGroup]] = []
        self.orders: list[Tensor | None] = []  # index of each KV head among a layer's groups
        layers = zip(windows, limits, devices, strict=True)
        for index, (layer, limit, device) in enumerate(layers):
            kinds: dict[object, list[int]] = {}
            for head, window in enumerate(layer):
                scored = window is None or isinstance(window, Visible)
                alone = scored and index in apart
                kinds.setdefault(head if alone else window, []).append(head)
            self.layers.append(
                [
                    HeadGroup(heads, layer[heads[0]], ledger, device, limit)
                    for heads in kinds.values()
                ]
            )
            flat = [head for heads in kinds.values() for head in heads]
            ordered = flat == sorted(flat)
            order = None if ordered else torch.tensor(flat, device=device).argsort()
            self.orders.append(order)

    def group_like(self, layer: int, other: HeadGroup) -> HeadGroup:
        """The group with the same KV heads as one of another cache."""
        return next(group for group in self.layers[layer] if group.heads == other.heads)

    def clear(self) -> None:
        """Free all storage."""
        for groups in self.layers:
            for group in groups:
                group.clear()

    def joined(self, layer: int, parts: Sequence[Tensor]) -> Tensor:
        """Join tensors [Kg, ...] of a layer's groups to [K, ...], in the order of the KV heads."""
        if len(parts) == 1:
            return parts[0]
        order = self.orders[layer]
        together = torch.cat(list(parts))
        return together if order is None else together[order]

    def addresses(self, layer: int) -> list[list[int]]:
        """For each KV head of a layer: the addresses of its keys, values and positions, the number
        of entries, the sinks and the size of its window, and the chunk of attention that it holds
        (0: no chunks).
        """
        found = {}
        for group in self.layers[layer]:
            window = group.window or EVERYTHING
            chunk = window.size if isinstance(window, Visible) and window.chunked else 0
            held = [group.length, window.sinks, window.size, chunk]
            starts = [(t.data_ptr(), t.stride(0) * t.itemsize) for t in group.entries()]
            for row, head in enumerate(group.heads):
                found[head] = [start + row * step for start, step in starts] + held
        return [found[head] for head in sorted(found)]

    def bounds(self, layer: int) -> list[tuple[PageBounds, int] | None]:
        """For each KV head of a layer: the bounds of its pages and its row in them, if any."""
        found = {
            head: None if group.bounds is None else (group.bounds, row)
            for group in self.layers[layer]
            for row, head in enumerate(group.heads)
        }
        return [found[head] for head in sorted(found)]

    def kept(self) -> list[list[list[int]]]:
        """The resident positions of each layer and KV head, sorted."""
        result = []
        for groups in self.layers:
            found = {}
            for group in groups:
                entries = group.resident()
                for row, head in enumerate(group.heads):
                    found[head] = sorted(entries.positions[row].tolist()) if entries else []
            result.append([found[head] for head in sorted(found)])
        return result
