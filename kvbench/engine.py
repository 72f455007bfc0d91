"""Runs rows: chunked prefill with eviction, then greedy decoding of all rows together."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.attention import Backend
from kvbench.cache import RowCache
from kvbench.errors import InputError
from kvbench.eviction import Chunk, Evictor
from kvbench.footprint import full_rows
from kvbench.method import KVShape
from kvbench.model import LoadedModel, unvisited
from kvbench.spec import MethodSpec


@dataclass(frozen=True)
class Row:
    """One sample under one method and budget."""

    prompt: list[int]
    max_new_tokens: int
    spec: MethodSpec
    budget: float
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a row gave and what it held (ALGORITHMS, section 1)."""

    tokens: list[int]  # generated, without the end token
    kv_footprint: float
    kv_peak: float
    kv_reads: float
    resident_rows: int  # entry-rows, summed over layers and KV heads
    full_rows: int  # the same under full attention
    patch_rows: int
    kv_bytes_peak: int
    device_bytes_peak: int | None  # the CUDA allocator's, of the whole call; None on a CPU
    prefill_seconds: float
    decode_seconds: float  # of the row's share of the steps it took part in
    prompt_tokens: int
    new_tokens: int  # generated, the end token included


def run_rows(
    model: LoadedModel, rows: Sequence[Row], *, prefill_chunk: int | None
) -> list[Outcome]:
    """Prefill each row, decode all together, greedily; outcomes in the order of the rows.

    `prefill_chunk` is in tokens, None reads each prompt at once. InputError if a row does not fit
    the model, or the model's layers do not reach the harness's attention.
    """
    for row in rows:
        check(model, row)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    with torch.inference_mode():
        states = [prefill(model, row, prefill_chunk) for row in rows]
        decode(model, states)
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else None
    return [outcome(model, state, peak) for state in states]


def check(model: LoadedModel, row: Row) -> None:
    """InputError for a row that cannot be run."""
    if not row.prompt or row.max_new_tokens < 1:
        raise InputError("a row needs a prompt and at least one token to generate")
    if not 0 < row.budget <= 1:
        raise InputError(f"a budget must be above 0 and at most 1, not {row.budget}")
    total = len(row.prompt) + row.max_new_tokens
    if total > model.max_context:
        raise InputError(
            f"{total} tokens are more than model '{model.name}' takes ({model.max_context})"
        )


@dataclass
class RowState:
    """A row on its way."""

    row: Row
    evictor: Evictor
    cache: RowCache
    windows: "list[Tensor | None]"  # [H, W, D], each layer's latest queries
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def prefill(model: LoadedModel, row: Row, prefill_chunk: int | None) -> RowState:
    """Read a row's prompt, chunk by chunk, and choose its first token."""
    started = time.perf_counter()
    prompt = len(row.prompt)
    evictor = Evictor(row.spec, row.budget, model.shape, prompt, row.max_new_tokens - 1, row.seed)
    cache = RowCache(evictor.windows(), model.device)
    state = RowState(row, evictor, cache, [None] * model.shape.layers)
    ids = torch.tensor(row.prompt, device=model.device)
    logits = torch.empty(0)
    for chunk in evictor.chunks(prefill_chunk):
        own = ids[chunk.start : chunk.start + chunk.length]
        fed = torch.cat([own, ids[prompt - chunk.patched :]]) if chunk.patched else own
        positions = torch.arange(chunk.start, chunk.start + len(fed), device=model.device)
        kv = PrefillKV(state, chunk, positions, model.backend)
        logits = forward(model, fed[None], positions[None], kv)
        if chunk.start == 0 and (missed := unvisited(kv.visited)):
            raise InputError(
                f"layers {missed} of model '{model.name}' do not attend through the registered "
                "attention (they are recurrent, or share keys with other layers)"
            )
        cache.meter.patch_rows += chunk.patched
    state.tokens.append(int(logits.argmax(-1)))
    state.prefill_seconds = time.perf_counter() - started
    return state


def decode(model: LoadedModel, states: Sequence[RowState]) -> None:
    """Decode until every row has ended; rows leave the batch as they end."""
    ends = model.end_tokens
    running = list(states)
    while True:
        running = [s for s in running if not ended(s, ends)]
        if not running:
            return
        started = time.perf_counter()
        ids = torch.tensor([[s.tokens[-1]] for s in running], device=model.device)
        places = [[len(s.row.prompt) + len(s.tokens) - 1] for s in running]
        positions = torch.tensor(places, device=model.device)
        kv = DecodeKV(running, positions, model.backend)
        chosen = forward(model, ids, positions, kv).argmax(-1).tolist()
        share = (time.perf_counter() - started) / len(running)
        for state, token in zip(running, chosen, strict=True):
            state.tokens.append(token)
            state.decode_seconds += share


def ended(state: RowState, ends: frozenset[int]) -> bool:
    """Whether a row has written its answer."""
    return state.tokens[-1] in ends or len(state.tokens) >= state.row.max_new_tokens


def forward(model: LoadedModel, ids: Tensor, positions: Tensor, kv: object) -> Tensor:
    """The logits [B, V] after the last of the tokens `ids` [B, T] at `positions` [B, T]."""
    out = model.model(
        input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, kv=kv
    )
    logits: Tensor = out.logits
    return logits[:, -1]


@dataclass
class PrefillKV:
    """What attention finds in `kv` while one row reads a chunk: attend first, then evict."""

    state: RowState
    chunk: Chunk
    positions: Tensor  # [T]
    backend: Backend
    visited: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.visited = [False] * len(self.state.cache.layers)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """query [1, H, T, D], key [1, K, T, D], value [1, K, T, Dv] -> [1, H, T, Dv]."""
        self.visited[layer] = True
        state, chunk = self.state, self.chunk
        groups = state.cache.layers[layer]
        grouped = query[0].unflatten(0, (key.shape[1], -1))
        parts = []
        for group in groups:
            whole = len(groups) == 1
            past = group.length
            group.append(
                key[0] if whole else key[0, group.heads],
                value[0] if whole else value[0, group.heads],
                self.positions,
                state.evictor.reserve(group, chunk),
            )
            state.cache.meter.attended(len(group.heads), past, chunk.length)
            parts.append(
                self.backend(
                    grouped if whole else grouped[group.heads],
                    group.keys[:, : group.length],
                    group.values[:, : group.length],
                    scaling=scaling,
                    query_positions=self.positions,
                    positions=group.positions[:, : group.length],
                    sliding=sliding,
                )
            )
        state.evictor.after_chunk(
            state.cache, layer, chunk, self._observed(layer, query[0]), scaling
        )
        return joined(groups, parts)[None]

    def _observed(self, layer: int, queries: Tensor) -> Tensor:
        """The latest queries [H, W, D], which may reach back into earlier chunks."""
        wanted = self.state.evictor.spec.observation_window if self.state.evictor.scores else 0
        before = self.state.windows[layer]
        if wanted and before is not None and queries.shape[1] < wanted and not self._chunked:
            queries = torch.cat([before, queries], dim=1)
        latest = queries[:, max(0, queries.shape[1] - wanted) :] if wanted else queries[:, :0]
        if wanted and not self._chunked and not self.chunk.last:
            self.state.windows[layer] = latest.clone()
        return latest

    @property
    def _chunked(self) -> bool:
        return self.state.row.spec.chunking != "none"


@dataclass
class DecodeKV:
    """What attention finds in `kv` while rows decode a token each."""

    states: Sequence[RowState]
    positions: Tensor  # [R, 1]
    backend: Backend

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
        grouped = query.unflatten(1, (key.shape[1], -1))
        rows = []
        for i, state in enumerate(self.states):
            groups = state.cache.layers[layer]
            whole = len(groups) == 1
            parts = []
            for group in groups:
                state.cache.meter.attended(len(group.heads), group.resident, 1)
                group.append(
                    key[i] if whole else key[i, group.heads],
                    value[i] if whole else value[i, group.heads],
                    self.positions[i],
                    state.evictor.reserve_decoding(group),
                )
                parts.append(
                    self.backend(
                        grouped[i] if whole else grouped[i, group.heads],
                        group.keys[:, : group.length],
                        group.values[:, : group.length],
                        scaling=scaling,
                        query_positions=self.positions[i],
                        positions=group.positions[:, : group.length],
                        sliding=sliding,
                    )
                )
                group.slide()
            rows.append(joined(groups, parts))
        return torch.stack(rows)


def joined(groups: Sequence[object], parts: Sequence[Tensor]) -> Tensor:
    """The outputs [Kg, G, T, Dv] of a layer's groups as [H, T, Dv], KV heads in order."""
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    heads = torch.cat([group.heads for group in groups])  # type: ignore[attr-defined]
    return torch.cat(list(parts))[heads.argsort()].flatten(0, 1)


def outcome(model: LoadedModel, state: RowState, device_bytes_peak: int | None) -> Outcome:
    """The measurements of a row that has ended."""
    meter, shape = state.cache.meter, state.evictor.shape
    prompt, fed = len(state.row.prompt), len(state.tokens) - 1
    heads = heads_of(shape)
    full = heads * full_rows(prompt, fed)
    tokens = state.tokens
    return Outcome(
        tokens=tokens[:-1] if tokens[-1] in model.end_tokens else tokens,
        kv_footprint=meter.resident_rows / full,
        kv_peak=meter.entries_peak / (heads * (prompt + fed)),
        kv_reads=meter.read_rows / full,
        resident_rows=meter.resident_rows,
        full_rows=full,
        patch_rows=meter.patch_rows,
        kv_bytes_peak=meter.bytes_peak,
        device_bytes_peak=device_bytes_peak,
        prefill_seconds=state.prefill_seconds,
        decode_seconds=state.decode_seconds,
        prompt_tokens=prompt,
        new_tokens=len(tokens),
    )


def heads_of(shape: KVShape) -> int:
    """KV heads of all layers together."""
    return shape.layers * shape.kv_heads
