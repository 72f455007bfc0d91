"""Sequences at addresses of their own, to try kernels for single tokens on."""

import torch

from kvbench.engine.attention import Float64
from kvbench.engine.kernels.interface import Sequences, TokenKernel
from kvbench.method import Entries, Limit
from kvbench.models.attention import Rules


def rules(scaling: float, sliding: int | None) -> Rules:
    """Softmax attention within a sliding window."""
    return Rules(scaling, None if sliding is None else Limit(sliding))


class Made:
    """Random sequences of given lengths with a token each; every other one's window is full."""

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
        how = {"dtype": dtype, "device": device}
        count = len(lengths)
        self.lengths = lengths
        self.queries = 2 * torch.randn(count, group, size, **how)
        self.keys, self.values = (torch.randn(count, n, **how) for n in (size, value_size))
        # Beyond a sequence's length nothing may be read.
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
        tensors = [torch.tensor(table, device=device) for table in tables]
        self.sequences = Sequences(*tensors, longest=max(lengths) + 1)

    def addresses(self) -> list[list[int]]:
        """Of keys, values and positions."""
        return [[tensor.data_ptr() for tensor in tensors] for tensors in self.stored]

    def expected(self, scaling: float, sliding: int | None) -> torch.Tensor:
        """What float64 gives, one sequence after the other."""
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
                    rules(scaling, sliding),
                )[0, :, 0]
            )
        return torch.stack(results)

    def check(self, kernel: TokenKernel, sliding: int | None, tolerance: float) -> None:
        """The kernel gives what float64 gives, and puts each token in its place alone."""
        scaling = self.queries.shape[-1] ** -0.5
        want = self.expected(scaling, sliding)
        before = [[tensor.clone() for tensor in tensors] for tensors in self.stored]
        got = kernel(self.queries, self.keys, self.values, self.sequences, rules(scaling, sliding))
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        for u, slot in enumerate(self.slots):
            new = (self.keys[u], self.values[u], self.here[u])
            for tensors, old, token in zip(self.stored, before, new, strict=True):
                old[u][slot] = token
                torch.testing.assert_close(tensors[u], old[u], rtol=0, atol=0, equal_nan=True)
