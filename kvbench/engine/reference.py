"""The engine in its simplest form: one row, read in chunks and decoded as the rules say.

`run_reference` measures what `kvbench.engine.run.run_rows` measures, without sharing, kernels,
storage or a cache of scores, with attention in float64. Read it to learn how eviction is measured;
tests compare the engine with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.engine.row import Row
from kvbench.method import Entries, KVShape, LayerView, Method, draw_seed
from kvbench.models.attention import AttentionCall
from kvbench.models.load import LoadedModel, forward
from kvbench.spec import Chunking


@dataclass(frozen=True)
class Reference:
    """What a row gives; the fields are those of `kvbench.engine.row.Outcome`."""

    tokens: list[int]
    kept: list[list[list[int]]]
    resident_rows: int
    patch_rows: int
    kv_peak: float


def run_reference(model: LoadedModel, row: Row, prefill_chunk: int | None) -> Reference:
    """Read the prompt of a row in chunks of `prefill_chunk` tokens, then decode greedily."""
    kv, prompt = ReferenceKV(row, model.shape), len(row.prompt)

    def feed(ids: list[int], start: int) -> int:
        positions = torch.arange(start, start + len(ids), device=model.device)
        with torch.inference_mode():
            given = torch.tensor([ids], device=model.device)
            return int(forward(model, given, positions[None], kv).argmax(-1))

    token = patch_rows = 0
    for start in range(0, prompt, prefill_chunk or prompt):
        stop = min(prompt, start + (prefill_chunk or prompt))
        kv.start, kv.new, kv.last = start, stop - start, stop == prompt
        patch = row.prompt[-kv.window :] if kv.patched and not kv.last else []
        token = feed(row.prompt[start:stop] + patch, start)
        patch_rows += len(patch)
    kept = [[sorted(head.positions[0].tolist()) for head in layer] for layer in kv.held]
    kv.scorer, kv.new = None, 1  # from now on only windows evict
    tokens = [token]
    while len(tokens) < row.max_new_tokens and tokens[-1] not in model.end_tokens:
        kv.start = prompt + len(tokens) - 1
        tokens.append(feed([tokens[-1]], kv.start))
    full = model.shape.total_kv_heads * (prompt + len(tokens) - 1)
    answer = tokens[:-1] if tokens[-1] in model.end_tokens else tokens
    return Reference(answer, kept, kv.resident_rows, patch_rows, kv.peak / full)


class ReferenceKV:
    """A `KVAttention` that holds the entries [1, E, ...] of each layer and KV head."""

    start = 0  # position of the chunk's first token
    new = 0  # tokens of the chunk, without the patched ones
    last = False  # whether it is the prompt's last chunk

    def __init__(self, row: Row, shape: KVShape) -> None:
        self.row, self.shape = row, shape
        evicts, method = row.budget < 1, row.spec.method
        windows = method.windows(shape, row.budget, len(row.prompt)) if evicts else None
        self.windows = windows or [[None] * shape.kv_heads] * shape.layers
        self.scorer: Method | None = row.spec.scorer if evicts else None
        self.chunked = row.spec.chunking is not Chunking.NONE
        self.patched = row.spec.chunking is Chunking.PATCHED and self.scorer is not None
        self.window = row.spec.observation_window
        self.held: list[list[Entries]] = [[] for _ in range(shape.layers)]
        self.queries: list[list[Tensor]] = [[] for _ in range(shape.layers)]  # [H, T, D] each
        self.entries = self.peak = self.resident_rows = 0

    def attend(self, call: AttentionCall) -> Tensor:
        """B = 1: add the new entries, attend, count, and evict."""
        tokens, held = call.key.shape[2], self.held[call.layer]
        here = torch.arange(self.start, self.start + tokens, device=call.key.device)
        for head in range(self.shape.kv_heads):
            new = Entries(call.key[:, head], call.value[:, head], here[None])
            if not self.start:
                held.append(new)
            else:
                pairs = zip(held[head], new, strict=True)
                held[head] = Entries(*(torch.cat(pair, 1) for pair in pairs))
            past = held[head].keys.shape[1] - tokens
            self.resident_rows += sum(past + i for i in range(1, self.new + 1))
        self.entries += self.shape.kv_heads * tokens
        self.peak = max(self.peak, self.entries)
        self.queries[call.layer].append(call.query[0])
        heads = range(self.shape.query_heads)
        out = torch.stack([attention(call, h, held[h // self.shape.group], here) for h in heads])
        self.evict(call)
        return out[None]

    def evict(self, call: AttentionCall) -> None:
        """Drop patched entries, what left a window, and what the method does not choose."""
        held, windows, end = self.held[call.layer], self.windows[call.layer], self.start + self.new
        scored = [head for head, window in enumerate(windows) if window is None]
        chosen: dict[int, Tensor] = {}
        if self.scorer is not None and scored and (self.chunked or self.last):
            chosen = dict(zip(scored, self.choose(call, scored, self.scorer), strict=True))
        for head, window in enumerate(windows):
            at = held[head].positions[0]
            stay = chosen.get(head, at < end)
            if window is not None:
                stay &= (at < window.sinks) | (at >= end - window.size)
            self.entries -= int((~stay).sum())
            held[head] = Entries(*(tensor[:, stay] for tensor in held[head]))

    def choose(self, call: AttentionCall, heads: list[int], scorer: Method) -> Tensor:
        """Which entries of some KV heads stay by budget and scores: bool [K, E]."""
        tokens, prompt = call.key.shape[2], len(self.row.prompt)
        chunks = self.queries[call.layer]
        queries = torch.cat(chunks[-1:] if self.chunked else chunks, 1)
        window = min(self.window, queries.shape[1])
        grouped = queries[:, queries.shape[1] - window :].unflatten(0, (-1, self.shape.group))
        seen, patched = self.start + tokens, tokens - self.new
        seed = draw_seed(self.row.seed, call.layer, self.start if self.chunked else 0)
        view = LayerView(
            blocks=[[self.held[call.layer][head]] for head in heads],
            queries=grouped[heads],
            query_positions=torch.arange(seen - window, seen, device=queries.device),
            scaling=call.scaling,
            kv_heads=tuple(heads),
            layer=call.layer,
            layers=self.shape.layers,
            prompt=prompt,
            new=self.new if self.chunked else prompt,
            patched=patched,
            last=self.last,
            generator=torch.Generator().manual_seed(seed),
        )
        budget = self.row.spec.scorer_budget(self.row.budget)
        capacity = min(view.new, scorer.capacity(view, budget))
        observed = 0 if patched else min(self.window, view.new)
        end = view.entries - patched
        first = end - view.new
        stay = torch.arange(view.entries).expand(len(heads), -1) < first  # entries kept before
        stay[:, end - min(capacity, observed) : end] = True  # the observation window, or its end
        if capacity > observed:
            scores = scorer.scores(view)
            assert scores is not None
            ranking = scores[:, first : end - observed].cpu()
            ranking = ranking.argsort(dim=1, descending=True, stable=True)
            stay.scatter_(1, first + ranking[:, : capacity - observed], True)
        return stay.to(queries.device)


def attention(call: AttentionCall, head: int, entries: Entries, here: Tensor) -> Tensor:
    """[T, Dv], the attention of one query head at positions `here` [T], in float64."""
    logits = call.query[0, head].double() @ entries.keys[0].double().T * call.scaling
    distance = here[:, None] - entries.positions
    hidden = distance < 0
    if call.sliding is not None:
        hidden |= distance >= call.sliding
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ entries.values[0].double()).to(call.query.dtype)
