"""Counts what a row holds: its KV footprint, peaks, bytes and timeline; and closed forms of them.

The engine tells `Accounting` what happened (`attended`, `evicted`, `moved`); nothing here decides
anything. An *entry-row* is one KV entry of one KV head, resident while the model processes one
token: 100 entries resident over 10 tokens are 1,000 entry-rows (docs/concepts.md).

Layers that the model itself limits count what a row sees of what they hold. Where they hold all
that later rows can see (`Visible`), chunks change nothing: each row is counted by itself, as a
decoded token is.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from kvbench.method import Entries, Limit

if TYPE_CHECKING:
    from torch import Tensor

    from kvbench.models.attention import LayerShape


class EntryBytes(NamedTuple):
    """Bytes of the key and of the value of one entry.

    Positions are left out: a production cache would not need them.
    """

    key: int
    value: int

    @classmethod
    def of(cls, entries: Entries) -> "EntryBytes":
        """The bytes of entries like these."""
        return cls(*(t.shape[-1] * t.itemsize for t in (entries.keys, entries.values)))


class Held(NamedTuple):
    """What a group of KV heads of a layer holds before tokens are decoded."""

    heads: int
    entries: int  # of each head
    most: int | None  # entries that a window holds at most; None without a window
    limit: Limit | None  # the model's own
    visible: bool  # whether it holds all that the limit lets later tokens see
    positions: "Tensor | None"  # [heads, entries] in a limited layer without a window
    size: int  # bytes of an entry


@dataclass
class Accounting:
    """What one row holds over all its layers and KV heads, counted as if it ran alone.

    `entries` and `bytes` are what is resident now, temporary copies included in the bytes;
    `bytes_peak` is their maximum. `entries_peak` takes a row as one moment in all layers: it is the
    most that was resident at a row, before that row's eviction. `held_peak` is the most at one
    instant as executed, layer after layer, so it depends on the prefill chunk. `timeline` is
    described in `kvbench.records.Record`. Entries of limited layers that hold all that is visible
    are `visible`, and `seen` is the most that a row saw.
    """

    resident_rows: int = 0  # entry-rows
    read_rows: int = 0  # entry-rows that attention read
    patch_rows: int = 0  # patched tokens that went through the model
    replay_rows: int = 0  # tokens of a replay that went through the model
    entries: int = 0
    entries_peak: int = 0
    held_peak: int = 0
    visible: int = 0
    seen: int = 0
    bytes_read: int = 0  # of keys, values and page bounds, by decoded tokens
    bytes: int = 0
    bytes_peak: int = 0
    timeline: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])
    _growing: int = 0  # KV heads that have attended to the chunk and count all its tokens
    _windows: list[tuple[int, int]] = field(default_factory=list)  # KV heads that count fewer
    _limits: Counter[Limit] = field(default_factory=Counter)  # KV heads of limited layers
    _before: int = 0  # entries when the chunk arrived
    _arrived: int = 0  # entries that came with it, in all layers so far
    _patched: int = 0  # the patched ones of them

    def attended(
        self, heads: int, past: int, new: int, patched: int, stored: int, size: EntryBytes
    ) -> None:
        """A chunk attended causally in `heads` KV heads that held `past` entries each.

        It has `new` tokens and then `patched` ones, which count as entries but not as rows. Storage
        for `stored` more entries is allocated in each head.
        """
        self._count(heads * entry_rows(past, new))
        self._growing += heads
        self._arrive(heads * new, heads * patched)
        self._allocate(heads * stored * sum(size))

    def attended_in_sight(
        self,
        heads: int,
        past: int,
        new: int,
        patched: int,
        limit: Limit,
        stored: int,
        size: EntryBytes,
    ) -> None:
        """As `attended`, of KV heads that hold all that the model's limit lets a row see.

        They count, from now on, what later rows can see; `evicted` does not change that.
        """
        start = self.timeline[-1][0]
        self._count(heads * contiguous_rows(limit, past, new))
        self._limits[limit] += heads
        self.visible += heads * (limit.held(start + new) - limit.held(start))
        more = heads * (min(start + new, limit.size) - min(start, limit.size))
        self.seen += more
        self._arrived += more
        self._arrive(0, heads * patched)
        self._allocate(heads * stored * sum(size))

    def attended_in_part(
        self,
        heads: int,
        past: "Tensor | int",
        new: int,
        patched: int,
        limit: Limit,
        stored: int,
        size: EntryBytes,
    ) -> None:
        """As `attended`, of KV heads that a method evicts from in a layer that the model limits.

        `past` are the positions [heads, entries] of what they held, or the number of the latest
        entries. A row counts those that it sees, so that no more than `limit.size` count at once.
        """
        start = self.timeline[-1][0]
        if isinstance(past, int):
            self._count(heads * contiguous_rows(limit, past, new))
        else:
            self._count(rows_in_sight(past, limit, start, new))
            self._count(heads * contiguous_rows(limit, 0, new))
        space = space_in_sight(past if isinstance(past, int) else past.shape[1], new, limit)
        self._windows.append((heads, space))
        self._arrive(heads * space, heads * patched)
        self._allocate(heads * stored * sum(size))

    def evicted(
        self,
        heads: int,
        before: int,
        new: int,
        after: int,
        size: EntryBytes,
        counted: int | None = None,
    ) -> None:
        """Of `before` entries and `new` ones of a chunk in each of `heads` KV heads, `after` stay.

        The chunk's own storage is freed. Of its entries `counted` were counted (None: all).
        """
        self._hold(heads * (after - before - (new if counted is None else counted)))
        self._allocate(-heads * new * sum(size))

    def moved(self, heads: int, before: int, after: int, size: EntryBytes) -> None:
        """The storage of `heads` KV heads changed from `before` to `after` entries each.

        Keys move before values, so that old and new storage never exist both in full.
        """
        for bytes_ in size:
            self._allocate(heads * after * bytes_)
            self._allocate(-heads * before * bytes_)

    def replayed(self, tokens: int, layers: Sequence[tuple[int, EntryBytes]]) -> None:
        """`tokens` tokens of a replay went through the model; each layer held and freed them.

        `layers` are the KV heads of each layer and the bytes of its entries.
        """
        self.replay_rows += tokens
        for heads, size in layers:
            self._hold(heads * tokens)
            self.copied(heads * tokens * sum(size))
            self._hold(-heads * tokens)
        whole = self.entries + self.seen + sum(heads for heads, _ in layers) * tokens
        self.entries_peak = max(self.entries_peak, whole)

    def copied(self, size: int) -> None:
        """A temporary copy of `size` bytes was made."""
        self._allocate(size)
        self._allocate(-size)

    def kept_beside(self, size: int) -> None:
        """`size` more bytes are kept beside the entries; fewer if it is negative."""
        self._allocate(size)

    def freed(self, heads: int, tokens: int, patched: int, size: EntryBytes) -> None:
        """The storage of a chunk of `tokens` tokens, `patched` ones with it, is freed."""
        self._hold(-heads * patched)
        self._allocate(-heads * tokens * sum(size))

    def left_sight(self, heads: int, limit: Limit, tokens: int, kept: int) -> None:
        """`heads` KV heads held all that was visible after `tokens` tokens; they keep `kept`."""
        self.visible -= heads * limit.held(tokens)
        self.seen -= heads * min(tokens, limit.size)
        self._hold(heads * kept)

    def chunk_read(self, tokens: int, patched: int) -> None:
        """All KV heads have attended to a chunk, and evicted."""
        rows, _ = self.timeline[-1]
        self._course(rows + tokens, self._growing, self._windows, self._limits)
        self._point(rows + tokens, self.timeline[-1][1] + self._patched)
        self._point(rows + tokens, self.entries + self.visible)
        self.patch_rows += patched
        self.entries_peak = max(self.entries_peak, self._before + self._arrived)
        self._growing, self._windows, self._limits = 0, [], Counter()
        self._before, self._arrived, self._patched = self.entries + self.seen, 0, 0

    def decoded(self, layers: Sequence[Sequence[Held]], tokens: int) -> None:
        """`tokens` tokens were decoded, one at a time; counted in closed form.

        `layers` describes the groups of KV heads of each layer before that.
        """
        if not tokens:
            return
        start, whole = self.timeline[-1][0], 0
        windows: list[tuple[int, int]] = []  # heads, and how many entries they can still take
        limits: Counter[Limit] = Counter()
        within = most = 0  # entries added during the last token's forward, before windows slide
        last = 0  # entries at the last token's row
        for groups in layers:
            most = max(most, within + sum(held.heads for held in groups if not held.visible))
            for heads, past, at_most, limit, visible, positions, size in groups:
                counted = self.read_rows
                if visible and limit is not None:
                    self._count(heads * contiguous_rows(limit, past, tokens))
                    self.visible += heads * (limit.held(start + tokens) - limit.held(start))
                    self.seen += heads * (min(start + tokens, limit.size) - min(start, limit.size))
                    limits[limit] += heads
                    self.bytes_read += (self.read_rows - counted) * size
                    continue
                growing = tokens if at_most is None else min(tokens, at_most - past)
                if positions is not None and limit is not None:
                    self._count(rows_in_sight(positions, limit, start, tokens))
                    self._count(heads * contiguous_rows(limit, 0, tokens))
                else:
                    flat = tokens - growing
                    self._count(heads * (entry_rows(past, growing) + flat * (past + growing + 1)))
                self.bytes_read += (self.read_rows - counted) * size
                self.entries += heads * growing
                within += heads * (growing == tokens)
                last += heads * (past + tokens - (growing < tokens) * (tokens - growing - 1))
                if at_most is None:
                    whole += heads
                else:
                    windows.append((heads, at_most - past))
        self._course(start + tokens, whole, windows, limits)
        self.entries_peak = max(self.entries_peak, last + self.seen)
        self.held_peak = max(self.held_peak, self.entries - within + most + self.seen)

    def read_in_pages(self, whole: int, read: int, pages: int, size: EntryBytes) -> None:
        """Decoded tokens read `read` entries, not all of the `whole` that were resident.

        They read the bounds of `pages` pages, two keys each. All of them over KV heads and tokens.
        """
        self.read_rows -= whole - read
        self.bytes_read += 2 * pages * size.key - (whole - read) * sum(size)

    def evicted_while_decoding(self) -> None:
        """All KV heads have evicted after a decoded token."""
        self._point(self.timeline[-1][0], self.entries + self.visible)

    def _course(
        self,
        stop: int,
        growing: int,
        windows: Sequence[tuple[int, int]],
        limits: Counter[Limit],
    ) -> None:
        """Continue the timeline up to row `stop`: `growing` heads add an entry for each row.

        `windows` are heads that add no more than so many entries; `limits` count the heads of
        layers that hold all that is visible.
        """
        start, before = self.timeline[-1]

        def held(row: int, closing: bool) -> int:
            entries = before + growing * (row - start)
            entries += sum(heads * min(row - start, space) for heads, space in windows)
            for limit, heads in limits.items():
                full = limit.chunked and closing and not row % limit.size
                entries += heads * ((limit.size if full else limit.held(row)) - limit.held(start))
            return entries

        bends = {stop} | {start + space for _, space in windows}
        for limit in limits:
            first = limit.size - 1
            bends |= set(
                range(start - start % limit.size + limit.size, stop + 1, limit.size)
                if limit.chunked
                else [first]
            )
        for bend in sorted(bends):
            if start < bend <= stop:
                self._point(bend, held(bend, True))
                self._point(bend, held(bend, False))

    def _count(self, rows: int) -> None:
        self.resident_rows += rows
        self.read_rows += rows

    def _arrive(self, new: int, patched: int) -> None:
        """Entries came with a chunk."""
        self._arrived += new + patched
        self._patched += patched
        self._hold(new + patched)

    def _hold(self, entries: int) -> None:
        self.entries += entries
        self.held_peak = max(self.held_peak, self.entries + self.seen)

    def _allocate(self, size: int) -> None:
        self.bytes += size
        self.bytes_peak = max(self.bytes_peak, self.bytes)

    def _point(self, rows: int, entries: int) -> None:
        """After `rows` rows, `entries` entries are resident; linear between points."""
        point = (rows, entries)
        line = self.timeline
        if len(line) > 1 and _straight(line[-2], line[-1], point):
            line.pop()
        if line[-1] != point:
            line.append(point)


def _straight(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether b lies between a and c on a straight line."""
    return a[0] < b[0] < c[0] and (b[1] - a[1]) * (c[0] - b[0]) == (c[1] - b[1]) * (b[0] - a[0])


def entry_rows(past: int, new: int) -> int:
    """Entry-rows of `new` tokens on top of `past` resident entries, in one KV head."""
    return new * past + new * (new + 1) // 2


def chunks(prompt: int, prefill_chunk: int | None) -> list[int]:
    """The lengths in tokens of the prefill chunks of a prompt; None reads it at once."""
    size = prefill_chunk or prompt
    return [min(size, prompt - start) for start in range(0, prompt, size)]


def contiguous_rows(limit: Limit, past: int, new: int) -> int:
    """Entry-rows of `new` tokens that see the `past` latest entries as far as the limit lets them.

    In one KV head of a layer that the model limits.
    """
    growing = min(new, limit.size - past)
    rest = new - growing
    if limit.chunked:
        whole, part = divmod(rest, limit.size)
        more = whole * entry_rows(0, limit.size) + entry_rows(0, part)
    else:
        more = rest * limit.size
    return entry_rows(past, growing) + more


def space_in_sight(past: int, new: int, limit: Limit) -> int:
    """Of `new` entries after `past` ones, as many as one row could see of them."""
    return min(new, max(0, limit.size - past))


def rows_in_sight(positions: "Tensor", limit: Limit, start: int, tokens: int) -> int:
    """Entry-rows of entries at `positions`, for `tokens` tokens from position `start` on.

    Each counts for the tokens that a sliding window lets see it.
    """
    return int((positions.long() + limit.size - start).clamp(0, tokens).sum())


def full_attention_rows(layers: "Sequence[LayerShape]", prompt: int, decoded: int) -> int:
    """Entry-rows of all layers under full attention, in which limited layers see less."""
    rows = 0
    for index, layer in enumerate(layers):
        if layer.source == index:
            limit = layer.limit
            whole = full_rows(prompt, decoded)
            seen = whole if limit is None else contiguous_rows(limit, 0, prompt + decoded)
            rows += layer.kv_heads * seen
    return rows


def full_attention_peak(layers: "Sequence[LayerShape]", tokens: int) -> int:
    """Entries that rows see at most under full attention, once `tokens` tokens have been read."""
    return sum(
        layer.kv_heads * (tokens if layer.limit is None else min(tokens, layer.limit.size))
        for index, layer in enumerate(layers)
        if layer.source == index
    )


def full_rows(prompt: int, decoded: int) -> int:
    """Entry-rows of a KV head under full attention, N (N + 1) / 2 with N = prompt + decoded."""
    return entry_rows(0, prompt + decoded)


def post_fill_rows(prompt: int, decoded: int, kept: int) -> int:
    """Entry-rows of a KV head that keeps `kept` entries once the whole prompt is read."""
    return bounded_rows([prompt], kept, decoded, interval=0)


def chunked_rows(sizes: Sequence[int], kept: Sequence[int], decoded: int) -> int:
    """Entry-rows of a KV head that keeps `kept[i]` of the `sizes[i]` entries of prefill chunk i."""
    total = past = 0
    for size, stay in zip(sizes, kept, strict=True):
        total += entry_rows(past, size)
        past += stay
    return total + entry_rows(past, decoded)


def bounded_rows(sizes: Sequence[int], held: int, decoded: int, interval: int = 1) -> int:
    """Entry-rows of a KV head that holds `held` entries at most after each eviction.

    It evicts after each of the prefill chunks `sizes`, and after each `interval` decoded tokens; 0
    evicts nothing while decoding.
    """
    total = past = 0
    for size in [*sizes, *(chunks(decoded, interval) if decoded else ())]:
        total += entry_rows(past, size)
        past = min(held, past + size)
    return total
