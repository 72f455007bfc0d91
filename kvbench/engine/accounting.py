"""Counts what a row holds: its KV footprint, peaks, bytes and timeline; and closed forms of them.

The engine tells `Accounting` what happened (`attended`, `evicted`, `moved`); nothing here decides
anything. An *entry-row* is one KV entry of one KV head, resident while the model processes one
token: 100 entries resident over 10 tokens are 1,000 entry-rows (docs/concepts.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbench.method import Entries


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


@dataclass
class Accounting:
    """What one row holds over all its layers and KV heads, counted as if it ran alone.

    `entries` and `bytes` are what is resident now, temporary copies included in the bytes; the
    peaks are their maxima. `timeline` is described in `kvbench.records.Record`.
    """

    resident_rows: int = 0  # entry-rows
    read_rows: int = 0  # entry-rows that attention read
    patch_rows: int = 0  # patched tokens that went through the model
    entries: int = 0
    entries_peak: int = 0
    bytes: int = 0
    bytes_peak: int = 0
    timeline: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    def attended(
        self, heads: int, past: int, new: int, patched: int, stored: int, size: EntryBytes
    ) -> None:
        """A chunk attended causally in `heads` KV heads that held `past` entries each.

        It has `new` tokens and then `patched` ones, which count as entries but not as rows. Storage
        for `stored` more entries is allocated in each head.
        """
        rows = heads * entry_rows(past, new)
        self.resident_rows += rows
        self.read_rows += rows
        self._hold(heads * (new + patched))
        self._allocate(heads * stored * sum(size))

    def evicted(self, heads: int, before: int, new: int, after: int, size: EntryBytes) -> None:
        """Of `before` entries and `new` ones of a chunk in each of `heads` KV heads, `after` stay.

        The chunk's own storage is freed.
        """
        self._hold(heads * (after - before - new))
        self._allocate(-heads * new * sum(size))

    def moved(self, heads: int, before: int, after: int, size: EntryBytes) -> None:
        """The storage of `heads` KV heads changed from `before` to `after` entries each.

        Keys move before values, so that old and new storage never exist both in full.
        """
        for bytes_ in size:
            self._allocate(heads * after * bytes_)
            self._allocate(-heads * before * bytes_)

    def chunk_read(self, tokens: int, patched: int, kv_heads: int) -> None:
        """All `kv_heads` KV heads have attended to a chunk, and evicted."""
        rows, held = self.timeline[-1]
        self._point(rows + tokens, held + tokens * kv_heads)
        self._point(rows + tokens, self.entries)
        self.patch_rows += patched

    def decoded(self, layers: Sequence[Sequence[tuple[int, int, int | None]]], tokens: int) -> None:
        """`tokens` tokens were decoded, one at a time; counted in closed form.

        `layers` describes the groups of KV heads of each layer before that: how many heads, how
        many entries each held, and the most it can hold (None: no limit).
        """
        if not tokens:
            return
        before = self.entries
        start = self.timeline[-1][0]
        bends = {tokens}
        within = most = 0  # entries added during the last token's forward, before windows slide
        for groups in layers:
            most = max(most, within + sum(heads for heads, _, _ in groups))
            for heads, past, limit in groups:
                growing = tokens if limit is None else min(tokens, limit - past)
                flat = tokens - growing
                rows = entry_rows(past, growing) + flat * (past + growing + 1)
                self.resident_rows += heads * rows
                self.read_rows += heads * rows
                self.entries += heads * growing
                within += heads * (growing == tokens)
                if growing:
                    bends.add(growing)
        for bend in sorted(bends):
            added = sum(
                heads * (bend if limit is None else min(bend, limit - past))
                for groups in layers
                for heads, past, limit in groups
            )
            self._point(start + bend, before + added)
        self.entries_peak = max(self.entries_peak, self.entries - within + most)

    def _hold(self, entries: int) -> None:
        self.entries += entries
        self.entries_peak = max(self.entries_peak, self.entries)

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


def full_rows(prompt: int, decoded: int) -> int:
    """Entry-rows of a KV head under full attention, N (N + 1) / 2 with N = prompt + decoded."""
    return entry_rows(0, prompt + decoded)


def post_fill_rows(prompt: int, decoded: int, kept: int) -> int:
    """Entry-rows of a KV head that keeps `kept` entries once the whole prompt is read."""
    return full_rows(prompt, 0) + entry_rows(kept, decoded)


def chunked_rows(sizes: Sequence[int], kept: Sequence[int], decoded: int) -> int:
    """Entry-rows of a KV head that keeps `kept[i]` of the `sizes[i]` entries of prefill chunk i."""
    total = past = 0
    for size, stay in zip(sizes, kept, strict=True):
        total += entry_rows(past, size)
        past += stay
    return total + entry_rows(past, decoded)


def window_rows(sizes: Sequence[int], window: int, decoded: int) -> int:
    """Entry-rows of a streaming KV head of `window` entries, sinks included."""
    total = read = 0
    for size in [*sizes, *[1] * decoded]:
        total += entry_rows(min(read, window), size)
        read += size
    return total
