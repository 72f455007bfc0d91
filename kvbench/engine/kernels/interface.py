"""What kernels take and give."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvbench.method import Entries


@dataclass(frozen=True)
class Sequences:
    """KV heads of one layer of some rows, U of them, as they decode: where the entries of each lie.

    All are int64 tensors [U]: the position of the token that each has now, the addresses of its
    first key, value and position, the number of entries that are resident, and the place that the
    token takes once it has attended. No sequence ever holds more than `longest`.
    """

    here: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    slots: Tensor
    longest: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in this order."""
        return self.here, self.keys, self.values, self.positions, self.lengths, self.slots


# (queries [U, G, D], keys [U, D], values [U, Dv], sequences, scaling, the model's sliding window in
# tokens or None) -> [U, G, Dv]: each sequence's token attends to all it holds and to itself, and
# takes its place.
TokenKernel = Callable[[Tensor, Tensor, Tensor, Sequences, float, int | None], Tensor]

# (queries [1, H, T, D], entries, scaling, causal) -> attention [H, T, D] to these entries alone,
# and the logarithm [H, T] of its normaliser
Partial = Callable[[Tensor, Entries, float, bool], tuple[Tensor, Tensor]]
