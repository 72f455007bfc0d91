"""What stays of a layer after a prefill chunk: a method's choice, applied to the cache."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.engine.cache import HeadGroup
from kvbench.engine.footprint import chunks
from kvbench.method import Entries, KVShape, LayerView, Method, Window
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

    @property
    def chunked(self) -> bool:
        """Whether entries are scored after every chunk."""
        return self.scores and self.spec.chunking is not Chunking.NONE

    @property
    def one_by_one(self) -> bool:
        """Whether KV heads that do not stream have storage each, to be moved one by one."""
        return self.scores and not self.chunked

    @property
    def waits(self) -> bool:
        """Whether nothing is evicted before the whole prompt is read."""
        return not self.chunked and all(w is None for layer in self.windows() for w in layer)

    @property
    def keeps_all(self) -> bool:
        """Whether this is full attention, whatever it is called."""
        return not self.scores and self.waits

    def chooses(self, window: Window | None, chunk: Chunk) -> bool:
        """Whether a group of KV heads takes in only some of what is there after a chunk."""
        return window is not None or self.chunked or (self.scores and chunk.last)

    def room(self, window: Window | None, last_chunk: int) -> int:
        """Entries that a group's storage has room for, `last_chunk` tokens being read last.

        What is scored once the prompt is read has no need of room for the last chunk, of which a
        choice is taken at once.
        """
        whole = self.prompt + self.decoded
        if window is not None:
            return min(whole, window.sinks + window.size)
        return self.prompt - last_chunk if self.scores else whole

    def room_for_answer(self, kept: int, before: int, new: int) -> int:
        """Entries of a KV head to have room for, once `kept` of `before` and `new` ones stay.

        The answer's are among them, so that nothing moves later, unless they would raise the peak
        by more than a hundredth: all layers have that room while one still holds what is evicted.
        """
        layers = self.shape.layers
        raised = min(self.decoded * layers, new) if kept + self.decoded > before else 0
        return kept + (self.decoded if 100 * raised <= kept * layers else 0)


@dataclass(frozen=True)
class Layer:
    """A layer that has attended to a chunk and is to be evicted from."""

    index: int
    chunk: Chunk
    following: tuple[Chunk, ...]  # the prompt's chunks after this one
    own: Entries  # [K, T, ...], the chunk's, without patched ones
    patch: Entries | None  # [K, W, ...], patched ones
    scaling: float
    observed: Callable[[int], Tensor]  # the latest W queries [H, W, D]

    def own_of(self, group: HeadGroup) -> Entries:
        """The chunk's entries of a group of KV heads."""
        return Entries(*(group.of(tensor) for tensor in self.own))

    @property
    def last_chunk(self) -> int:
        """Tokens of the prompt's last chunk."""
        return (self.following or (self.chunk,))[-1].length

    @property
    def entry_bytes(self) -> int:
        """Bytes of the key and the value of an entry."""
        return sum(t.shape[-1] * t.itemsize for t in (self.own.keys, self.own.values))


class Chooser:
    """The choices of all rows that evict from the same entries: scored once, cut at each budget.

    `groups` are the KV heads that are scored, their entries of earlier chunks in storage.
    """

    def __init__(self, groups: Sequence[HeadGroup], layer: Layer) -> None:
        self.groups = groups
        self.layer = layer
        self._views: dict[tuple[int, int], LayerView] = {}
        self._rankings: dict[tuple[Method, int], Tensor] = {}
        self._draws: dict[int, int] = {}

    def choice(self, evictor: Evictor) -> Tensor | None:
        """Which of the new entries stay: indices [K, c] in order of position, None for all.

        Of the `view.new` entries `capacity` stay: the observation window, if it is among them, and
        those of the rest with the highest scores. If the capacity is no more than the window, the
        last `capacity` entries stay. Entries of earlier chunks stay; patched ones never do.
        """
        scorer = evictor.spec.scorer
        assert scorer is not None
        view = self._view(evictor)
        capacity = scorer.capacity(_at_budget(view, evictor))
        if capacity >= view.new:
            return None
        observed = 0 if view.patched else min(scorer.observation_window, view.new)
        window = torch.arange(view.new - observed, view.new, device=self.layer.own.keys.device)
        heads = len(view.kv_heads)
        if observed and capacity <= observed:
            return window[observed - capacity :].expand(heads, -1)
        ranking = self._ranking(scorer, view, evictor.seed, observed)
        best = ranking[:, : capacity - observed].sort(dim=-1).values
        return torch.cat([best, window.expand(heads, -1)], dim=1)

    def room(self, evictor: Evictor) -> int:
        """Entries to have room for, for one that evicts after this and all following chunks."""
        scorer, layer = evictor.spec.scorer, self.layer
        assert scorer is not None
        view = _at_budget(self._view(evictor), evictor)
        total = 0
        for chunk in (layer.chunk, *layer.following):
            then = replace(view, new=chunk.length, patched=chunk.patched, last=chunk.last)
            total += min(chunk.length, scorer.capacity(then))
        return evictor.room_for_answer(total, 0, layer.chunk.length)

    def forget(self) -> None:
        """Let go of the entries; their storage may be freed then. What is scored stays known."""
        self._views.clear()

    def _ranking(self, scorer: Method, view: LayerView, seed: int, observed: int) -> Tensor:
        """Indices [K, new - observed] of the new entries but the window, best first."""
        key = scorer, seed
        if key not in self._rankings:
            view.generator.manual_seed(self._draws[seed])  # whoever drew from it before
            scores = scorer.scores(view)
            assert scores is not None
            own = view.entries - view.patched
            candidates = scores[:, own - view.new : own - observed]
            candidates = candidates.to(self.layer.own.keys.device, non_blocking=True)
            self._rankings[key] = candidates.argsort(dim=-1, descending=True, stable=True)
        return self._rankings[key]

    def _view(self, evictor: Evictor) -> LayerView:
        key = evictor.spec.observation_window, evictor.seed
        if key not in self._views:
            self._views[key] = self._make_view(evictor)
        return self._views[key]

    def _make_view(self, evictor: Evictor) -> LayerView:
        layer, chunk, shape = self.layer, self.layer.chunk, evictor.shape
        seen = chunk.start + chunk.length + chunk.patched
        queries = layer.observed(evictor.spec.observation_window)
        grouped = queries.unflatten(0, (shape.kv_heads, shape.group))
        heads = [head for group in self.groups for head in group.heads]
        if heads != list(range(shape.kv_heads)):
            grouped = torch.cat([group.of(grouped) for group in self.groups])
        # Without chunking the choice must not depend on how the prompt was cut into chunks.
        place = (evictor.seed * 1_000_003 + layer.index) * 1_000_003
        place += chunk.start if evictor.chunked else 0
        self._draws[evictor.seed] = place % 2**62
        return LayerView(
            blocks=[self._blocks(group) for group in self.groups],
            queries=grouped,
            query_positions=torch.arange(seen - grouped.shape[2], seen, device=queries.device),
            scaling=layer.scaling,
            kv_heads=tuple(heads),
            layer=layer.index,
            layers=shape.layers,
            budget=math.nan,
            prompt=evictor.prompt,
            new=chunk.length if evictor.chunked else evictor.prompt,
            patched=chunk.patched,
            last=chunk.last,
            generator=torch.Generator(),
        )

    def _blocks(self, group: HeadGroup) -> list[Entries]:
        past = group.resident()
        pieces = [] if past is None else [past]
        for new in (self.layer.own, self.layer.patch):
            if new is not None:
                pieces.append(Entries(*(group.of(tensor) for tensor in new)))
        return pieces


def _at_budget(view: LayerView, evictor: Evictor) -> LayerView:
    at = copy(view)
    object.__setattr__(at, "budget", evictor.spec.scorer_budget(evictor.budget))
    return at
