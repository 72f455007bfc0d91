"""Decodes a batch of rows of different samples, methods and budgets, one token each per step.

Every KV head of a row is a sequence with its own length. Kernels read entries where they are stored
and write a token's entry into its slot, so nothing is copied or padded. A row that has ended frees
its storage.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from kvbench.engine.attention import Backend, attend_groups
from kvbench.engine.cache import RowCache
from kvbench.engine.kernels.interface import PageTable, Sequences
from kvbench.engine.pages import PageBounds
from kvbench.errors import InputError
from kvbench.method import Entries
from kvbench.models.attention import AttentionCall, LayerShape, Rules


class RecentQueries:
    """The latest `size` queries of decoding rows, as a ring for each layer."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rings: dict[int, Tensor] = {}  # by layer, [R, H, size, D]
        # [1], index in the rings of the next query, on each device that has rings
        self.ticks: dict[torch.device, Tensor] = {}

    def add(self, layer: int, query: Tensor) -> None:
        """Note the queries [R, H, 1, D] of a step."""
        if layer not in self.rings:
            rows, heads, _, size = query.shape
            self.rings[layer] = query.new_zeros((rows, heads, self.size, size))
        if query.device not in self.ticks:
            self.ticks[query.device] = torch.zeros(1, dtype=torch.int64, device=query.device)
        self.rings[layer].index_copy_(2, self.ticks[query.device], query)

    def advance(self) -> None:
        """Move on to the next token."""
        for tick in self.ticks.values():
            tick.add_(1).remainder_(self.size)

    def latest(self, layer: int, row: int, count: int) -> Tensor:
        """The latest `count` queries [H, count, D] of a row, in order."""
        ring = self.rings[layer][row]
        tick = self.ticks[ring.device]
        order = (tick - count + torch.arange(count, device=ring.device)) % self.size
        return ring[:, order]

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with `rows` only."""
        for layer, ring in self.rings.items():
            self.rings[layer] = ring[torch.tensor(rows, dtype=torch.long, device=ring.device)]


class PagedSequences:
    """What S sequences of all layers read of their pages; `bounds` are None where everything is.

    `bounds` names, for each sequence, the bounds and the row in them.
    """

    def __init__(self, bounds: Sequence[tuple[PageBounds, int] | None]) -> None:
        addresses, shares = [[0, 0, 0, 0, 0]], [0.0]
        for each in bounds:
            if each is None:
                addresses.append(addresses[0])
                shares.append(0.0)
                continue
            held, row = each
            starts = [part[row].data_ptr() for part in (held.mins, held.maxs, held.reads)]
            addresses.append([*starts, held.pages.size, held.pages.least])
            shares.append(held.pages.share)
        self.table = torch.tensor(addresses[1:]).T.contiguous()  # [5, S]
        self.shares = torch.tensor(shares[1:], dtype=torch.float64)
        self.wanted = torch.zeros_like(self.table[0])

    def want(self, lengths: Tensor) -> None:
        """Say how many pages are read of sequences of these lengths [S], as `Pages.read` does."""
        sizes, least = self.table[3:]
        pages = (self.shares * lengths / sizes.clamp(min=1)).round().long()
        torch.maximum(pages, least, out=self.wanted)

    def of(self, place: slice) -> PageTable:
        """What the sequences of a layer read."""
        mins, maxs, reads, sizes, _ = self.table[:, place]
        return PageTable(mins, maxs, sizes, self.wanted[place], reads)

    def keep(self, places: Tensor) -> None:
        """Continue with the sequences at `places` only."""
        self.table = self.table[:, places].contiguous()
        self.shares, self.wanted = self.shares[places], self.wanted[places]


class DecodeKV:
    """A `KVAttention` for R rows that decode one token each per step.

    `prompts` are the lengths of the prompts. The latest `queries` queries of all rows are kept. The
    caches must have storage for all tokens that will
    be decoded. With kernels, tables describe the sequences of all layers one after another, those
    of a layer row by row; the lengths in the caches are not updated. The tables are where the first
    layer is; kernels of layers on other devices read copies.
    """

    def __init__(
        self,
        caches: Sequence[RowCache],
        prompts: Sequence[int],
        layers: Sequence[LayerShape],
        backend: Backend,
        queries: int = 0,
    ) -> None:
        self.caches = list(caches)
        self.recent = RecentQueries(queries)
        self.called: dict[int, tuple[Rules, Any]] = {}  # by layer: its rules and its module
        self.layers = layers
        self.backend = backend
        kinds = [caches[0].layers[layer.source][0].entries() for layer in layers]
        device = kinds[0].keys.device
        kernels = [backend.token_kernel(entries) for entries in kinds]
        self.kernels = [kernel for kernel in kernels if kernel is not None]
        self.by_kernel = len(self.kernels) == len(layers)
        groups = [group for cache in caches for groups in cache.layers for group in groups]
        self.paged = any(group.bounds is not None for group in groups)
        if self.paged and device.type != "cpu":
            self.by_kernel = False  # only the CPU's kernel reads pages
        self.positions = torch.tensor(prompts, device=device)  # [R], of the tokens that are fed
        if not self.by_kernel:
            return
        own = [index for index, layer in enumerate(layers) if layer.source == index]
        table = torch.tensor(
            [
                [*address, row]
                for layer in own
                for row, cache in enumerate(caches)
                for address in cache.addresses(layer)
            ],
            device=device,
        )
        # Each [S], S the sequences of all layers.
        *where, self.lengths, self.sinks, self.sizes, self.spans, self.rows = table.T.contiguous()
        self.where = torch.stack(where)  # [3, S]
        self.pages = None
        if self.paged:
            self.pages = PagedSequences(
                [bounds for layer in own for cache in caches for bounds in cache.bounds(layer)]
            )
        # Rows that retire become windows too, so a captured step must handle windows.
        self.streams = self.capturable or any(group.window for group in groups)
        self.chunked = any(layer.limit and layer.limit.chunked for layer in layers)
        self.longest = max(group.capacity for group in groups)
        # Rows that have retired read and write this.
        entry = max(stored[0, 0].nbytes for entries in kinds for stored in entries)
        self.spare = torch.zeros(2 * entry, dtype=torch.uint8, device=device)
        self._place()

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can repeat a step; rows that have ended then keep their places.

        A graph is of one GPU, so a model that is split over several decodes without.
        """
        alone = len({layer.device for layer in self.layers}) == 1
        return alone and self.by_kernel and self.positions.is_cuda

    def _place(self) -> None:
        """Describe each layer's sequences for the kernels."""
        self.here = self.positions[self.rows]
        self.slots = self.lengths
        if self.streams:
            self.slots = torch.empty_like(self.lengths)
            self._choose_slots()
        if self.pages is not None:
            self.pages.want(self.lengths)
        home, elsewhere = self.positions.device, {layer.device for layer in self.layers}
        tables = self._tables()
        self.copies = {
            device: [table.to(device) for table in tables] for device in elsewhere - {home}
        }
        self.sequences: list[Sequences] = []
        places: dict[int, slice] = {}  # of the sequences of a layer that holds entries
        self.places = places
        start = 0
        for index, layer in enumerate(self.layers):
            if layer.source == index:
                stop = start + len(self.caches) * layer.kv_heads
                places[index], start = slice(start, stop), stop
            place = places[layer.source]
            here, lengths, slots, keys, values, positions = (
                table[place] for table in self.copies.get(layer.device, tables)
            )
            if index != self.layers[layer.source].readers[-1]:
                # Until the last layer that reads them has attended, a full window must not lose
                # its oldest entry: the token waits behind the others.
                slots = lengths
            pages = self.pages.of(place) if self.pages is not None else None
            self.sequences.append(
                Sequences(here, keys, values, positions, lengths, slots, self.longest, pages)
            )

    def _tables(self) -> list[Tensor]:
        """What kernels read, each [S]; the first three change with every token."""
        return [self.here, self.lengths, self.slots, *self.where]

    def _send(self) -> None:
        """Update what kernels of layers on other devices read."""
        for copies in self.copies.values():
            for copy, table in zip(copies[:3], self._tables(), strict=False):
                copy.copy_(table)

    def _choose_slots(self) -> None:
        """A token's entry goes after the others, or replaces the one that leaves the window."""
        ring = self.sinks + (self.here - self.sinks) % self.sizes
        full = self.lengths >= self.sinks + self.sizes
        torch.where(full, ring, self.lengths, out=self.slots)

    def attend(self, call: AttentionCall) -> Tensor:
        """B = R, T = 1: attend, and store the tokens' entries."""
        query, key, value = call.query, call.key, call.value
        rows, kv_heads = key.shape[:2]
        if call.layer == self.layers[call.layer].source:
            if self.recent.size:
                self.recent.add(call.layer, query)
            self.called[call.layer] = call.rules, call.module
        if rows != len(self.caches) or key.shape[2] != 1:
            raise InputError(
                f"layer {call.layer} attends with {rows} rows of {key.shape[2]} tokens, where "
                f"{len(self.caches)} rows of one token were expected"
            )
        if self.by_kernel:
            k, v = key.reshape(rows * kv_heads, -1), value.reshape(rows * kv_heads, -1)
            q = query.reshape(rows * kv_heads, -1, query.shape[-1])
            kernel, sequences = self.kernels[call.layer], self.sequences[call.layer]
            out = kernel(q, k, v, sequences, call.rules)
            return out.reshape(rows, -1, 1, v.shape[-1])
        out = query.new_empty((*query.shape[:3], value.shape[-1]))
        positions = self.positions.to(key.device)
        source = self.layers[call.layer].source
        last = call.layer == self.layers[source].readers[-1]
        for row, cache in enumerate(self.caches):
            grouped = query[row].unflatten(0, (kv_heads, -1))
            here = positions[row].expand(kv_heads, 1)
            own = Entries(key[row], value[row], here)
            attended = attend_groups(cache, source, grouped, own, call.rules, self.backend)
            out[row] = attended.flatten(0, 1)
            for group in cache.layers[source] if last else ():
                if group.window is None:
                    group.add(group.select(own), group.capacity)
                    if group.bounds is not None:
                        group.bounds.add(group.of(key[row])[:, 0], group.length - 1)
                else:
                    group.slide(group.select(own), int(self.positions[row]), group.capacity)
        return out

    def advance(self) -> None:
        """Move on to the next token of every row."""
        self.positions += 1
        self.recent.advance()
        if not self.by_kernel:
            return
        self.here += 1
        self.lengths += 1
        if self.pages is not None:
            self.pages.want(self.lengths)
        if self.streams:
            torch.minimum(self.lengths, self.sinks + self.sizes, out=self.lengths)
            if self.chunked:  # a chunk of attention that is full is out of sight
                within = self.here % self.spans.clamp(min=1)
                torch.where(self.spans > 0, within, self.lengths, out=self.lengths)
            self._choose_slots()
        self._send()

    def update_lengths(self, row: int) -> None:
        """Note in a row's cache how many entries its KV heads hold, which kernels do not do."""
        if not self.by_kernel:
            return
        lengths = iter(self.lengths[self.rows == row].tolist())
        for layer in self.places:
            of_heads = [next(lengths) for _ in range(self.layers[layer].kv_heads)]
            for group in self.caches[row].layers[layer]:
                group.length = of_heads[group.heads[0]]

    def set_length(self, layer: int, row: int, length: int) -> None:
        """Tell that all KV heads of a row's layer now hold `length` entries."""
        if self.by_kernel:
            heads = self.layers[layer].kv_heads
            start = self.places[layer].start + row * heads
            self.lengths[start : start + heads] = length

    def lengths_changed(self) -> None:
        """Choose the slots of the next tokens anew."""
        if not self.by_kernel:
            return
        if self.streams:
            self._choose_slots()
        self._send()

    def retire(self, rows: Collection[int]) -> None:
        """Free the storage of rows that have ended; they keep their places in the batch.

        The tensors stay the same, so a captured graph stays valid. Each sequence of these rows
        becomes a window of one spare entry, and its output is ignored.
        """
        ended = torch.tensor(sorted(rows), device=self.rows.device)
        gone = (self.rows[:, None] == ended).any(-1)
        self.where.masked_fill_(gone, self.spare.data_ptr())
        for table, value in ((self.lengths, 0), (self.sinks, 0), (self.sizes, 1), (self.spans, 0)):
            table.masked_fill_(gone, value)
        for row in rows:
            self.caches[row].clear()
        self._choose_slots()

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with `rows`, which ascend, only; the storage of the others is freed."""
        for row in set(range(len(self.caches))) - set(rows):
            self.caches[row].clear()
        self.caches = [self.caches[row] for row in rows]
        self.recent.keep(rows)
        kept = torch.tensor(rows, dtype=torch.long, device=self.positions.device)
        self.positions = self.positions[kept]
        if not self.by_kernel:
            return
        places = torch.isin(self.rows, kept).nonzero().flatten()
        self.rows = torch.searchsorted(kept, self.rows[places])
        self.where = self.where[:, places]
        if self.pages is not None:
            self.pages.keep(places)
        self.lengths, self.sinks, self.sizes, self.spans = (
            table[places] for table in (self.lengths, self.sinks, self.sizes, self.spans)
        )
        self._place()
