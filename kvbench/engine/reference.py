"""The engine in its simplest form: one row, read in chunks and decoded as the rules say.

`run_reference` measures what `kvbench.engine.run.run_rows` measures, without sharing, kernels,
storage or a cache of scores, with attention in float64. Read it to learn how eviction is measured;
tests compare the engine with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.engine.accounting import full_attention_peak
from kvbench.engine.row import Row
from kvbench.engine.stop import stopped
from kvbench.method import (
    EVERY_QUERY,
    Competition,
    DecodingMethod,
    Entries,
    LayerView,
    Limit,
    Method,
    Window,
    draw_seed,
)
from kvbench.models.attention import AttentionCall
from kvbench.models.load import LoadedModel, best_tokens, forward
from kvbench.spec import Chunking


@dataclass(frozen=True)
class Reference:
    """What a row gives; the fields are those of `kvbench.engine.row.Outcome`."""

    tokens: list[int]
    kept: list[list[list[int]]]
    resident_rows: int
    read_rows: int
    patch_rows: int
    kv_peak: float


def run_reference(model: LoadedModel, row: Row, prefill_chunk: int | None) -> Reference:
    """Read the prompt of a row in chunks of `prefill_chunk` tokens, then decode greedily."""
    kv, prompt = ReferenceKV(row, model), len(row.prompt)
    context = kv.context

    def feed(ids: list[int], start: int) -> int:
        positions = torch.arange(start, start + len(ids), device=model.device)
        before, kv.arrived = kv.entries, 0
        with torch.inference_mode():
            given = torch.tensor([ids], device=model.device)
            token = int(best_tokens(forward(model, given, positions[None], kv)))
        kv.peak = max(kv.peak, before + kv.arrived)  # a row is one moment in all layers
        return token

    token = patch_rows = 0
    size = prefill_chunk or prompt
    for start in [*range(0, context, size), *range(context, prompt, size)]:
        stop = min(context if start < context else prompt, start + size)
        kv.start, kv.new, kv.last = start, stop - start, stop == context
        kv.question = start >= context
        patch = row.prompt[:context][-kv.window :] if kv.patched and stop < context else []
        token = feed([*row.prompt[start:stop], *patch], start)
        patch_rows += len(patch)
    kept = [[sorted(head.positions[0].tolist()) for head in layer] for layer in kv.held]
    kv.new, tokens = 1, [token]
    while len(tokens) < row.max_new_tokens and tokens[-1] not in model.end_tokens:
        if stopped(model.tokenizer, tokens, row.stop):
            break
        kv.fed, kv.start = len(tokens), prompt + len(tokens) - 1
        tokens.append(feed([tokens[-1]], kv.start))
    full = full_attention_peak(model.layers, prompt + len(tokens) - 1)
    answer = tokens[:-1] if tokens[-1] in model.end_tokens else tokens
    rows = kv.resident_rows, kv.resident_rows - kv.unread
    return Reference(answer, kept, *rows, patch_rows, kv.peak / full)


class ReferenceKV:
    """A `KVAttention` that holds the entries [1, E, ...] of each layer and KV head."""

    start = 0  # position of the chunk's first token
    new = 0  # tokens of the chunk, without the patched ones
    last = False  # whether it is the last chunk that the method evicts from
    question = False  # whether it is a chunk of the question, all of which stays
    fed = 0  # tokens of the answer that have been read

    def __init__(self, row: Row, model: LoadedModel) -> None:
        self.row, self.shape, self.layers = row, model.shape, model.layers
        self.context = len(row.prompt) if row.context is None else row.context
        evicts, method, shape = row.budget < 1, row.spec.method, model.shape
        windows = method.windows(shape, row.budget, len(row.prompt)) if evicts else None
        everything = [[None] * layer.kv_heads for layer in self.layers]
        self.windows: Sequence[Sequence[Window | None]] = windows or everything
        self.acting = range(shape.layers) if shape.acting is None else shape.acting
        self.longest = len(row.prompt) + row.max_new_tokens - 1
        self.scorer: Method | None = row.spec.scorer if evicts else None
        self.chunking = row.spec.chunking
        self.chunked = self.chunking in (Chunking.NAIVE, Chunking.PATCHED)
        self.interval = 0
        if isinstance(self.scorer, DecodingMethod):
            self.interval = self.scorer.interval
        self.gathered: dict[int, Tensor] = {}
        self.patched = row.spec.chunking is Chunking.PATCHED and self.scorer is not None
        self.window = row.spec.observation_window
        self.held: list[list[Entries]] = [[] for _ in range(shape.layers)]
        self.queries: list[list[Tensor]] = [[] for _ in range(shape.layers)]  # [H, T, D] each
        self.calls: dict[int, AttentionCall] = {}  # the latest of each layer that holds entries
        self.entries = self.arrived = self.peak = self.resident_rows = self.unread = 0

    def attend(self, call: AttentionCall) -> Tensor:
        """B = 1: add the new entries, attend, count, and evict."""
        shape = self.layers[call.layer]
        tokens, held = call.key.shape[2], self.held[shape.source]
        here = torch.arange(self.start, self.start + tokens, device=call.key.device)
        for head in range(shape.kv_heads if call.layer == shape.source else 0):
            new = Entries(call.key[:, head], call.value[:, head], here[None])
            if not self.start:
                held.append(new)
            else:
                pairs = zip(held[head], new, strict=True)
                held[head] = Entries(*(torch.cat(pair, 1) for pair in pairs))
            seen = visible(shape.limit, here[: self.new], held[head].positions)
            self.resident_rows += int(seen.sum())
            self.entries += tokens
            self.arrived += tokens
        self.queries[call.layer].append(call.query[0])
        read = [self.read(call, head, entries) for head, entries in enumerate(held)]
        heads = range(shape.query_heads)
        out = torch.stack([attention(call, h, read[h // shape.group], here) for h in heads])
        if call.layer == shape.source:
            self.calls[call.layer] = call
        if call.layer == shape.readers[-1]:
            self.evict(self.calls[shape.source])
        return out[None]

    def read(self, call: AttentionCall, head: int, entries: Entries) -> Entries:
        """What the tokens read of a KV head's entries: a decoded token reads its best pages."""
        row, pages = self.row, None
        if self.fed and row.budget < 1 and call.layer in self.acting:
            pages = row.spec.method.pages(self.shape, call.layer, row.budget)
        if pages is None:
            return entries
        past = entries.keys[0, :-1].float()
        queries = call.query[0].unflatten(0, (-1, self.layers[call.layer].group))[head, :, 0]
        bounds = [
            torch.maximum(queries * page.amin(0), queries * page.amax(0)).sum(1).max()
            for page in past.split(pages.size)
        ]
        best = torch.stack(bounds).argsort(descending=True, stable=True)[: pages.read(len(past))]
        order = torch.arange(len(past) + 1)
        stay = torch.isin(order // pages.size, best.cpu()) | (order == len(past))
        self.unread += int((~stay).sum())
        return Entries(*(tensor[:, stay.to(tensor.device)] for tensor in entries))

    def evict(self, call: AttentionCall) -> None:
        """Drop patched entries, what left a window, and what the method does not choose."""
        held, end = self.held[call.layer], self.start + self.new
        limit = self.layers[call.layer].limit
        windows: Sequence[Window | None] = [None] * len(held)
        if call.layer in self.acting:
            windows = self.windows[call.layer]
        scored = [head for head, window in enumerate(windows) if window is None]
        chosen: dict[int, Tensor] = {}
        scores = self.scorer is not None and call.layer in self.acting
        if self.scorer is not None and scores and scored and self.asks:
            chosen = dict(zip(scored, self.choose(call, scored, self.scorer), strict=True))
        hidden = []
        for head, window in enumerate(windows):
            at = held[head].positions[0]
            stay = chosen.get(head, at < end)
            if window is not None:
                sinks, size = window.sinks, window.size
                if limit is not None and limit.size < self.longest:
                    sinks, size = 0, min(sinks + size, limit.size - 1)
                stay &= (at < sinks) | (at >= end - size)
            self.entries -= int((~stay).sum())
            held[head] = Entries(*(tensor[:, stay] for tensor in held[head]))
            if limit is not None:
                at = held[head].positions[0]
                hidden.append(int(limit.hides(torch.tensor(end), at).sum()))
        for head, gone in enumerate(hidden):
            if scores and self.chunked and windows[head] is None:  # they stay equally long
                gone = min(hidden[each] for each in scored)
            self.entries -= gone
            held[head] = Entries(*(tensor[:, gone:] for tensor in held[head]))

    @property
    def asks(self) -> bool:
        """Whether the method is asked what stays."""
        if self.fed:
            return bool(self.interval) and self.fed % self.interval == 0
        return bool(self.interval) or not self.question

    @property
    def evicts(self) -> bool:
        """Whether entries are evicted by score."""
        if self.question and not self.fed:
            return False
        return bool(self.fed) or self.last or self.chunking is not Chunking.NONE

    def choose(self, call: AttentionCall, heads: list[int], scorer: Method) -> Tensor:
        """Which entries of some KV heads stay by budget and scores: bool [K, E]."""
        tokens, prompt = call.key.shape[2], len(self.row.prompt)
        chunks = self.queries[call.layer]
        since = self.interval if self.fed else tokens  # tokens since the method was last asked
        own = self.chunking is not Chunking.NONE and not self.fed  # a chunk's own queries
        queries = torch.cat(chunks[-1:] if own else chunks, 1)
        window = min(since if self.window >= EVERY_QUERY else self.window, queries.shape[1])
        grouped = queries[:, queries.shape[1] - window :].unflatten(0, (-1, self.shape.group))
        seen, patched = self.start + tokens, tokens - self.new
        once = self.chunking is Chunking.NONE and not self.fed
        seed = draw_seed(self.row.seed, call.layer, 0 if once else seen - since)
        limit, sinks = self.layers[call.layer].limit, call.rules.sinks
        held = self.held[call.layer]
        entries = held[heads[0]].positions.shape[1]
        new = read = self.new if self.chunked else entries
        if limit is not None:
            read = self.new if self.chunked else prompt
            new = min(read, limit.held(prompt))
        gathered = self.gathered.get(call.layer)
        if gathered is not None and scorer.gathers_per_entry:
            gathered = torch.nn.functional.pad(gathered, (0, entries - gathered.shape[1]))
        view = LayerView(
            blocks=[[held[head]] for head in heads],
            queries=grouped[heads],
            query_positions=torch.arange(seen - window, seen, device=queries.device),
            scaling=call.rules.scaling,
            kv_heads=tuple(heads),
            layer=call.layer,
            layers=self.shape.layers,
            prompt=prompt,
            new=new,
            patched=patched,
            last=self.last,
            generator=torch.Generator().manual_seed(seed),
            acting=self.shape.acting,
            limit=limit,
            softcap=call.rules.softcap,
            sinks=None if sinks is None else sinks[heads],
            read=seen - patched,
            gathered=gathered,
            module=call.module,
            rotation=self.layers[call.layer].rotation,
        )
        if type(scorer).gather is not Method.gather:
            view = replace(view, gathered=scorer.gather(view))
        stay = torch.arange(entries).expand(len(heads), -1) < entries - patched
        if self.evicts:
            stay = self.best(view, scorer, read)
        done = self.evicts and self.row.spec.uneven  # such heads are evicted from once
        if view.gathered is not None and not done:
            kept = view.gathered
            if scorer.gathers_per_entry:
                kept = torch.stack([x[there] for x, there in zip(kept, stay, strict=True)])
            self.gathered[call.layer] = kept
        return stay.to(queries.device)

    def best(self, view: LayerView, scorer: Method, read: int) -> Tensor:
        """Which entries stay, after `read` tokens that compete: bool [K, E]."""
        spec, heads = self.row.spec, len(view.kv_heads)
        if isinstance(scorer, DecodingMethod) and self.interval:
            capacity = scorer.entries_held(self.longest, self.row.budget)
        else:
            asked = self.context if self.chunking is Chunking.BOUNDED else read
            budget = spec.scorer_budget(self.row.budget)
            capacity = scorer.capacity(replace(view, new=asked), budget)
        capacity = min(view.new, capacity)
        protected = 0 if view.patched else min(scorer.protected, view.new)
        end = view.entries - view.patched
        first = end - view.new
        stay = torch.arange(view.entries).repeat(heads, 1) < first  # entries kept before
        stay[:, end - min(capacity, protected) : end] = True  # the protected ones, or the last
        free = capacity - protected
        if capacity == view.new:
            stay[:, first:end] = True
        elif free > 0:
            scores = scorer.scores(view)
            assert scores is not None
            ranking = scores[:, first : end - protected].cpu()
            selected = scorer.select(view, scores[:, first : end - protected], free)
            if spec.competition is Competition.LAYER:
                least = int(spec.head_share * capacity) - protected
                for head, entry in among_heads(ranking.tolist(), heads * free, least):
                    stay[head, first + entry] = True
            elif selected is not None:
                stay.scatter_(1, first + selected.cpu(), True)
            else:
                order = ranking.argsort(dim=1, descending=True, stable=True)
                stay.scatter_(1, first + order[:, :free], True)
        return stay


def among_heads(scores: list[list[float]], total: int, least: int) -> list[tuple[int, int]]:
    """The `total` pairs (KV head, entry) of highest scores, `least` or more of each head first."""
    ranked = [
        sorted(((head, entry) for entry in range(len(row))), key=lambda pair: -row[pair[1]])
        for head, row in enumerate(scores)
    ]
    sure = [pair for pairs in ranked for pair in pairs[: max(0, least)]]
    rest = sorted(pair for pairs in ranked for pair in pairs[max(0, least) :])
    rest.sort(key=lambda pair: -scores[pair[0]][pair[1]])
    return (sure + rest)[:total]


def attention(call: AttentionCall, head: int, entries: Entries, here: Tensor) -> Tensor:
    """[T, Dv], the attention of one query head at positions `here` [T], in float64."""
    rules, size = call.rules, len(entries.keys[0])
    logits = call.query[0, head].double() @ entries.keys[0].double().T * rules.scaling
    if rules.softcap is not None:
        logits = rules.softcap * torch.tanh(logits / rules.softcap)
    logits = logits.masked_fill(~visible(rules.limit, here, entries.positions), -torch.inf)
    if rules.sinks is not None:
        sink = rules.sinks.flatten()[head].double().expand(len(logits), 1)
        logits = torch.cat([logits, sink], 1)
    weights = logits.softmax(-1)[:, :size]
    return (weights @ entries.values[0].double()).to(call.query.dtype)


def visible(limit: Limit | None, here: Tensor, positions: Tensor) -> Tensor:
    """[T, E], whether tokens at positions `here` [T] see entries at `positions` [1, E]."""
    seen = positions <= here[:, None]
    return seen if limit is None else seen & ~limit.hides(here[:, None], positions)
