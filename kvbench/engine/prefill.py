"""Reading prompts: in chunks, shared as far as rows hold the same."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvbench.engine.attention import Backend, attend_groups, backend_of
from kvbench.engine.cache import Ledger, RowCache
from kvbench.engine.eviction import Chooser, Chunk, Layer
from kvbench.engine.row import Row, RowState, evictor_of, heads_of
from kvbench.errors import InputError
from kvbench.method import Entries
from kvbench.models.load import LoadedModel, forward, unvisited

PACKED_TOKENS = 2048  # tokens that go through the model at once, unless one chunk has more


@dataclass
class Stream:
    """A cache being filled with a prompt, for all rows that hold the same entries so far."""

    states: list[RowState]
    cache: RowCache
    chunks: list[Chunk]
    recent: list[Tensor | None]  # [H, W, D], each layer's latest queries of earlier chunks

    @property
    def keeper(self) -> RowState | None:
        """The row whose cache this is; the others leave it with the prompt's last chunk."""
        return next((state for state in self.states if state.cache is self.cache), None)

    def take(self, layer: Layer) -> None:
        """Let every row decide what it keeps of a chunk."""
        groups = self.cache.layers[layer.index]
        chooser = Chooser([group for group in groups if group.window is None], layer)
        keeper = self.keeper
        for state in self.states:
            state.arrive(groups, layer)
            if layer.chunk.last and state is not keeper:
                state.settle(groups, layer, chooser)
        if keeper is not None:
            keeper.settle(groups, layer, chooser)
            return
        for group in groups:
            if layer.chunk.last:
                group.clear()
            else:
                room = self.states[0].evictor.room(None, layer.last_chunk)
                group.add(layer.own_of(group), room)

    def observed(self, layer: int, chunk: Chunk, queries: Tensor, wanted: int) -> Tensor:
        """The latest `wanted` queries [H, W, D], which may reach back into earlier chunks."""
        before = self.recent[layer]
        if before is not None and queries.shape[1] < wanted and not self.states[0].evictor.chunked:
            queries = torch.cat([before, queries], dim=1)
        return queries[:, max(0, queries.shape[1] - wanted) :]

    def remember(self, layer: int, chunk: Chunk, queries: Tensor) -> None:
        """Keep the queries that an observation window at the prompt's end reaches back to."""
        evictors = [s.evictor for s in self.states if s.evictor.one_by_one]
        wanted = max((e.spec.observation_window for e in evictors), default=0)
        behind = sum(c.length for c in self.chunks if c.start > chunk.start)
        if 0 < behind < wanted:
            self.recent[layer] = self.observed(layer, chunk, queries, wanted - behind).clone()


@dataclass
class Piece:
    """A chunk read for some streams at once: one, or in the first chunk all that read the same."""

    streams: list[Stream]
    chunk: Chunk
    positions: Tensor  # [T + W], patched tokens at the end

    @property
    def tokens(self) -> int:
        """Tokens that go through the model."""
        return self.chunk.length + self.chunk.patched

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding: int | None,
        backend: Backend,
    ) -> Tensor:
        """query [H, T, D], key [K, T, D], value [K, T, Dv] -> [H, T, Dv]: attend, then evict."""
        kv_heads = key.shape[0]
        fed = Entries(key, value, self.positions.expand(kv_heads, -1))
        grouped = query.unflatten(0, (kv_heads, -1))
        lead, chunk = self.streams[0].cache, self.chunk
        if not chunk.start:
            out = backend.chunk(grouped, None, fed, scaling=scaling, sliding=sliding)
        else:
            out = attend_groups(
                lead, layer, grouped, fed, backend, scaling=scaling, sliding=sliding
            )
        own = Entries(*(tensor[:, : chunk.length] for tensor in fed))
        patch = Entries(*(t[:, chunk.length :] for t in fed)) if chunk.patched else None
        for stream in self.streams:
            following = tuple(c for c in stream.chunks if c.start > chunk.start)

            def observed(wanted: int, stream: Stream = stream) -> Tensor:
                return stream.observed(layer, chunk, query, wanted)

            stream.take(Layer(layer, chunk, following, own, patch, scaling, observed))
            stream.remember(layer, chunk, query)
        return out.flatten(0, 1)


def prefill(
    model: LoadedModel, rows: Sequence[Row], prefill_chunk: int | None, ledger: Ledger
) -> list[RowState]:
    """Read the prompt of a prefill group, chunk by chunk, and choose each row's first token."""
    prompt = rows[0].prompt
    states, streams = make_streams(model, rows, prefill_chunk, ledger)
    ids = torch.tensor(prompt, device=model.device)
    for step in range(len(streams[0].chunks)):
        for pack in packs(pieces(streams, step, model.device)):
            read(model, pack, ids)
    return states


def make_streams(
    model: LoadedModel, rows: Sequence[Row], prefill_chunk: int | None, ledger: Ledger
) -> tuple[list[RowState], list[Stream]]:
    """The rows' states in order, and the streams that they share."""
    states: list[RowState] = []
    leaving: list[RowState] = []  # evict once the prompt is read
    keeping: list[RowState] = []
    streams = []

    def add_stream(members: list[RowState], cache: RowCache) -> None:
        chunks = members[0].evictor.chunks(prefill_chunk)
        streams.append(Stream(members, cache, chunks, [None] * model.shape.layers))

    sharing = sum(evictor_of(model, row).waits for row in rows) > 1
    for row in rows:
        evictor = evictor_of(model, row)
        # Of a cache that is shared the whole storage stays until the last row has left it.
        apart = evictor.one_by_one and not (evictor.waits and sharing)
        cache = RowCache(evictor.windows(), ledger, model.device, apart=apart)
        states.append(RowState(row, evictor, cache))
        if evictor.keeps_all:
            keeping.append(states[-1])
        elif evictor.waits:
            leaving.append(states[-1])
        else:
            add_stream([states[-1]], cache)
    if keeping:
        add_stream([keeping[0], *leaving], keeping[0].cache)
        for state in keeping[1:]:
            add_stream([state], state.cache)
    elif len(leaving) == 1:
        add_stream(leaving, leaving[0].cache)
    elif leaving:
        add_stream(leaving, RowCache(leaving[0].evictor.windows(), ledger, model.device))
    return states, streams


def pieces(streams: Sequence[Stream], step: int, device: torch.device) -> list[Piece]:
    """What is read in step `step` of a prompt: the first chunk once for all that read the same."""
    alike: dict[int, list[Stream]] = {}
    for index, stream in enumerate(streams):
        alike.setdefault(index if step else -stream.chunks[0].patched, []).append(stream)
    result = []
    for members in alike.values():
        chunk = members[0].chunks[step]
        stop = chunk.start + chunk.length + chunk.patched
        result.append(Piece(members, chunk, torch.arange(chunk.start, stop, device=device)))
    return result


def packs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that go through the model together."""
    pack: list[Piece] = []
    for piece in pieces:
        if pack and sum(p.tokens for p in pack) + piece.tokens > PACKED_TOKENS:
            yield pack
            pack = []
        pack.append(piece)
    yield pack


def read(model: LoadedModel, pack: Sequence[Piece], ids: Tensor) -> None:
    """Read some pieces of the prompt `ids` in one forward."""
    started = time.perf_counter()
    fed, ends = [], []
    for piece in pack:
        chunk = piece.chunk
        fed.append(ids[chunk.start : chunk.start + chunk.length])
        ends.append(sum(len(tokens) for tokens in fed) - 1)
        if chunk.patched:
            fed.append(ids[len(ids) - chunk.patched :])
        for state in (state for stream in piece.streams for state in stream.states):
            state.meter.corner(chunk.start, state.meter.entries)
    before = [[s.meter.entries for stream in p.streams for s in stream.states] for p in pack]
    positions = torch.cat([piece.positions for piece in pack])
    kv = PrefillKV(pack, backend_of(model.attention), [False] * model.shape.layers)
    logits = forward(model, torch.cat(fed)[None], positions[None], kv, ends)
    if not pack[0].chunk.start and (missed := unvisited(kv.visited)):
        raise InputError(
            f"layers {missed} of model '{model.name}' do not attend through the registered "
            "attention (they are recurrent, or share keys with other layers)"
        )
    first = logits.argmax(-1).tolist() if pack[0].chunk.last else [None] * len(pack)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # or its time would be that of a later chunk
    seconds = (time.perf_counter() - started) / sum(piece.tokens for piece in pack)
    for piece, token, held in zip(pack, first, before, strict=True):
        chunk = piece.chunk
        states = [state for stream in piece.streams for state in stream.states]
        for state, entries in zip(states, held, strict=True):
            end = chunk.start + chunk.length
            state.meter.corner(end, entries + chunk.length * heads_of(model.shape))
            state.meter.corner(end, state.meter.entries)
            state.meter.patch_rows += chunk.patched
            state.prefill_seconds += seconds * piece.tokens / len(states)
            if token is not None:
                state.tokens.append(token)


@dataclass
class PrefillKV:
    """What attention finds in `kv` while a pack is read: each piece has its own tokens."""

    pack: Sequence[Piece]
    backend: Backend
    visited: list[bool]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """query [1, H, N, D], key [1, K, N, D], value [1, K, N, Dv] -> [1, H, N, Dv]."""
        self.visited[layer] = True
        sizes = [piece.tokens for piece in self.pack]
        tokens = (tensor[0].split(sizes, dim=1) for tensor in (query, key, value))
        parts = [
            piece.attend(layer, q, k, v, scaling, sliding, self.backend)
            for piece, q, k, v in zip(self.pack, *tokens, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))[None]
