"""The types of attention kernels."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvbench.method import Entries
from kvbench.models.attention import Rules


@dataclass(frozen=True)
class PageTable:
    """Which pages of U sequences are read (dynamic sparsity); the tensors are int64 [U]."""

    mins: Tensor  # address of the smallest keys of each page, [pages, D]
    maxs: Tensor  # address of the largest keys
    sizes: Tensor  # entries of a page; 0: the sequence has none and reads everything
    wanted: Tensor  # pages that the current token reads
    reads: Tensor  # address of the number of entries read so far, which a kernel adds to

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in this order."""
        return self.mins, self.maxs, self.sizes, self.wanted, self.reads


@dataclass(frozen=True)
class Sequences:
    """Where the entries of U sequences are stored: the KV heads of one layer of decoding rows.

    The tensors are int64 [U].
    """

    here: Tensor  # position of each sequence's current token
    keys: Tensor  # address of the first key
    values: Tensor  # address of the first value
    positions: Tensor  # address of the first position
    lengths: Tensor  # resident entries
    slots: Tensor  # index in storage where the current token's entry goes
    longest: int  # the most entries that any sequence will hold
    pages: PageTable | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in this order."""
        return self.here, self.keys, self.values, self.positions, self.lengths, self.slots


# (queries [U, G, D], keys [U, D], values [U, Dv], sequences, how the layer attends) -> [U, G, Dv]:
# the current token of each sequence attends to the resident entries and to itself, and its entry is
# stored. Of limits only sliding windows hide entries; other chunks of attention are not resident.
TokenKernel = Callable[[Tensor, Tensor, Tensor, Sequences, Rules], Tensor]


def sinks_of(rules: Rules, count: int) -> Tensor:
    """The learnt sinks of `count` sequences, which take turns over the KV heads: [count, G]."""
    assert rules.sinks is not None
    return rules.sinks.float().repeat(count // len(rules.sinks), 1)


# (queries [1, H, T, D], entries, scaling, causal) -> the attention [H, T, D] to these entries only,
# and the logarithm [H, T] of its normaliser.
Partial = Callable[[Tensor, Entries, float, bool], tuple[Tensor, Tensor]]
