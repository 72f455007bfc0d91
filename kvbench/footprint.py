"""The KV footprint: counted on the live cache, and in closed form (ALGORITHMS, section 1).

A *row* is a token that the model processes. An *entry-row* is one KV entry of one KV head resident
while one row is processed: 100 entries resident over 10 rows are 1,000.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class Meter:
    """Counts what one row of a batch holds, over all its layers and KV heads.

    `entries` and `bytes` are what is resident now; a peak is the most there has been at any moment.
    Bytes are those of keys and values, also of the copies that exist while an eviction moves them;
    positions, which a production cache would not need, are left out.
    """

    resident_rows: int = 0
    read_rows: int = 0
    patch_rows: int = 0
    entries: int = 0
    entries_peak: int = 0
    bytes: int = 0
    bytes_peak: int = 0

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
