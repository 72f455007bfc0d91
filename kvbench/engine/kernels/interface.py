"""What kernels take and give."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvbench.method import Entries
from kvbench.models.attention import Rules


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


# (queries [U, G, D], keys [U, D], values [U, Dv], sequences, how the layer attends) -> [U, G, Dv]:
# each sequence's token attends to all it holds and to itself, and takes its place. Of limits only
# sliding windows hide entries here; what a chunk of attention hides is not resident.
TokenKernel = Callable[[Tensor, Tensor, Tensor, Sequences, Rules], Tensor]


def sinks_of(rules: Rules, count: int) -> Tensor:
    """The learnt sinks of `count` sequences, which take turns over the KV heads: [count, G]."""
    assert rules.sinks is not None
    return rules.sinks.float().repeat(count // len(rules.sinks), 1)


# (queries [1, H, T, D], entries, scaling, causal) -> attention [H, T, D] to these entries alone,
# and the logarithm [H, T] of its normaliser
Partial = Callable[[Tensor, Entries, float, bool], tuple[Tensor, Tensor]]
