"""Sequences in separate storage, for tests of kernels for single tokens."""

from dataclasses import replace
from typing import Any

import torch

from kvbench.engine.attention import Float64
from kvbench.engine.kernels.interface import Sequences, TokenKernel
from kvbench.method import Entries, Limit
from kvbench.models.attention import Rules


def rules(
    scaling: float,
    sliding: int | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Rules:
    """Attention within a sliding window, with capped logits and learnt sinks [U, G]."""
    return Rules(scaling, None if sliding is None else Limit(sliding), softcap, sinks)


class Made:
    """Random sequences of given lengths, with one new token each; every second window is full."""

    def __init__(
        self,
        lengths: list[int],
        size: int,
        value_size: int,
        group: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        torch.manual_seed(size * group)
        how: dict[str, Any] = {"dtype": dtype, "device": device}
        count = len(lengths)
        self.lengths = lengths
        self.queries = 2 * torch.randn(count, group, size, **how)
        self.keys, self.values = (torch.randn(count, n, **how) for n in (size, value_size))
        # Nothing beyond a sequence's length may be read.
        self.stored = [
            [torch.full((n + 1, s), torch.nan, **how) for n in lengths] for s in (size, value_size)
        ]
        for tensors in self.stored:
            for tensor, length in zip(tensors, lengths, strict=True):
                tensor[:length] = torch.randn(length, tensor.shape[1], **how)
        positions = [torch.randperm(n + 1, device=device, dtype=torch.int32) for n in lengths]
        self.stored.append(positions)
        self.slots = [n // 2 if index % 2 else n for index, n in enumerate(lengths)]
        self.here = [n + 3 for n in lengths]
        tables = [self.here, *self.addresses(), lengths, self.slots]
        here, keys, values, where, counts, slots = torch.tensor(tables, device=device)
        longest = max(lengths) + 1
        self.sequences = Sequences(here, keys, values, where, counts, slots, longest)

    def addresses(self) -> list[list[int]]:
        """Of keys, values and positions."""
        return [[tensor.data_ptr() for tensor in tensors] for tensors in self.stored]

    def expected(self, how: Rules) -> torch.Tensor:
        """Attention in float64, one sequence after the other."""
        results = []
        for u, length in enumerate(self.lengths):
            keys, values, positions = (tensors[u][:length][None] for tensors in self.stored)
            here = torch.tensor([[self.here[u]]], device=keys.device)
            own = Entries(self.keys[u, None, None], self.values[u, None, None], here)
            results.append(
                Float64().chunk(
                    self.queries[u, None, :, None],
                    Entries(keys, values, positions),
                    own,
                    how if how.sinks is None else replace(how, sinks=how.sinks[u, None]),
                )[0, :, 0]
            )
        return torch.stack(results)

    def check(
        self,
        kernel: TokenKernel,
        sliding: int | None,
        tolerance: float,
        softcap: float | None = None,
        sinks: bool = False,
    ) -> None:
        """The kernel agrees with float64 and writes each token's entry to its slot only."""
        learnt = self.queries[:, :, 0].clone() if sinks else None
        how = rules(self.queries.shape[-1] ** -0.5, sliding, softcap, learnt)
        want = self.expected(how)
        before = [[tensor.clone() for tensor in tensors] for tensors in self.stored]
        got = kernel(self.queries, self.keys, self.values, self.sequences, how)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for u, slot in enumerate(self.slots):
            new = (self.keys[u], self.values[u], torch.tensor(self.here[u]))
            for tensors, old, token in zip(self.stored, before, new, strict=True):
                old[u][slot] = token
                torch.testing.assert_close(tensors[u], old[u], rtol=0, atol=0, equal_nan=True)
