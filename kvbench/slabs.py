"""Decoding over ragged caches: rows of different samples, methods and budgets, a token each.

A *sequence* is one KV head of one row: its entries, read by the G query heads of its group. In each
layer, sequences about equally long lie in one `Slab` and are read in one call. A token is written
where it stays, so nothing else is copied; a row that has ended gives its places to the last ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.attention import Backend
from kvbench.cache import HeadGroup, Ledger, RowCache
from kvbench.footprint import Meter

PADDING = 1 / 8  # all of a slab are stored as long as its longest: at most so much more than needed


@dataclass(frozen=True)
class Waiting:
    """A group of KV heads of one row, about to decode `tokens` tokens at most."""

    row: int
    group: HeadGroup
    tokens: int

    @property
    def room(self) -> int:
        """Entries of each head while the last token is decoded."""
        whole = self.group.length + self.tokens
        window = self.group.window
        return whole if window is None else min(whole, window.sinks + window.size + 1)


class Slab:
    """Sequences of one layer: keys [U, S, D], values [U, S, Dv], positions [U, S].

    Of sequence u the first `lengths[u]` entries are resident. A streaming head's window is full at
    `limits[u]`; then the next token waits at the place behind it and, once it has attended, takes
    the place of the entry that leaves the window.
    """

    def __init__(self, waiting: Sequence[Waiting], ledger: Ledger, device: torch.device) -> None:
        groups = [w.group for w in waiting]
        self.ledger = ledger
        self.owners = [(w.row, head) for w in waiting for head in w.group.heads]
        self.room = max(w.room for w in waiting)
        self.streams = groups[0].window is not None
        lengths = [g.length for g in groups for _ in g.heads]
        self.lengths = torch.tensor(lengths, device=device)
        self.longest = max(lengths)
        self.ragged = len(set(lengths)) > 1
        if self.streams:
            windows = [g.window for g in groups for _ in g.heads]
            self.sinks = torch.tensor([w.sinks for w in windows if w], device=device)
            self.sizes = torch.tensor([w.size for w in windows if w], device=device)
            self.limits = self.sinks + self.sizes
            self.limit = max(w.sinks + w.size for w in windows if w)
            self.ragged = self.ragged or len(set(windows)) > 1
        self.keys, self.values, self.positions = self._storage(groups, adoptable(waiting))
        self.order = torch.arange(len(lengths), device=device)
        self.mask: Tensor | None = None
        if self.ragged:
            beyond = torch.arange(self.room, device=device) >= self.lengths[:, None]
            self.mask = torch.zeros(beyond.shape, dtype=self.keys.dtype, device=device)
            self.mask.masked_fill_(beyond, -torch.inf)

    def _storage(self, groups: Sequence[HeadGroup], adopt: bool) -> tuple[Tensor, Tensor, Tensor]:
        if adopt:
            taken = groups[0].give_away()
            self.size = taken[0].nbytes + taken[1].nbytes
            return taken
        self.size = 0
        made = []
        for name in ("keys", "values", "positions"):
            first = getattr(groups[0], name)
            slab = first.new_empty((len(self.owners), self.room, *first.shape[2:]))
            if name != "positions":
                self.ledger.allocate(slab.nbytes)
                self.size += slab.nbytes
            start = 0
            for group in groups:
                stored = getattr(group, name)
                place = slab[start : start + len(stored)]
                place[:, : group.length] = stored[:, : group.length]
                place[:, group.length :] = 0  # what is masked is still multiplied, by 0
                start += len(stored)
            made.append(slab)
            for group in groups:
                group.free(name)
        return made[0], made[1], made[2]

    def attend(
        self,
        backend: Backend,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """Each sequence takes its token and attends to all it holds.

        queries [U, G, D], keys [U, D], values [U, Dv], positions [U] -> [U, G, Dv].
        """
        # The longest grows on the host as the lengths do on the device: nobody waits for either.
        full = self.streams and self.longest >= self.limit
        seen = min(self.longest + 1, self.keys.shape[1])
        slots = torch.minimum(self.lengths, self.limits) if self.streams else self.lengths
        self._write(slots if self.ragged else seen - 1, keys, values)
        mask = self.mask
        if mask is not None:
            mask[self.order, slots] = 0
            mask = mask[:, :seen]
        if sliding is not None:
            self.positions[self.order, slots] = positions.int()
            far = self.positions[:, :seen] <= positions[:, None] - sliding
            if mask is None:
                mask = torch.zeros(far.shape, dtype=keys.dtype, device=keys.device)
            mask = mask.masked_fill(far, -torch.inf)
        lengths = slots + 1
        out = backend.token(
            queries,
            self.keys,
            self.values,
            scaling=scaling,
            lengths=lengths,
            seen=seen,
            mask=mask,
            sliding=sliding,
        )
        self.lengths = lengths
        if self.streams:
            self.lengths = torch.minimum(lengths, self.limits)
        if self.streams and (full or self.ragged):
            ring = self.sinks + (positions - self.sinks) % self.sizes
            stays = torch.where(slots < self.limits, slots, ring)
            self._write(stays, keys, values)
            if sliding is not None:
                self.positions[self.order, stays] = positions.int()
        self.longest = self.longest if full else seen
        return out

    def _write(self, slots: Tensor | int, keys: Tensor, values: Tensor) -> None:
        """Put one entry into each sequence, at `slots` [U] or at the same place in all."""
        where = (slice(None) if isinstance(slots, int) else self.order, slots)
        self.keys[where] = keys
        self.values[where] = values

    def leave(self, ended: set[int]) -> None:
        """Let go of the sequences of the rows `ended`; the last sequences take their places."""
        stay = [i for i, (row, _) in enumerate(self.owners) if row not in ended]
        count = len(stay)
        if count == len(self.owners):
            return
        holes = sorted(set(range(count)) - set(stay))
        movers = [i for i in stay if i >= count]
        owners = list(self.owners)
        for hole, mover in zip(holes, movers, strict=True):
            owners[hole] = owners[mover]
            for name in self._columns():
                getattr(self, name)[hole] = getattr(self, name)[mover]
        self.owners = owners[:count]
        for name in self._columns():
            setattr(self, name, getattr(self, name)[:count])
        self.order = self.order[:count]
        if not count:
            self.ledger.allocate(-self.size)

    def _columns(self) -> list[str]:
        names = ["keys", "values", "positions", "lengths"]
        if self.streams:
            names += ["sinks", "sizes", "limits"]
        return names + ["mask"] * (self.mask is not None)


class SlabLayer:
    """One layer of all rows that decode: its slabs, and whose sequence is where in them."""

    def __init__(self, slabs: Sequence[Slab]) -> None:
        self.slabs = list(slabs)
        self.order: Tensor | None = None
        self.back: Tensor | None = None

    def place(self, rows: Sequence[int], kv_heads: int, device: torch.device) -> None:
        """Note where in a batch of the rows `rows` each sequence is; [R * K] is flattened."""
        at = {row: index for index, row in enumerate(rows)}
        order = [at[row] * kv_heads + head for slab in self.slabs for row, head in slab.owners]
        self.order = self.back = None
        if order != sorted(order):
            self.order = torch.tensor(order, device=device)
            self.back = self.order.argsort()

    def leave(self, ended: set[int]) -> None:
        """Let go of the rows `ended`."""
        for slab in self.slabs:
            slab.leave(ended)
        self.slabs = [slab for slab in self.slabs if slab.owners]

    def attend(
        self,
        backend: Backend,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """As `Slab.attend`, in the order of the batch."""
        given = [queries, keys, values, positions]
        if self.order is not None:
            given = [tensor[self.order] for tensor in given]
        sizes = [len(slab.owners) for slab in self.slabs]
        parts = [
            slab.attend(backend, q, k, v, p, scaling, sliding)
            for slab, q, k, v, p in zip(
                self.slabs, *(tensor.split(sizes) for tensor in given), strict=True
            )
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out if self.back is None else out[self.back]


def make_slabs(
    caches: Sequence[RowCache], tokens: Sequence[int], ledger: Ledger, device: torch.device
) -> list[SlabLayer]:
    """The slabs of every layer, for rows that decode at most `tokens[row]` tokens each.

    Layer by layer, the rows' storage is freed as its entries have moved.
    """
    layers = []
    for layer in range(len(caches[0].layers)):
        waiting = [
            Waiting(row, group, tokens[row])
            for row, cache in enumerate(caches)
            for group in cache.layers[layer]
        ]
        slabs = [Slab(members, ledger, device) for members in bucketed(waiting)]
        layers.append(SlabLayer(slabs))
    return layers


def bucketed(waiting: Sequence[Waiting]) -> list[list[Waiting]]:
    """Groups that can share a slab: about equally long, streaming heads apart from others."""
    buckets: list[list[Waiting]] = []
    for one in sorted(waiting, key=lambda w: (w.group.window is not None, -w.room)):
        if not buckets or not _fits(one, buckets[-1]):
            buckets.append([])
        buckets[-1].append(one)
    return buckets


def _fits(one: Waiting, bucket: Sequence[Waiting]) -> bool:
    """Whether these, the longest first, can share a slab."""
    longest, members = bucket[0], [*bucket, one]
    if (longest.group.window is None) != (one.group.window is None):
        return False
    held = sum(len(w.group.heads) * w.room for w in members)
    stored = sum(len(w.group.heads) for w in members) * longest.room
    return stored <= held * (1 + PADDING)


def adoptable(bucket: Sequence[Waiting]) -> bool:
    """Whether the storage of a slab's only group has room for all it will hold: nothing moves."""
    return len(bucket) == 1 and bucket[0].group.capacity >= bucket[0].room


def meter_moves(cache: RowCache, tokens: int, meter: Meter) -> None:
    """Count the bytes of a row that goes into slabs, as it would alone."""
    for layer in cache.layers:
        for bucket in bucketed([Waiting(0, group, tokens) for group in layer]):
            if adoptable(bucket):
                continue
            room = max(w.room for w in bucket)
            for name in ("keys", "values"):
                stored = [getattr(w.group, name) for w in bucket]
                entry = stored[0].shape[-1] * stored[0].itemsize
                meter.allocate(sum(len(tensor) for tensor in stored) * room * entry)
                meter.allocate(-sum(tensor.nbytes for tensor in stored))
