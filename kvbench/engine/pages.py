"""Pages of entries, for methods that read only some of them (dynamic sparsity, Quest).

A page keeps the elementwise minimum and maximum of its keys, so that a bound of its logits is known
without reading them (Tang et al., arXiv 2406.10774). The compiled kernel in `kernels/cpu.c` chooses
pages by itself; on other devices and in other dtypes, `engine.attention` gathers their entries.
"""

import torch
from torch import Tensor

from kvbench.method import Pages


class PageBounds:
    """The smallest and largest keys of each page of some KV heads: mins, maxs [Kg, pages, D]."""

    def __init__(self, pages: Pages, keys: Tensor, length: int, capacity: int) -> None:
        """Of the first `length` of keys [Kg, E, D]; there is storage for `capacity` entries."""
        self.pages = pages
        count = -(-capacity // pages.size)
        self.mins = keys.new_empty((len(keys), count, keys.shape[2]))
        self.maxs = torch.empty_like(self.mins)
        self.reads = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)  # entries read
        for page, start in enumerate(range(0, length, pages.size)):
            held = keys[:, start : min(length, start + pages.size)]
            torch.amin(held, 1, out=self.mins[:, page])
            torch.amax(held, 1, out=self.maxs[:, page])

    @property
    def nbytes(self) -> int:
        """Bytes of all bounds."""
        return self.mins.nbytes + self.maxs.nbytes

    def add(self, keys: Tensor, slot: int) -> None:
        """Take in the keys [Kg, D] of the entry at index `slot`."""
        page = slot // self.pages.size
        if slot % self.pages.size == 0:
            self.mins[:, page] = self.maxs[:, page] = keys
        else:
            self.mins[:, page] = torch.minimum(self.mins[:, page], keys)
            self.maxs[:, page] = torch.maximum(self.maxs[:, page], keys)

    def best(self, queries: Tensor, entries: int) -> list[Tensor]:
        """The indices of the entries that queries [Kg, G, D] read, for each KV head, ascending.

        Of `entries` entries; a KV head's pages are chosen by the largest bound over its queries.
        """
        size = self.pages.size
        count = -(-entries // size)
        wanted = min(count, self.pages.read(entries))
        low, high = (bounds[:, None, :count] for bounds in (self.mins, self.maxs))
        query = queries[:, :, None]
        bounds = torch.maximum(query * low, query * high).sum(-1).amax(1)  # [Kg, pages]
        chosen = bounds.topk(wanted, dim=-1).indices.sort(dim=-1).values
        within = torch.arange(size, device=chosen.device)
        order = (chosen[..., None] * size + within).flatten(1)
        return [row[row < entries] for row in order]
