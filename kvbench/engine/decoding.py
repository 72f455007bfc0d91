"""Decoding over ragged caches: rows of different samples, methods and budgets, a token each.

Every KV head of a row is a sequence of its own length. It is read where it lies, a token is written
where it stays, and a row that has ended frees its storage: nothing is copied, and nothing padded.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from kvbench.engine.attention import Backend, attend_groups
from kvbench.engine.cache import RowCache
from kvbench.engine.kernels.interface import Sequences
from kvbench.method import Entries


class DecodeKV:
    """What attention finds in `kv` while rows decode a token each.

    The rows' caches must have room for all the tokens that they decode. With kernels, the lengths
    of sequences are counted in `lengths` [layers, R * K]; those of the caches stay as they were.
    """

    def __init__(
        self,
        caches: Sequence[RowCache],
        prompts: Sequence[int],
        backend: Backend,
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
        # [R, K], the positions of the tokens that are fed
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
        self.streams = self.keeps_places or any(
            group.window for cache in caches for groups in cache.layers for group in groups
        )
        self.longest = max(
            group.capacity for cache in caches for groups in cache.layers for group in groups
        )
        # What rows that have ended read and write, if they keep their places.
        entry = max(stored[0, 0].nbytes for entries in kinds for stored in entries)
        self.spare = torch.zeros(entry, dtype=torch.uint8, device=device)
        self._place()

    @property
    def capturable(self) -> bool:
        """Whether a step only works on tensors of a GPU, so that a CUDA graph can repeat it."""
        return self.by_kernel and self.here.is_cuda

    @property
    def keeps_places(self) -> bool:
        """Whether rows that have ended may stay in the batch, so that a graph goes on."""
        return self.capturable

    @property
    def positions(self) -> Tensor:
        """Of the tokens that are fed, [R]."""
        return self.here[:, 0]

    def _place(self) -> None:
        """Note each layer's sequences."""
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
        """A token goes behind the others, or where the entry lies that leaves the window."""
        ring = self.sinks + (self.here.flatten() - self.sinks) % self.sizes
        full = self.lengths >= self.sinks + self.sizes
        torch.where(full, ring, self.lengths, out=self.slots)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """query [R, H, 1, D], key [R, K, 1, D], value [R, K, 1, Dv] -> [R, H, 1, Dv]."""
        rows, kv_heads = key.shape[:2]
        if self.by_kernel:
            k, v = key.reshape(rows * kv_heads, -1), value.reshape(rows * kv_heads, -1)
            q = query.reshape(rows * kv_heads, -1, query.shape[-1])
            out = self.kernels[layer](q, k, v, self.sequences[layer], scaling, sliding)
            return out.reshape(rows, -1, 1, v.shape[-1])
        out = query.new_empty((*query.shape[:3], value.shape[-1]))
        for row, cache in enumerate(self.caches):
            grouped = query[row].unflatten(0, (kv_heads, -1))
            own = Entries(key[row], value[row], self.here[row, :, None])
            how = {"scaling": scaling, "sliding": sliding}
            out[row] = attend_groups(cache, layer, grouped, own, self.backend, **how).flatten(0, 1)
            for group in cache.layers[layer]:
                mine = Entries(*(group.of(tensor) for tensor in own))
                if group.window is None:
                    group.add(mine, group.capacity)
                else:
                    group.slide(mine, int(self.here[row, 0]), group.capacity)
        return out

    def advance(self) -> None:
        """Go on to the next token of every row."""
        self.here += 1
        if not self.by_kernel:
            return
        self.lengths += 1
        if self.streams:
            torch.minimum(self.lengths, self.sinks + self.sizes, out=self.lengths)
            self._choose_slots()

    def retire(self, rows: Collection[int]) -> None:
        """Free the storage of rows that have ended and keep their places in the batch.

        The tensors stay the same, and with them what was captured. Each sequence of these rows is
        from now on a window of one entry, the same for all, and what it computes means nothing.
        """
        kv_heads = self.here.shape[1]
        for row in rows:
            columns = slice(row * kv_heads, (row + 1) * kv_heads)
            self.where[..., columns] = self.spare.data_ptr()
            self.lengths[:, columns] = self.sinks[:, columns] = 0
            self.sizes[:, columns] = 1
            self.caches[row].clear()
        self._choose_slots()

    def leave(self, stay: Sequence[int]) -> None:
        """Go on with the rows at `stay`; the others' storage is freed."""
        for row in set(range(len(self.caches))) - set(stay):
            self.caches[row].clear()
        self.caches = [self.caches[row] for row in stay]
        kept = torch.tensor(stay, dtype=torch.long, device=self.here.device)
        shape, self.here = self.here.shape, self.here[kept]
        if not self.by_kernel:
            return
        for name in ("where", "lengths", "sinks", "sizes"):
            table = getattr(self, name).unflatten(-1, shape)
            setattr(self, name, table[..., kept, :].flatten(-2))
        self._place()
