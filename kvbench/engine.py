"""Runs rows: prompts are read in chunks, shared as far as rows hold the same; all decode together.

Rows with the same prompt are a *prefill group*. Within it, a *stream* is one cache being filled,
for all the rows that hold the same entries so far: full attention and everything that evicts only
after the prompt share one; whatever evicts earlier has its own. In the first chunk nothing has been
evicted, so it is read once for all streams. Later chunks of all streams go through the model as one
packed sequence: only attention knows whose tokens are whose.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.attention import Backend, attend_groups
from kvbench.cache import HeadGroup, Ledger, RowCache
from kvbench.decoding import DecodeKV
from kvbench.errors import InputError
from kvbench.eviction import Chooser, Chunk, Evictor, Layer
from kvbench.footprint import Meter, full_rows
from kvbench.graph import Repeated
from kvbench.method import Entries, KVShape
from kvbench.model import LoadedModel, unvisited
from kvbench.spec import MethodSpec

PACKED_TOKENS = 2048  # tokens that go through the model at once, unless one chunk has more


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
    kv_bytes_peak: int  # of the row as it is alone; storage shared with other rows counts in full
    device_bytes_peak: int | None  # the CUDA allocator's, of the whole call; None on a CPU
    prefill_seconds: float  # the row's share of the time of each forward it took part in
    decode_seconds: float  # the row's share of the steps it took part in
    prompt_tokens: int
    new_tokens: int  # generated, the end token included
    timeline: list[list[int]]  # as in results.Record
    shared_rows: int  # rows of its prefill group, itself included
    group_bytes_peak: int  # keys and values of all rows of the call together


def run_rows(
    model: LoadedModel, rows: Sequence[Row], *, prefill_chunk: int | None
) -> list[Outcome]:
    """Prefill and decode all rows, greedily; outcomes in the order of the rows.

    `prefill_chunk` is in tokens, None reads each prompt at once. InputError if a row does not fit
    the model, or the model's layers do not reach the harness's attention. Rows that evict nothing
    of the same prompt are one row: it is run once.
    """
    for row in rows:
        check(model, row)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    ledger = Ledger()
    groups: dict[tuple[int, ...], dict[object, list[int]]] = {}
    for index, row in enumerate(rows):
        same = (row.max_new_tokens,) if evictor_of(model, row).keeps_all else index
        groups.setdefault(tuple(row.prompt), {}).setdefault(same, []).append(index)
    states: list[RowState] = []
    # Kernels and graphs go to the current GPU, which may be another than the model's.
    with torch.inference_mode(), torch.cuda.device(model.device) if on_gpu else nullcontext():
        for group in groups.values():
            states += prefill(model, [rows[i[0]] for i in group.values()], prefill_chunk, ledger)
        decode(model, states)
    peak = torch.cuda.max_memory_allocated(model.device) if on_gpu else None
    results: dict[int, Outcome] = {}
    waiting = iter(states)
    for group in groups.values():
        shared = sum(len(members) for members in group.values())
        for members in group.values():
            state = next(waiting)
            for index in members:
                results[index] = outcome(model, state, peak, ledger, shared, len(members))
    return [results[index] for index in range(len(rows))]


def evictor_of(model: LoadedModel, row: Row) -> Evictor:
    """The method and budget of a row, ready to decide."""
    decoded = row.max_new_tokens - 1
    return Evictor(row.spec, row.budget, model.shape, len(row.prompt), decoded, row.seed)


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
    """A row on its way: its cache, and what it held so far, counted as if it ran alone."""

    row: Row
    evictor: Evictor
    cache: RowCache
    meter: Meter = field(default_factory=Meter)
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def arrive(self, groups: Sequence[HeadGroup], layer: Layer) -> None:
        """Count a chunk that a layer has attended to."""
        chunk = layer.chunk
        new = chunk.length + chunk.patched
        for group in groups:
            heads = len(group.heads)
            self.meter.attended(heads, group.length, chunk.length)
            self.meter.hold(heads * new)
            if self.evictor.chooses(group.window, chunk):
                self.meter.allocate(heads * new * layer.entry_bytes)
            elif not chunk.start:
                room = self.evictor.room(group.window, layer.last_chunk)
                self.meter.allocate(heads * room * layer.entry_bytes)

    def settle(self, sources: Sequence[HeadGroup], layer: Layer, chooser: Chooser) -> None:
        """Take in a chunk, or what stays of it.

        `sources` hold the entries of earlier chunks; they are the row's own, or those of a stream
        that it leaves with this chunk.
        """
        chunk, evictor, meter = layer.chunk, self.evictor, self.meter
        choice, kept_room = None, 0
        if chooser.groups and evictor.chooses(None, chunk):
            choice = chooser.choice(evictor)
            kept_room = chooser.room(evictor) if evictor.chunked else 0
        if sources[0] in self.cache.layers[layer.index]:
            chooser.forget()  # or a layer's old entries would be there until all new ones are
        scored = 0  # KV heads of the chooser's that are dealt with
        for group in sources:
            heads, past = len(group.heads), group.length
            own = layer.own_of(group)
            room = evictor.room(group.window, layer.last_chunk)
            if not evictor.chooses(group.window, chunk):
                group.add(own, room)
                continue
            if group.window is not None:
                group.slide(own, chunk.start, room)
            else:
                mine = None if choice is None else choice[scored : scored + heads]
                scored += heads
                if not evictor.chunked:
                    self._choose_from_all(group, own, mine, layer)
                    continue
                group.take(own, mine, kept_room)
            if not chunk.start:
                meter.allocate(heads * group.capacity * layer.entry_bytes)
            new = chunk.length + chunk.patched
            meter.hold(heads * (group.length - past - new))
            meter.allocate(-heads * new * layer.entry_bytes)

    def _choose_from_all(
        self, group: HeadGroup, own: Entries, choice: Tensor | None, layer: Layer
    ) -> None:
        """Hold only the entries `choice` of a group's, and of the prompt's last chunk."""
        before, new = group.length, layer.chunk.length
        if choice is None:
            everything = torch.arange(before + new, device=own.keys.device)
            choice = everything.expand(len(group.heads), -1)
        room = self.evictor.room_for_answer(choice.shape[1], before, new)
        self.cache.group_like(layer.index, group).replace(group, own, choice, room)
        for _ in group.heads:  # alone, a row's heads have storage each, and move one by one
            self._moved(own, 1, before, room)
            self.meter.hold(choice.shape[1] - before - new)
            self.meter.allocate(-new * layer.entry_bytes)

    def make_room(self) -> None:
        """Make room for the answer where there is none; windows have all they need."""
        for group in (group for groups in self.cache.layers for group in groups):
            before, room = group.capacity, group.length + self.evictor.decoded
            if group.window is not None or before >= room:
                continue
            group.reserve(room)
            moves = len(group.heads) if self.evictor.one_by_one else 1
            for _ in range(moves):
                self._moved(group.entries(), len(group.heads) // moves, before, room)

    def _moved(self, entries: Entries, heads: int, before: int, after: int) -> None:
        """Count the storage of `heads` KV heads that had room for `before` entries each."""
        for tensor in (entries.keys, entries.values):
            entry = heads * tensor.shape[-1] * tensor.itemsize
            self.meter.allocate(after * entry)
            self.meter.allocate(-before * entry)


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
    kv = PrefillKV(pack, model.backend, [False] * model.shape.layers)
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


def decode(model: LoadedModel, states: Sequence[RowState]) -> None:
    """Decode until every row has ended; rows leave the batch as they end."""
    batch = [state for state in states if not ended(model, state)]
    if not batch:
        return
    started = time.perf_counter()
    held = {id(state): state.cache.lengths() for state in batch}
    for state in batch:
        state.make_room()
    kv = DecodeKV(
        [state.cache for state in batch],
        [len(state.row.prompt) for state in batch],
        model.backend,
    )
    ids = torch.tensor([state.tokens[-1] for state in batch], device=model.device)

    def step() -> None:
        ids.copy_(forward(model, ids[:, None], kv.positions[:, None], kv).argmax(-1))
        kv.advance()

    take = Repeated(step, kv.capturable)
    running = list(range(len(batch)))  # places in the batch
    while running:
        take()
        tokens = ids.tolist()
        now = time.perf_counter()
        for place in running:
            state = batch[place]
            state.tokens.append(tokens[place])
            state.decode_seconds += (now - started) / len(running)
        started = now
        over = {place for place in running if ended(model, batch[place])}
        if not over:
            continue
        for place in over:
            state = batch[place]
            state.meter.decoded(held[id(state)], len(state.tokens) - 1)
        running = [place for place in running if place not in over]
        if kv.keeps_places and 2 * len(running) > len(batch):
            kv.retire(over)
            continue
        batch = [batch[place] for place in running]
        ids = ids[torch.tensor(running, dtype=torch.long, device=model.device)]
        kv.leave(running)
        take.changed()
        running = list(range(len(batch)))


def ended(model: LoadedModel, state: RowState) -> bool:
    """Whether a row has written its answer."""
    return state.tokens[-1] in model.end_tokens or len(state.tokens) >= state.row.max_new_tokens


def forward(
    model: LoadedModel,
    ids: Tensor,
    positions: Tensor,
    kv: object,
    ends: Sequence[int] | None = None,
) -> Tensor:
    """The logits after the tokens `ids` [B, T] at `positions` [B, T].

    [B, V] after each sequence's last token, or, of a single packed one, [len(ends), V] after the
    tokens `ends`.
    """
    keep: int | Tensor = 1
    if ends is not None and len(ends) > 1:
        keep = torch.tensor(ends, device=ids.device)
    elif ends is not None:
        keep = ids.shape[1] - ends[0]
    out = model.model(
        input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep, kv=kv
    )
    logits: Tensor = out.logits
    if ends is None:
        return logits[:, -1]
    return logits[0] if len(ends) > 1 else logits[0, :1]


def outcome(
    model: LoadedModel,
    state: RowState,
    device_bytes_peak: int | None,
    ledger: Ledger,
    shared_rows: int,
    alike: int,
) -> Outcome:
    """The measurements of a row that has ended, one of `alike` rows that it stands for."""
    meter, shape = state.meter, state.evictor.shape
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
        prefill_seconds=state.prefill_seconds / alike,
        decode_seconds=state.decode_seconds / alike,
        prompt_tokens=prompt,
        new_tokens=len(tokens),
        timeline=[list(corner) for corner in meter.timeline],
        shared_rows=shared_rows,
        group_bytes_peak=ledger.peak,
    )


def heads_of(shape: KVShape) -> int:
    """KV heads of all layers together."""
    return shape.layers * shape.kv_heads
