"""Where a budget becomes an eviction: which entries of a layer stay after a prefill chunk.

`kvbench.engine.prefill` calls `choose` once a layer has attended to a chunk, and moves the entries.
Streaming KV heads need no choice: their windows keep entries by position.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kvbench.engine.accounting import EntryBytes
from kvbench.engine.cache import HeadGroup
from kvbench.engine.contract import (
    Asked,
    asking,
    check_contents,
    check_gathered,
    check_scores,
    check_selection,
    contents,
)
from kvbench.engine.policy import Chunk, EvictionPolicy
from kvbench.method import (
    EVERY_QUERY,
    Competition,
    Entries,
    LayerView,
    Method,
    Need,
    Rotation,
    draw_seed,
)
from kvbench.models.attention import Rules

Gathered = dict[tuple[Method, int], Tensor]  # by method and seed: what it has gathered of a layer
Chosen = Sequence[Tensor | None]  # of each scored group: indices [Kg, c], ascending; None for all


def choose(policy: EvictionPolicy, scores: "LayerScores") -> Chosen:
    """Which of the new entries of each scored group stay, or of each KV head if these compete.

    Of the `view.new` entries of a KV head `capacity` stay: those that the method protects, if they
    are among them, and those of the rest with the highest scores. If the capacity is at most the
    number of the protected ones, the last `capacity` entries stay. If KV heads compete, they keep
    as many in total. Entries of earlier chunks always stay, patched ones never.
    """
    view = scores.view(policy)
    with scores.watched(policy, "capacity"):
        capacity = policy.capacity(view)
    if capacity >= view.new:
        return scores.split(policy, None)
    protected = 0 if view.patched else min(policy.spec.protected, view.new)
    window = torch.arange(view.new - protected, view.new, device=scores.device)
    heads = len(view.kv_heads)
    if protected and capacity <= protected:
        return scores.split(policy, window[protected - capacity :].expand(heads, -1))
    free = capacity - protected
    if policy.spec.competition is Competition.LAYER:
        least = int(policy.spec.head_share * capacity) - protected
        shares = compete(scores.candidates(policy, protected), heads * free, least)
        return [torch.cat([share, window])[None] for share in shares]
    selected = scores.selected(policy, protected, free)
    if selected is None:
        selected = scores.ranking(policy, protected)[:, :free]
    best = selected.sort(dim=-1).values
    return scores.split(policy, torch.cat([best, window.expand(heads, -1)], dim=1))


def choose_in_model(policy: EvictionPolicy, layers: "Sequence[LayerScores]") -> Sequence[Chosen]:
    """As `choose`, of all layers that methods act on, whose entries compete with one another."""
    views, total = [scores.view(policy) for scores in layers], 0
    for scores, view in zip(layers, views, strict=True):
        with scores.watched(policy, "capacity"):
            total += policy.capacity(view) * len(view.kv_heads)
    new, heads = views[0].new, sum(len(view.kv_heads) for view in views)
    if total >= heads * new:
        return [[None] * len(scores.groups) for scores in layers]
    protected = min(policy.spec.protected, new, total // heads)
    home = layers[0].device  # layers may be on several
    candidates = torch.cat([scores.candidates(policy, protected).to(home) for scores in layers])
    least = int(policy.spec.head_share * total / heads) - protected
    best = compete(candidates, total - heads * protected, least)
    window = torch.arange(new - protected, new, device=candidates.device)
    chosen = iter(torch.cat([head, window])[None] for head in best)
    return [[next(chosen).to(scores.device) for _ in scores.groups] for scores in layers]


def compete(scores: Tensor, total: int, least: int) -> list[Tensor]:
    """All entries but the lowest: `total` of all KV heads stay, `least` or more of each head.

    scores [K, N]; returns ascending indices for each head (Ada-KV, arXiv 2407.11550). Of equal
    scores those go that `torch.topk` takes, as in kvpress.
    """
    heads, count = scores.shape
    raised = scores.float()
    if least > 0:
        raised = raised.scatter(1, raised.topk(min(least, count)).indices, torch.inf)
    stay = torch.ones(heads * count, dtype=torch.bool, device=scores.device)
    stay[(-raised.flatten()).topk(max(0, heads * count - total)).indices] = False
    return [head.nonzero().flatten() for head in stay.unflatten(0, (heads, count))]


@dataclass(frozen=True)
class LayerChunk:
    """A layer that has attended to some tokens, and in which entries may be evicted.

    Where all entries are stored in the cache already, `own` has no tokens.
    """

    index: int  # of the layer
    chunk: Chunk
    own: Entries  # [K, T, ...], of the chunk, without the patched ones
    patch: Entries | None  # [K, W, ...], the patched ones
    queries: Tensor  # [H, Q, D], the latest ones; as many as an observation window may need
    rules: Rules
    module: Any = None  # the layer's attention
    rotation: Rotation | None = None
    replayed: Tensor | None = None  # [K, E]

    def stored(self) -> "LayerChunk":
        """The same layer once all its entries are in the cache."""
        none = Entries(*(tensor[:, :0] for tensor in self.own))
        return replace(self, own=none, patch=None, queries=self.queries.clone())

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

    def __init__(
        self,
        groups: Sequence[HeadGroup],
        layer: LayerChunk,
        gathered: Gathered | None = None,
    ) -> None:
        self.groups = groups
        self.layer = layer
        self.gathered = {} if gathered is None else gathered
        self.device = layer.own.keys.device
        self.finite: list[tuple[Asked, int, Tensor]] = []
        self._shared: dict[tuple[int, int], LayerView] = {}
        self._views: dict[tuple[Method, int], LayerView] = {}
        self._looked: set[tuple[Method | None, str]] = set()
        self._gathered: set[tuple[Method, int]] = set()
        self._candidates: dict[tuple[Method, int], Tensor] = {}
        self._rankings: dict[tuple[Method, int], Tensor] = {}

    def split(self, policy: EvictionPolicy, chosen: Tensor | None) -> Chosen:
        """Indices [K, c] of all scored KV heads by group, or by KV head if these compete."""
        sizes = [len(group.heads) for group in self.groups]
        if policy.spec.uneven:
            sizes = [1] * sum(sizes)
        return [None] * len(sizes) if chosen is None else chosen.split(sizes)

    def view(self, policy: EvictionPolicy) -> LayerView:
        """What the method sees; it does not depend on the budget."""
        scorer = policy.spec.scorer
        assert scorer is not None
        key, kind = (scorer, policy.seed), (policy.spec.observation_window, policy.seed)
        if key not in self._views:
            if kind not in self._shared:
                self._shared[kind] = self._make_view(policy)
            view = MethodView.of(self._shared[kind])
            self._views[key] = replace(view, **self._asked_for(scorer, key, view))
        return self._views[key]

    def gather(self, policy: EvictionPolicy) -> Tensor:
        """What a method keeps of the tokens that have attended, asked once for all budgets."""
        scorer = policy.spec.scorer
        assert scorer is not None
        key, asked = (scorer, policy.seed), policy.asked("gather", self.layer.index)
        if key not in self._gathered:
            view = self.view(policy)
            with self.watched(policy, "gather"), asking(asked):
                gathered = scorer.gather(view)
            gathered = check_gathered(gathered, view, scorer.gathers_per_entry, asked)
            gathered = gathered.clone()  # an inference tensor, which methods cannot write to
            self._views[key] = replace(view, gathered=gathered)
            if scorer.gathers_per_entry:
                gathered = gathered[:, : view.entries - view.patched]
            self.gathered[key] = gathered
            self._gathered.add(key)
        return self.gathered[key]

    def kept_of(self, policy: EvictionPolicy, chosen: Chosen) -> Tensor:
        """What a method has gathered, of the entries that stay."""
        assert policy.spec.scorer is not None
        gathered = self.gathered[policy.spec.scorer, policy.seed]
        if not policy.spec.scorer.gathers_per_entry or chosen[0] is None:
            return gathered
        stay = torch.cat([indices for indices in chosen if indices is not None])
        past = gathered.shape[1] - self.view(policy).new  # entries that stay in any case
        return torch.cat([gathered[:, :past], gathered[:, past:].gather(1, stay)], dim=1)

    def hold(self, policy: EvictionPolicy, gathered: Tensor) -> None:
        """Hold what a method has gathered of the entries that are left."""
        assert policy.spec.scorer is not None
        self.gathered[policy.spec.scorer, policy.seed] = gathered

    def _asked_for(
        self, scorer: Method, key: tuple[Method, int], view: LayerView
    ) -> dict[str, Any]:
        """What a method has declared that it needs."""
        layer = self.layer
        given: dict[str, Any] = {}
        if Need.MODULE in scorer.needs:
            given["module"] = layer.module
        if Need.ROTATION in scorer.needs:
            given["rotation"] = layer.rotation
        if Need.REPLAY in scorer.needs:
            given["replayed"] = layer.replayed
        gathered = self.gathered.get(key)
        if gathered is not None and scorer.gathers_per_entry:
            more = view.entries - gathered.shape[1]
            gathered = torch.nn.functional.pad(gathered, (0, more))
        given["gathered"] = gathered
        return given

    def ranking(self, policy: EvictionPolicy, protected: int) -> Tensor:
        """Indices [K, new - protected] of the new entries before the protected ones, best first."""
        assert policy.spec.scorer is not None
        key = policy.spec.scorer, policy.seed
        if key not in self._rankings:
            candidates = self.candidates(policy, protected)
            self._rankings[key] = candidates.argsort(dim=-1, descending=True, stable=True)
        return self._rankings[key]

    def candidates(self, policy: EvictionPolicy, protected: int) -> Tensor:
        """The scores [K, new - protected] of the new entries before the protected ones."""
        scorer = policy.spec.scorer
        assert scorer is not None
        key = scorer, policy.seed
        if key not in self._candidates:
            view, asked = self.view(policy), policy.asked("scores", self.layer.index)
            end = view.entries - view.patched
            scores = self._scores(policy, scorer, view, asked)
            candidates = scores[:, end - view.new : end - protected]
            candidates = candidates.to(self.device, non_blocking=True)
            finite = torch.count_nonzero(candidates.isfinite())
            self.finite.append((asked, candidates.numel(), finite))
            self._candidates[key] = candidates
        return self._candidates[key]

    def selected(self, policy: EvictionPolicy, protected: int, capacity: int) -> Tensor | None:
        """Indices [K, capacity] that the method selects by itself; None for the best scores."""
        scorer = policy.spec.scorer
        assert scorer is not None
        if type(scorer).select is Method.select and not scorer.ties_by_topk:
            return None
        asked = policy.asked("select", self.layer.index)
        view, candidates = self.view(policy), self.candidates(policy, protected)
        with self.watched(policy, "select"), asking(asked):
            selected = scorer.select(view, candidates, capacity)
        if type(scorer).select is Method.select:
            return selected  # ours; to look at it would wait for the GPU
        return check_selection(selected, candidates, capacity, asked)

    def release(self) -> None:
        """Drop the views, which keep the storage of entries alive. Rankings stay."""
        self._views.clear()
        self._shared.clear()
        self._candidates.clear()

    def _scores(
        self, policy: EvictionPolicy, scorer: Method, view: LayerView, asked: Asked
    ) -> Tensor:
        """A method's scores [K, E]; ContractError for a wrong answer or a write to the view."""
        with self.watched(policy, "scores"), asking(asked):
            scores = scorer.scores(view)
        return check_scores(scores, view, asked)

    @contextmanager
    def watched(self, policy: EvictionPolicy, what: str) -> Iterator[None]:
        """Ask a method for `what`, of a view whose generator is seeded anew, so that no answer
        depends on what was asked before; ContractError if it then writes to its view.

        Writes that PyTorch does not refuse are looked for in one layer of the prompt, once.
        """
        scorer = policy.spec.scorer
        self.view(policy).generator.manual_seed(self._draw_seed(policy))
        own = getattr(type(scorer), what) is not getattr(Method, what)
        look = self.layer.index == policy.first_scored and not self.layer.chunk.decoded
        if not own or not look or (scorer, what) in self._looked:
            yield
            return
        self._looked.add((scorer, what))
        view = self.view(policy)
        before = contents(view)
        yield
        check_contents(before, contents(view), policy.asked(what, self.layer.index))

    def _draw_seed(self, policy: EvictionPolicy) -> int:
        # Without chunking, the choice must not depend on how the prompt was cut into chunks.
        chunk = self.layer.chunk
        start = 0 if policy.scores_once and not chunk.decoded else chunk.start
        return draw_seed(policy.seed, self.layer.index, start)

    def _make_view(self, policy: EvictionPolicy) -> LayerView:
        layer, chunk, shape = self.layer, self.layer.chunk, policy.shape
        seen = chunk.start + chunk.tokens
        window = min(policy.spec.observation_window, layer.queries.shape[1])
        if policy.spec.observation_window >= EVERY_QUERY:
            window = chunk.tokens
        queries = layer.queries[:, layer.queries.shape[1] - window :]
        grouped = queries.unflatten(0, (shape.kv_heads, shape.group))
        heads = [head for group in self.groups for head in group.heads]
        sinks = layer.rules.sinks
        if heads != list(range(shape.kv_heads)):
            grouped = torch.cat([group.of(grouped) for group in self.groups])
            sinks = None if sinks is None else torch.cat([group.of(sinks) for group in self.groups])
        limit = policy.layers[layer.index].limit
        tokens = new = self.groups[0].length + layer.own.keys.shape[1]
        if policy.scores_each_chunk:
            tokens = new = chunk.length
        elif limit is not None:
            tokens = new = policy.prompt
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
            read=chunk.start + chunk.length,
        )

    def _blocks(self, group: HeadGroup) -> tuple[Entries, ...]:
        new = [e for e in (self.layer.own, self.layer.patch) if e is not None]
        arrived = (group.select(entries) for entries in new if entries.keys.shape[1])
        return (*group.in_order(), *arrived)
