"""The KV footprint: counted on the live cache, and in closed form (ALGORITHMS, section 1).

A *row* is a token that the model processes. An *entry-row* is one KV entry of one KV head resident
while one row is processed: 100 entries resident over 10 rows are 1,000.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Counts what one row of a batch holds, over all its layers and KV heads.

    `entries` and `bytes` are what is resident now; a peak is the most there has been at any moment.
    Bytes are those of the row's keys and values, the copies included that exist while an eviction
    moves them: what the row takes when it runs alone, whatever it shares with others. Positions,
    which a production cache would not need, are left out. `timeline` is in results.Record.
    """

    resident_rows: int = 0
    read_rows: int = 0
    patch_rows: int = 0
    entries: int = 0
    entries_peak: int = 0
    bytes: int = 0
    bytes_peak: int = 0
    timeline: list[tuple[int, int]] = field(default_factory=list)

    def attended(self, heads: int, past: int, new: int) -> None:
        """`new` tokens attended causally in `heads` KV heads that held `past` entries each."""
        rows = heads * entry_rows(past, new)
        self.resident_rows += rows
        self.read_rows += rows

    def hold(self, entries: int) -> None:
        """Add (or, if negative, remove) resident entries."""
        self.entries += entries
        self.entries_peak = max(self.entries_peak, self.entries)

    def allocate(self, size: int) -> None:
        """Add (or, if negative, free) bytes of keys and values."""
        self.bytes += size
        self.bytes_peak = max(self.bytes_peak, self.bytes)

    def corner(self, rows: int, entries: int) -> None:
        """After `rows` rows `entries` are resident; in between, it goes in straight lines."""
        point = (rows, entries)
        line = self.timeline
        if len(line) > 1 and _straight(line[-2], line[-1], point):
            line.pop()
        if not line or line[-1] != point:
            line.append(point)

    def decoded(self, layers: Sequence[Sequence[tuple[int, int, int | None]]], tokens: int) -> None:
        """`tokens` tokens were decoded, one at a time.

        For every layer, its groups of KV heads: how many heads, how many entries each held before,
        and the most it holds (None: no limit).
        """
        if not tokens:
            return
        before = self.entries
        start = self.timeline[-1][0] if self.timeline else 0
        bends = {tokens}
        within = most = 0  # in the last token's step, before which most is resident
        for groups in layers:
            heads = sum(count for count, _, _ in groups)
            most = max(most, within + heads)
            for count, past, limit in groups:
                growing = tokens if limit is None else min(tokens, limit - past)
                flat = tokens - growing
                rows = entry_rows(past, growing) + flat * (past + growing + 1)
                self.resident_rows += count * rows
                self.read_rows += count * rows
                self.entries += count * growing
                within += count * (growing == tokens)
                if growing:
                    bends.add(growing)
        for bend in sorted(bends):
            held = sum(
                count * (bend if limit is None else min(bend, limit - past))
                for groups in layers
                for count, past, limit in groups
            )
            self.corner(start + bend, before + held)
        self.entries_peak = max(self.entries_peak, self.entries - within + most)


def _straight(a: tuple[int, int], b: tuple[int, int], c: tuple[int, int]) -> bool:
    """Whether b lies on the way from a to c, and between them."""
    return a[0] < b[0] < c[0] and (b[1] - a[1]) * (c[0] - b[0]) == (c[1] - b[1]) * (b[0] - a[0])


def entry_rows(past: int, new: int) -> int:
    """Entry-rows of `new` tokens on top of `past` resident entries, in one KV head."""
    return new * past + new * (new + 1) // 2


def chunks(prompt: int, prefill_chunk: int | None) -> list[int]:
    """The lengths of the prefill chunks of a prompt; None reads it at once."""
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
