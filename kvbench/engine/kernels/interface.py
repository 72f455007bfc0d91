"""The types of attention kernels."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvbench.method import Entries


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

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in this order."""
        return self.here, self.keys, self.values, self.positions, self.lengths, self.slots


# (queries [U, G, D], keys [U, D], values [U, Dv], sequences, scaling, the model's sliding window in
# tokens or None) -> [U, G, Dv]: the current token of each sequence attends to the resident entries
# and to itself, and its entry is stored.
TokenKernel = Callable[[Tensor, Tensor, Tensor, Sequences, float, int | None], Tensor]

# (queries [1, H, T, D], entries, scaling, causal) -> the attention [H, T, D] to these entries only,
# and the logarithm [H, T] of its normaliser.
Partial = Callable[[Tensor, Entries, float, bool], tuple[Tensor, Tensor]]
