"""Where a budget becomes an eviction: which entries of a layer stay after a prefill chunk.

`kvbench.engine.prefill` calls `choose` once a layer has attended to a chunk, and moves the entries.
Streaming KV heads need no choice: their windows keep entries by position.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from kvbench.engine.accounting import EntryBytes, chunks
from kvbench.engine.cache import HeadGroup, Visible
from kvbench.engine.contract import (
    Asked,
    asking,
    check_capacity,
    check_contents,
    check_observation_window,
    check_scores,
    check_windows,
    contents,
)
from kvbench.method import Entries, KVShape, LayerView, Limit, Method, Window, draw_seed
from kvbench.models.attention import LayerShape, Rules
from kvbench.spec import Chunking, MethodSpec


def choose(policy: "EvictionPolicy", scores: "LayerScores") -> Tensor | None:
    """Which of the new entries stay: indices [K, c] in order of position, None for all.

    Of the `view.new` entries `capacity` stay: those of the observation window, if they are among
    them, and those of the rest with the highest scores. If the capacity is at most the window, the
    last `capacity` entries stay. Entries of earlier chunks always stay, patched ones never.
    """
    view = scores.view(policy)
    capacity = policy.capacity(view)
    if capacity >= view.new:
        return None
    observed = 0 if view.patched else min(policy.spec.observation_window, view.new)
    window = torch.arange(view.new - observed, view.new, device=scores.device)
    heads = len(view.kv_heads)
    if observed and capacity <= observed:
        return window[observed - capacity :].expand(heads, -1)
    best = scores.ranking(policy, observed)[:, : capacity - observed].sort(dim=-1).values
    return torch.cat([best, window.expand(heads, -1)], dim=1)


@dataclass(frozen=True)
class Chunk:
    """A prefill chunk: `length` tokens of the prompt from position `start`, then `patched` more.

    The patched tokens are the last ones of the prompt. They lend the chunk their queries and leave
    no entries (docs/methods.md).
    """

    start: int
    length: int
    patched: int
    last: bool

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.length + self.patched


@dataclass(frozen=True)
class EvictionPolicy:
    """When and how much one row evicts: a method under a budget. A budget of 1 evicts nothing."""

    spec: MethodSpec
    budget: float
    shape: KVShape
    prompt: int  # n, tokens
    decoded: int  # tokens that are fed in decoding, at most
    seed: int
    prefill_chunk: int | None  # tokens; None reads the prompt at once
    layers: tuple[LayerShape, ...]

    def __post_init__(self) -> None:
        """Raise ContractError for an observation window that is not a number of queries."""
        check_observation_window(self.spec.observation_window, self.asked("observation_window"))

    @cached_property
    def windows(self) -> Sequence[Sequence[Window | None]]:
        """The window of each layer's KV heads, None for heads that hold all they read.

        A layer that reads the keys of another one has none. Layers that the model limits hold what
        later tokens can see, and if methods act on them nothing else.
        """
        chosen = None
        if self.budget < 1:
            chosen = self.spec.method.windows(self.shape, self.budget, self.prompt)
        if chosen is not None:
            chosen = check_windows(chosen, self.shape, self.asked("windows"))
        return [self._layer_windows(layer, chosen) for layer in range(len(self.layers))]

    def _layer_windows(
        self, index: int, chosen: Sequence[Sequence[Window | None]] | None
    ) -> Sequence[Window | None]:
        layer = self.layers[index]
        if layer.source != index:
            return []
        acting = index in self.acting
        if layer.limit is None or (acting and layer.limit.size >= self.prompt + self.decoded):
            return chosen[index] if chosen and acting else [None] * layer.kv_heads
        visible = Visible.under(layer.limit)
        if not chosen or not acting:
            late = acting and self.scores_each_chunk
            return [None if late else visible] * layer.kv_heads
        # Sinks are out of sight before the end.
        own = None if self.scores_each_chunk else visible
        return [
            own if window is None else Window(0, min(window.sinks + window.size, visible.size))
            for window in chosen[index]
        ]

    @cached_property
    def limits(self) -> Sequence[Limit | None]:
        """The model's own limit of each layer."""
        return [layer.limit for layer in self.layers]

    @property
    def acting(self) -> Sequence[int]:
        """The layers that methods act on."""
        return range(len(self.layers)) if self.shape.acting is None else self.shape.acting

    def scores(self, layer: int, group: HeadGroup) -> bool:
        """Whether a method may score the entries of these KV heads of a layer."""
        return layer in self.acting and _may_be_scored(group.window)

    @cached_property
    def first_scored(self) -> int:
        """The first layer with KV heads that are scored."""
        acting = (i for i in self.acting if any(map(_may_be_scored, self.windows[i])))
        return next(acting, 0)

    def asked(self, what: str, layer: int | None = None) -> Asked:
        """What the method is asked for, for errors."""
        return Asked(self.spec.name, what, layer)

    @cached_property
    def chunks(self) -> Sequence[Chunk]:
        """The prefill chunks of the prompt."""
        patched = self.evicts_by_score and self.spec.chunking is Chunking.PATCHED
        patch = min(self.spec.observation_window, self.prompt) if patched else 0
        result, start = [], 0
        for length in chunks(self.prompt, self.prefill_chunk):
            last = start + length == self.prompt
            result.append(Chunk(start, length, 0 if last else patch, last))
            start += length
        return result

    @property
    def evicts_by_score(self) -> bool:
        """Whether entries are scored, and some of them evicted."""
        return self.budget < 1 and self.spec.scorer is not None

    @property
    def scores_each_chunk(self) -> bool:
        """Whether entries are scored after every chunk (chunked eviction)."""
        return self.evicts_by_score and self.spec.chunking is not Chunking.NONE

    @property
    def scores_once(self) -> bool:
        """Whether entries are scored once the whole prompt is read (post-fill)."""
        return self.evicts_by_score and self.spec.chunking is Chunking.NONE

    @property
    def keeps_whole_prompt(self) -> bool:
        """Whether nothing is evicted before the whole prompt is read."""
        streaming = any(
            window is not None and not isinstance(window, Visible)
            for layer in self.windows
            for window in layer
        )
        return not self.scores_each_chunk and not streaming

    @property
    def keeps_all(self) -> bool:
        """Whether this is full attention, whatever the method is called."""
        return not self.evicts_by_score and self.keeps_whole_prompt

    def evicts(self, window: Window | None, chunk: Chunk) -> bool:
        """Whether KV heads with this window (None: they do not stream) evict after a chunk."""
        return window is not None or self.scores_each_chunk or (self.evicts_by_score and chunk.last)

    def capacity(self, view: LayerView) -> int:
        """How many of the view's new entries each KV head keeps; all if it is more than these.

        It is a share of the tokens read, also where the model hides some of their entries.
        """
        assert self.spec.scorer is not None
        asked = self.asked("capacity", view.layer)
        read = view if view.limit is None else replace(view, new=max(view.new, view.tokens))
        with asking(asked):
            capacity = self.spec.scorer.capacity(read, self.spec.scorer_budget(self.budget))
        capacity = check_capacity(capacity, asked)
        return capacity if view.limit is None else min(view.new, capacity)

    def reserved(self, layer: int, window: Window | None) -> int:
        """Entries of storage for each KV head of a layer with this window, while it is read.

        Heads that are scored once the prompt is read need none for its last chunk. A full window
        that several layers read needs a place for the token that the first of them brings.
        """
        whole = self.prompt + self.decoded
        if window is not None:
            shared = len(self.layers[layer].readers) > 1
            return min(whole, window.sinks + window.size + shared)
        late = self.evicts_by_score and layer in self.acting
        return self.prompt - self.chunks[-1].length if late else whole

    def reserved_from(self, chunk: Chunk, view: LayerView) -> int:
        """Entries of storage for each KV head that evicts after this and every later chunk."""
        kept = 0
        for later in (c for c in self.chunks if c.start >= chunk.start):
            then = replace(
                view,
                new=later.length,
                tokens=later.length,
                patched=later.patched,
                last=later.last,
            )
            kept += min(later.length, self.capacity(then))
        return self.reserved_for_answer(kept, 0, chunk.length)

    def reserved_for_answer(self, kept: int, before: int, new: int) -> int:
        """Entries of storage for each KV head that keeps `kept` of `before` and `new` ones.

        Storage for the answer is included, so that nothing moves later, unless that would raise the
        peak by more than 1%: all layers hold it while one still holds what it is about to evict.
        """
        layers = len(self.acting)
        raised = min(self.decoded * layers, new) if kept + self.decoded > before else 0
        return kept + (self.decoded if 100 * raised <= kept * layers else 0)


def _may_be_scored(window: Window | None) -> bool:
    return window is None or isinstance(window, Visible)


@dataclass(frozen=True)
class LayerChunk:
    """A layer that has attended to a chunk and is about to evict."""

    index: int  # of the layer
    chunk: Chunk
    own: Entries  # [K, T, ...], of the chunk, without the patched ones
    patch: Entries | None  # [K, W, ...], the patched ones
    queries: Tensor  # [H, Q, D], the latest ones; as many as an observation window may need
    rules: Rules

    @cached_property
    def entry_bytes(self) -> EntryBytes:
        """The bytes of an entry of this layer."""
        return EntryBytes.of(self.own)


@dataclass(frozen=True, kw_only=True)
class MethodView(LayerView):
    """The view that one method gets; only `blocks` are shared with other methods."""

    shared: LayerView

    @classmethod
    def of(cls, shared: LayerView) -> "MethodView":
        """A view for another method that sees the same."""
        values = {field.name: getattr(shared, field.name) for field in fields(LayerView)}
        values["queries"] = shared.queries.clone()
        values["query_positions"] = shared.query_positions.clone()
        values["generator"] = torch.Generator()
        return cls(**values, shared=shared)

    def latest(self, count: int) -> LayerView:
        """As `LayerView.latest`."""
        if count >= self.entries:
            return self
        return MethodView.of(self.shared.latest(count))

    @cached_property
    def attention(self) -> Tensor:
        """[K, E], a copy of what all methods share, because it takes long to compute."""
        with torch.inference_mode():
            return self.shared.attention.clone()


class LayerScores:
    """Views and rankings of one layer, made once for all rows that evict from the same entries.

    `groups` are the KV heads that are scored; they store the entries of earlier chunks. `finite`
    is what `check_finite` takes, so that the GPU is waited for once and not in each layer.
    """

    def __init__(self, groups: Sequence[HeadGroup], layer: LayerChunk) -> None:
        self.groups = groups
        self.layer = layer
        self.device = layer.own.keys.device
        self.finite: list[tuple[Asked, int, Tensor]] = []
        self._shared: dict[tuple[int, int], LayerView] = {}
        self._views: dict[tuple[Method, int], LayerView] = {}
        self._rankings: dict[tuple[Method, int], Tensor] = {}

    def view(self, policy: EvictionPolicy) -> LayerView:
        """What the method sees; it does not depend on the budget."""
        scorer = policy.spec.scorer
        assert scorer is not None
        key, kind = (scorer, policy.seed), (policy.spec.observation_window, policy.seed)
        if key not in self._views:
            if kind not in self._shared:
                self._shared[kind] = self._make_view(policy)
            self._views[key] = MethodView.of(self._shared[kind])
        return self._views[key]

    def ranking(self, policy: EvictionPolicy, observed: int) -> Tensor:
        """Indices [K, new - observed] of the new entries before the window, best first."""
        scorer = policy.spec.scorer
        assert scorer is not None
        key = scorer, policy.seed
        if key not in self._rankings:
            view, asked = self.view(policy), policy.asked("scores", self.layer.index)
            end = view.entries - view.patched
            scores = self._scores(policy, scorer, view, asked)
            candidates = scores[:, end - view.new : end - observed]
            candidates = candidates.to(self.device, non_blocking=True)
            finite = torch.count_nonzero(candidates.isfinite())
            self.finite.append((asked, candidates.numel(), finite))
            self._rankings[key] = candidates.argsort(dim=-1, descending=True, stable=True)
        return self._rankings[key]

    def release(self) -> None:
        """Drop the views, which keep the storage of entries alive. Rankings stay."""
        self._views.clear()
        self._shared.clear()

    def _scores(
        self, policy: EvictionPolicy, scorer: Method, view: LayerView, asked: Asked
    ) -> Tensor:
        """A method's scores [K, E]; ContractError for a wrong answer, or if it writes to the view.

        Writes that PyTorch does not refuse are looked for in one layer.
        """
        look = self.layer.index == policy.first_scored
        before = contents(view) if look else []
        view.generator.manual_seed(self._draw_seed(policy))
        with asking(asked):
            scores = scorer.scores(view)
        if look:
            check_contents(before, contents(view), asked)
        return check_scores(scores, view, asked)

    def _draw_seed(self, policy: EvictionPolicy) -> int:
        # Without chunking, the choice must not depend on how the prompt was cut into chunks.
        start = self.layer.chunk.start if policy.scores_each_chunk else 0
        return draw_seed(policy.seed, self.layer.index, start)

    def _make_view(self, policy: EvictionPolicy) -> LayerView:
        layer, chunk, shape = self.layer, self.layer.chunk, policy.shape
        seen = chunk.start + chunk.tokens
        window = min(policy.spec.observation_window, layer.queries.shape[1])
        queries = layer.queries[:, layer.queries.shape[1] - window :]
        grouped = queries.unflatten(0, (shape.kv_heads, shape.group))
        heads = [head for group in self.groups for head in group.heads]
        sinks = layer.rules.sinks
        if heads != list(range(shape.kv_heads)):
            grouped = torch.cat([group.of(grouped) for group in self.groups])
            sinks = None if sinks is None else torch.cat([group.of(sinks) for group in self.groups])
        tokens = new = chunk.length if policy.scores_each_chunk else policy.prompt
        limit = policy.layers[layer.index].limit
        if limit is not None:
            new = min(new, limit.held(policy.prompt))
        return LayerView(
            blocks=tuple(self._blocks(group) for group in self.groups),
            queries=grouped,
            query_positions=torch.arange(seen - window, seen, device=self.device),
            scaling=layer.rules.scaling,
            kv_heads=tuple(heads),
            layer=layer.index,
            layers=shape.layers,
            prompt=policy.prompt,
            new=new,
            patched=chunk.patched,
            last=chunk.last,
            generator=torch.Generator(),
            tokens=tokens,
            acting=shape.acting,
            limit=limit,
            softcap=layer.rules.softcap,
            sinks=sinks,
        )

    def _blocks(self, group: HeadGroup) -> tuple[Entries, ...]:
        new = [e for e in (self.layer.own, self.layer.patch) if e is not None]
        return (*group.in_order(), *(group.select(entries) for entries in new))
