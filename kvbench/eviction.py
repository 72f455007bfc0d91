"""What stays of a layer after a prefill chunk: a method's choice, applied to the cache."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.cache import HeadGroup, RowCache
from kvbench.footprint import chunks
from kvbench.method import KVShape, LayerView, Window
from kvbench.spec import Chunking, MethodSpec


@dataclass(frozen=True)
class Chunk:
    """A prefill chunk: `length` tokens of the prompt from `start` on, then `patched` more.

    The patched tokens are the prompt's last ones; they lend the chunk their queries and leave no
    entries (ALGORITHMS, section 5).
    """

    start: int
    length: int
    patched: int
    last: bool


@dataclass(frozen=True)
class Evictor:
    """A method under a budget, deciding for one row. A budget of 1 evicts nothing."""

    spec: MethodSpec
    budget: float
    shape: KVShape
    prompt: int  # n
    decoded: int  # tokens to be fed in decoding, at most
    seed: int

    def windows(self) -> Sequence[Sequence[Window | None]]:
        """The window of every layer's KV heads, None for heads that do not stream."""
        chosen = None
        if self.budget < 1:
            chosen = self.spec.method.windows(self.shape, self.budget, self.prompt)
        return chosen or [[None] * self.shape.kv_heads] * self.shape.layers

    def chunks(self, prefill_chunk: int | None) -> list[Chunk]:
        """How the prompt is read, in prefill chunks of that many tokens, None at once."""
        patched = self.scores and self.spec.chunking is Chunking.PATCHED
        patch = min(self.spec.observation_window, self.prompt) if patched else 0
        result = []
        start = 0
        for length in chunks(self.prompt, prefill_chunk):
            last = start + length == self.prompt
            result.append(Chunk(start, length, 0 if last else patch, last))
            start += length
        return result

    @property
    def scores(self) -> bool:
        """Whether entries are scored, some to be evicted."""
        return self.budget < 1 and self.spec.scorer is not None

    def reserve(self, group: HeadGroup, chunk: Chunk) -> int:
        """Entries that a group's storage should have room for before it takes a chunk."""
        if group.window is not None or (self.scores and self.spec.chunking is not Chunking.NONE):
            return group.length + chunk.length + chunk.patched
        return self.prompt if self.scores else self.prompt + self.decoded

    def reserve_decoding(self, group: HeadGroup) -> int:
        """Entries that a group's storage should have room for in decoding."""
        room = group.length + self.decoded
        return room if group.window is None else min(room, sum_window(group.window) + 1)

    def after_chunk(
        self, cache: RowCache, layer: int, chunk: Chunk, queries: Tensor, scaling: float
    ) -> None:
        """Evict from a layer that has just attended to a chunk.

        queries [H, W, D]: the observation window's, after RoPE, W = 0 for a method without one.
        """
        for group in cache.layers[layer]:
            if group.window is not None:
                self._slide(group, chunk)
            elif self.scores:
                self._select(group, layer, chunk, queries, scaling)

    def _slide(self, group: HeadGroup, chunk: Chunk) -> None:
        assert group.window is not None
        sinks, total = group.window.sinks, sum_window(group.window)
        if group.length <= total:
            return
        order = torch.arange(group.length, device=group.keys.device)
        chosen = torch.cat([order[:sinks], order[group.length - group.window.size :]])
        reserve = self.reserve_decoding(group) if chunk.last else 0
        group.keep(chosen.expand(len(group.heads), -1), min(reserve, total + 1))

    def _select(
        self, group: HeadGroup, layer: int, chunk: Chunk, queries: Tensor, scaling: float
    ) -> None:
        chunked = self.spec.chunking is not Chunking.NONE
        if not chunked and not chunk.last:
            return
        view = self._view(group, layer, chunk, queries, scaling)
        stay = chosen_entries(self.spec, view)
        if chunk.patched:
            group.drop_last(chunk.patched)
        if stay is None:
            if chunk.patched or chunk.last:
                stay = torch.arange(group.length, device=group.keys.device)
                stay = stay.expand(len(group.heads), -1)
            else:
                return
        group.keep(stay, stay.shape[1] + self.decoded if chunk.last else 0)

    def _view(
        self, group: HeadGroup, layer: int, chunk: Chunk, queries: Tensor, scaling: float
    ) -> LayerView:
        seen = chunk.start + chunk.length + chunk.patched
        grouped = queries.unflatten(0, (self.shape.kv_heads, self.shape.group))[group.heads]
        # Without chunking the choice must not depend on how the prompt was cut into chunks.
        start = chunk.start if self.spec.chunking is not Chunking.NONE else 0
        place = (self.seed * 1_000_003 + layer) * 1_000_003 + start
        generator = torch.Generator().manual_seed(place % 2**62)
        return LayerView(
            keys=group.keys[:, : group.length],
            values=group.values[:, : group.length],
            positions=group.positions[:, : group.length],
            queries=grouped,
            query_positions=torch.arange(seen - grouped.shape[2], seen, device=queries.device),
            scaling=scaling,
            kv_heads=tuple(group.heads.tolist()),
            layer=layer,
            layers=self.shape.layers,
            budget=self.spec.scorer_budget(self.budget),
            prompt=self.prompt,
            new=chunk.length if self.spec.chunking is not Chunking.NONE else self.prompt,
            patched=chunk.patched,
            last=chunk.last,
            generator=generator,
        )


def sum_window(window: Window) -> int:
    """Entries of a full window, its sinks included."""
    return window.sinks + window.size


def chosen_entries(spec: MethodSpec, view: LayerView) -> Tensor | None:
    """Indices [K, c'] of the entries of a view that stay, in order of position; None for all.

    Of the `view.new` entries `capacity` stay: the observation window, if it is among them, and
    those of the rest with the highest scores. If the capacity is no more than the window, the last
    `capacity` entries stay. Entries of earlier chunks stay; patched ones never do.
    """
    assert spec.scorer is not None
    own = view.positions.shape[1] - view.patched  # entries up to the end of the chunk
    first = own - view.new
    capacity = spec.scorer.capacity(view)
    if capacity >= view.new:
        return None
    observed = 0 if view.patched else min(spec.scorer.observation_window, view.new)
    heads = len(view.positions)
    order = torch.arange(own, device=view.positions.device)
    if observed and capacity <= observed:
        stay = torch.cat([order[:first], order[own - capacity :]])
        return stay.expand(heads, -1)
    scores = spec.scorer.scores(view)
    assert scores is not None
    candidates = scores.to(order.device)[:, first : own - observed]
    best = candidates.topk(capacity - observed, dim=-1).indices.sort(dim=-1).values + first
    fixed = torch.cat([order[:first], order[own - observed :]]).expand(heads, -1)
    return torch.cat([fixed[:, :first], best, fixed[:, first:]], dim=1)
