"""Decodes a batch of rows of different samples, methods and budgets, one token each per step.

Every KV head of a row is a sequence with its own length. Kernels read entries where they are stored
and write a token's entry into its slot, so nothing is copied or padded. A row that has ended frees
its storage.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvbench.engine.attention import Backend, attend_groups
from kvbench.engine.cache import RowCache
from kvbench.engine.kernels.interface import Sequences
from kvbench.method import Entries
from kvbench.models.attention import AttentionCall


class DecodeKV:
    """A `KVAttention` for R rows that decode one token each per step.

    `prompts` are the lengths of the prompts. The caches must have storage for all tokens that will
    be decoded. With kernels, `lengths` [layers, R * K] counts the entries of each sequence, and the
    lengths in the caches are not updated.
    """

    def __init__(
        self, caches: Sequence[RowCache], prompts: Sequence[int], backend: Backend
    ) -> None:
        self.caches = list(caches)
        self.backend = backend
        layers = caches[0].layers
        kinds = [groups[0].entries() for groups in layers]
        device = kinds[0].keys.device
        kernels = [backend.token_kernel(entries) for entries in kinds]
        self.kernels = [kernel for kernel in kernels if kernel is not None]
        self.by_kernel = len(self.kernels) == len(layers)
        kv_heads = sum(len(group.heads) for group in layers[0])
        # [R, K], positions of the tokens that are fed
        self.here = torch.tensor(prompts, device=device)[:, None].repeat(1, kv_heads)
        if not self.by_kernel:
            return
        table = torch.tensor(
            [
                [head for cache in caches for head in cache.addresses(layer)]
                for layer in range(len(layers))
            ],
            device=device,
        )
        *where, self.lengths, self.sinks, self.sizes = table.unbind(-1)
        self.where = torch.stack(where)  # [3, layers, R * K]
        self.lengths = self.lengths.contiguous()
        # Rows that retire become windows too, so a captured step must handle windows.
        self.streams = self.capturable or any(
            group.window for cache in caches for groups in cache.layers for group in groups
        )
        self.longest = max(
            group.capacity for cache in caches for groups in cache.layers for group in groups
        )
        # Rows that have retired read and write this.
        entry = max(stored[0, 0].nbytes for entries in kinds for stored in entries)
        self.spare = torch.zeros(entry, dtype=torch.uint8, device=device)
        self._place()

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can repeat a step; rows that have ended then keep their places."""
        return self.by_kernel and self.here.is_cuda

    @property
    def positions(self) -> Tensor:
        """[R], positions of the tokens that are fed."""
        return self.here[:, 0]

    def _place(self) -> None:
        """Describe each layer's sequences for the kernels."""
        self.slots = self.lengths
        if self.streams:
            self.slots = torch.empty_like(self.lengths)
            self._choose_slots()
        here, longest = self.here.flatten(), self.longest
        self.sequences = [
            Sequences(here, keys, values, positions, lengths, slots, longest)
            for keys, values, positions, lengths, slots in zip(
                *self.where, self.lengths, self.slots, strict=True
            )
        ]

    def _choose_slots(self) -> None:
        """A token's entry goes after the others, or replaces the one that leaves the window."""
        ring = self.sinks + (self.here.flatten() - self.sinks) % self.sizes
        full = self.lengths >= self.sinks + self.sizes
        torch.where(full, ring, self.lengths, out=self.slots)

    def attend(self, call: AttentionCall) -> Tensor:
        """B = R, T = 1: attend, and store the tokens' entries."""
        query, key, value = call.query, call.key, call.value
        rows, kv_heads = key.shape[:2]
        if self.by_kernel:
            k, v = key.reshape(rows * kv_heads, -1), value.reshape(rows * kv_heads, -1)
            q = query.reshape(rows * kv_heads, -1, query.shape[-1])
            kernel, sequences = self.kernels[call.layer], self.sequences[call.layer]
            out = kernel(q, k, v, sequences, call.scaling, call.sliding)
            return out.reshape(rows, -1, 1, v.shape[-1])
        out = query.new_empty((*query.shape[:3], value.shape[-1]))
        for row, cache in enumerate(self.caches):
            grouped = query[row].unflatten(0, (kv_heads, -1))
            own = Entries(key[row], value[row], self.here[row, :, None])
            out[row] = attend_groups(cache, call, grouped, own, self.backend).flatten(0, 1)
            for group in cache.layers[call.layer]:
                if group.window is None:
                    group.add(group.select(own), group.capacity)
                else:
                    group.slide(group.select(own), int(self.here[row, 0]), group.capacity)
        return out

    def advance(self) -> None:
        """Move on to the next token of every row."""
        self.here += 1
        if not self.by_kernel:
            return
        self.lengths += 1
        if self.streams:
            torch.minimum(self.lengths, self.sinks + self.sizes, out=self.lengths)
            self._choose_slots()

    def retire(self, rows: Collection[int]) -> None:
        """Free the storage of rows that have ended; they keep their places in the batch.

        The tensors stay the same, so a captured graph stays valid. Each sequence of these rows
        becomes a window of one spare entry, and its output is ignored.
        """
        kv_heads = self.here.shape[1]
        for row in rows:
            columns = slice(row * kv_heads, (row + 1) * kv_heads)
            self.where[..., columns] = self.spare.data_ptr()
            self.lengths[:, columns] = self.sinks[:, columns] = 0
            self.sizes[:, columns] = 1
            self.caches[row].clear()
        self._choose_slots()

    def keep(self, rows: Sequence[int]) -> None:
        """Continue with `rows` only; the storage of the others is freed."""
        for row in set(range(len(self.caches))) - set(rows):
            self.caches[row].clear()
        self.caches = [self.caches[row] for row in rows]
        kept = torch.tensor(rows, dtype=torch.long, device=self.here.device)
        shape, self.here = self.here.shape, self.here[kept]
        if not self.by_kernel:
            return
        self.where, self.lengths, self.sinks, self.sizes = (
            table.unflatten(-1, shape)[..., kept, :].flatten(-2)
            for table in (self.where, self.lengths, self.sinks, self.sizes)
        )
        self._place()
