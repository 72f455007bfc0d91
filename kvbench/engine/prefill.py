"""Reads prompts in chunks: in each layer a chunk attends, and then every row evicts.

Rows with the same prompt form a *prefill group*. A *stream* is a cache that is being filled for all
rows of the group that hold the same entries so far: full attention and all methods that evict only
once the prompt is read share one stream; each row that evicts earlier has its own. Nothing is
evicted before the first chunk has been read, so all streams read that chunk together.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kvbench.engine.accounting import space_in_sight
from kvbench.engine.attention import Backend, attend_groups, backend_of
from kvbench.engine.cache import HeadGroup, Ledger, RowCache, Visible
from kvbench.engine.contract import Asked, check_finite
from kvbench.engine.eviction import Gathered, LayerChunk, LayerScores, choose, choose_in_model
from kvbench.engine.policy import Chunk
from kvbench.engine.replay import replay
from kvbench.engine.row import Row, RowState, not_finite, policy_of
from kvbench.errors import ContractError
from kvbench.method import EVERY_QUERY, Competition, Entries, Need
from kvbench.models.attention import AttentionCall, LayerShape
from kvbench.models.load import LoadedModel, best_tokens, forward

PACKED_TOKENS = 2048  # tokens that go through the model at once, unless one chunk has more


def prefill(
    model: LoadedModel, rows: Sequence[Row], prefill_chunk: int | None, ledger: Ledger
) -> list[RowState]:
    """Read the prompt of a prefill group, and choose each row's first token.

    Returns the states of the rows, in order. `ledger` counts the bytes that are really allocated.
    """
    states, streams = make_streams(model, rows, prefill_chunk, ledger)
    ids = torch.tensor(rows[0].prompt, device=model.device)
    chunks = streams[0].chunks
    for step, chunk in enumerate(chunks):
        for pack in packs(pieces(streams, step, model.device)):
            read(model, pack, ids)
        if chunk.last and not chunk.final:  # all rows have their caches, and read the question
            streams = [Stream.of(state) for state in states]
    return states


def read(model: LoadedModel, pack: "Sequence[Piece]", ids: Tensor) -> None:
    """Read some chunks of the prompt `ids` [n] in one forward, packed into one sequence."""
    started = time.perf_counter()
    fed, ends = [], []
    for piece in pack:
        chunk = piece.chunk
        fed.append(ids[chunk.start : chunk.start + chunk.length])
        ends.append(sum(len(tokens) for tokens in fed) - 1)
        if chunk.patched:
            stop = piece.streams[0].states[0].policy.evicted_from
            fed.append(ids[stop - chunk.patched : stop])
    positions = torch.cat([piece.positions for piece in pack])
    kv = PrefillKV(pack, backend_of(model.attention), model.layers)
    logits = forward(model, torch.cat(fed)[None], positions[None], kv, ends)
    for stream in (stream for piece in pack for stream in piece.streams):
        if stream.late and pack[0].chunk.last:
            stream.evict_late(model, ids)
        try:
            check_finite(stream.finite)
        except ContractError as error:
            if logits.isfinite().all():
                raise
            raise ContractError(not_finite(model, "in the prompt")) from error
        stream.finite.clear()
    first = best_tokens(logits).tolist() if pack[0].chunk.final else [None] * len(pack)
    for device in model.devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # so that no later chunk pays for this one
    seconds = (time.perf_counter() - started) / sum(piece.chunk.tokens for piece in pack)
    for piece, token in zip(pack, first, strict=True):
        chunk = piece.chunk
        states = [state for stream in piece.streams for state in stream.states]
        for state in states:
            state.accounting.chunk_read(chunk.length, chunk.patched)
            state.prefill_seconds += seconds * chunk.tokens / len(states)
            if token is not None:
                state.tokens.append(token)


@dataclass
class PrefillKV:
    """A `KVAttention` for one forward of packed chunks: each piece attends to its own entries."""

    pack: "Sequence[Piece]"
    backend: Backend
    layers: Sequence[LayerShape]

    def attend(self, call: AttentionCall) -> Tensor:
        """B = 1, T the tokens of all pieces."""
        calls = call.split([piece.chunk.tokens for piece in self.pack])
        parts = [
            piece.attend(part, self.layers[call.layer], self.backend)
            for piece, part in zip(self.pack, calls, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass
class Piece:
    """A chunk that is read for some streams at once: for one, or the first chunk for several."""

    streams: "list[Stream]"
    chunk: Chunk
    positions: Tensor  # [T + W], patched tokens at the end
    calls: dict[int, AttentionCall] = field(
        default_factory=dict
    )  # of layers that wait for a reader

    def attend(self, call: AttentionCall, shape: LayerShape, backend: Backend) -> Tensor:
        """Attend, then let every row evict. B = 1; returns [1, H, T + W, Dv].

        Where several layers read the same keys, rows evict once the last of them has attended, by
        the queries of the first.
        """
        query, key, value = call.query[0], call.key[0], call.value[0]
        chunk, kv_heads, rules = self.chunk, key.shape[0], call.rules
        fed = Entries(key, value, self.positions.to(key.device).expand(kv_heads, -1))
        grouped = query.unflatten(0, (kv_heads, -1))
        if rules.limit is not None and chunk.start + chunk.tokens <= rules.limit.size:
            rules = replace(rules, limit=None)  # it hides nothing yet
        if chunk.start:
            cache = self.streams[0].cache
            out = attend_groups(cache, shape.source, grouped, fed, rules, backend)
        else:
            out = backend.chunk(grouped, None, fed, rules)
        if call.layer != shape.readers[-1]:
            if call.layer == shape.source:
                self.calls[call.layer] = call
        else:
            first = self.calls.pop(shape.source, call)
            self.evict(replace(first, rules=call.rules), shape, fed)
        return out.flatten(0, 1)[None]

    def evict(self, call: AttentionCall, shape: LayerShape, fed: Entries) -> None:
        """Let every row evict from a layer that has attended to the entries `fed`."""
        chunk, layer = self.chunk, call.layer
        own = Entries(*(tensor[:, : chunk.length] for tensor in fed))
        patch = Entries(*(t[:, chunk.length :] for t in fed)) if chunk.patched else None
        for stream in self.streams:
            queries = stream.latest_queries(layer, call.query[0])
            stream.evict(
                LayerChunk(
                    layer, chunk, own, patch, queries, call.rules, call.module, shape.rotation
                )
            )
            stream.remember(layer, chunk, queries)


@dataclass
class Stream:
    """A cache that is being filled with a prompt, for all rows that hold the same entries so far.

    It belongs to the last of `states` (the owner), or to no row. The others evict with the last
    chunk of the prompt and copy what they keep.
    """

    states: list[RowState]
    cache: RowCache
    # By layer: the latest queries [H, W, D] of earlier chunks, and what methods have gathered.
    recent: dict[int, Tensor] = field(default_factory=dict)
    gathered: defaultdict[int, Gathered] = field(default_factory=lambda: defaultdict(dict))
    late: dict[int, LayerChunk] = field(default_factory=dict)  # layers whose rows evict late
    finite: list[tuple[Asked, int, Tensor]] = field(default_factory=list)  # see `check_finite`

    @classmethod
    def of(cls, state: RowState) -> "Stream":
        """The stream of a row that holds entries already."""
        stream = cls([state], state.cache)
        for layer in state.gathered:
            stream.gathered[layer] = state.gathered_by_method(layer)
        return stream

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The prefill chunks, the same for all rows."""
        return self.states[0].policy.chunks

    def evict(self, layer: LayerChunk) -> None:
        """Count what attended, then choose and move what each row keeps of a chunk."""
        groups, chunk = self.cache.layers[layer.index], layer.chunk
        policy = self.states[0].policy
        scored = [group for group in groups if policy.scores(layer.index, group)]
        scores = LayerScores(scored, layer, self.gathered[layer.index])
        for state in self.states:
            count_attended(state, groups, layer)
            if scored and state.policy.gathers_after(chunk):
                state.keep_beside(layer.index, scores.gather(state.policy))
            if scored and state.policy.evicts_late and chunk.last:
                self.late[layer.index] = layer.stored()
            state.remember(layer.index, layer.queries[:, layer.queries.shape[1] - chunk.tokens :])
            chosen: Sequence[HeadGroup] = []
            if chunk.last or state.cache is self.cache:
                chosen = move_kept(state, groups, layer, scores)
            count_visible(state, [group for group in groups if group not in chosen], layer)
        self.finite += scores.finite
        if self.states[-1].cache is self.cache:
            return
        for group in groups:  # the cache of no row, only for reading the prompt
            reserved = policy.reserved(layer.index, group.window)
            if chunk.last:
                group.clear()
            elif group.window is None:
                group.add(group.select(layer.own), reserved)
            else:
                group.slide(group.select(layer.own), chunk.start, reserved)

    def latest_queries(self, layer: int, queries: Tensor) -> Tensor:
        """A chunk's queries [H, T, D], after those of earlier chunks that may be needed."""
        recent = self.recent.get(layer)
        return queries if recent is None else torch.cat([recent, queries], dim=1)

    def evict_late(self, model: LoadedModel, ids: Tensor) -> None:
        """Choose what stays of all layers, once all have attended to the last chunk."""
        (state,) = self.states
        policy, cache = state.policy, state.cache
        layers = list(self.late.values())
        if policy.spec.scorer is not None and Need.REPLAY in policy.spec.scorer.needs:
            replayed = replay(model, state, ids)
            layers = [replace(layer, replayed=replayed[layer.index]) for layer in layers]
        scores = [
            LayerScores(
                [g for g in cache.layers[layer.index] if policy.scores(layer.index, g)],
                layer,
                self.gathered[layer.index],
            )
            for layer in layers
        ]
        if policy.spec.competition is Competition.MODEL:
            chosen = choose_in_model(policy, scores)
        else:
            chosen = [choose(policy, each) for each in scores]
        for layer, each, stay in zip(layers, scores, chosen, strict=True):
            self.finite += each.finite
            each.release()
            for group, indices in zip(each.groups, stay, strict=True):
                if indices is not None:
                    evict_stored(state, group, indices, layer)
        self.late.clear()

    def remember(self, layer: int, chunk: Chunk, queries: Tensor) -> None:
        """Keep the queries that an observation window at the end of the prompt reaches back to."""
        policies = [state.policy for state in self.states if state.policy.scores_once]
        windows = [policy.spec.observation_window for policy in policies]
        wanted = max((window for window in windows if window < EVERY_QUERY), default=0)
        behind = sum(c.length for c in self.chunks if c.start > chunk.start and not c.question)
        if 0 < behind < wanted:
            self.recent[layer] = queries[:, behind - wanted :].clone()


def evict_stored(state: RowState, group: HeadGroup, stay: Tensor, layer: LayerChunk) -> None:
    """Evict all but the entries `stay` [Kg, c] of a group whose entries are all in the cache."""
    before, capacity, size = group.length, group.capacity, layer.entry_bytes
    reserved = state.policy.reserved_for_answer(stay.shape[1], before, 0)
    group.replace(group, group.select(layer.own), stay, reserved)
    for _ in group.heads:
        state.accounting.moved(1, capacity, group.capacity, size)
        state.accounting.evicted(1, before, 0, group.length, size)


def count_attended(state: RowState, groups: Sequence[HeadGroup], layer: LayerChunk) -> None:
    """Tell a row's accounting that a chunk attended to what `groups` hold."""
    chunk, policy, accounting = layer.chunk, state.policy, state.accounting
    for group in groups:
        stored, size = 0, layer.entry_bytes
        if policy.evicts(group.window, chunk):
            stored = chunk.tokens  # the chunk's own storage, until what stays is moved
        elif not chunk.start:
            stored = policy.reserved(layer.index, group.window)
        heads, held, limit = len(group.heads), group.length, group.limit
        if limit is None:
            accounting.attended(heads, held, chunk.length, chunk.patched, stored, size)
        elif isinstance(group.window, Visible):
            accounting.attended_in_sight(
                heads, held, chunk.length, chunk.patched, limit, stored, size
            )
        else:
            past: Tensor | int = held
            if group.window is None and held:
                past = group.entries().positions[:, :held]
            accounting.attended_in_part(
                heads, past, chunk.length, chunk.patched, limit, stored, size
            )


def count_visible(state: RowState, groups: Sequence[HeadGroup], layer: LayerChunk) -> None:
    """Tell a row's accounting what happened to KV heads that hold all that is visible.

    Rows that share a stream hold it as if they ran alone.
    """
    chunk, policy, size = layer.chunk, state.policy, layer.entry_bytes
    for group in groups:
        if isinstance(group.window, Visible):
            room = policy.reserved(layer.index, group.window)
            # heads that will be scored have separate storage when the row runs alone
            times = len(group.heads) if policy.scores_once and layer.index in policy.acting else 1
            heads = len(group.heads) // times
            for _ in range(times):
                if not chunk.start:
                    state.accounting.moved(heads, 0, room, size)
                state.accounting.freed(heads, chunk.tokens, chunk.patched, size)


def move_kept(
    state: RowState, groups: Sequence[HeadGroup], layer: LayerChunk, scores: LayerScores
) -> Sequence[HeadGroup]:
    """Move to a row's cache what it keeps of a chunk, and of `groups` if it evicts from those.

    Returns the groups whose entries were chosen by score.

    `groups` hold the entries of earlier chunks. They are in the row's own cache, or in that of the
    stream that the row leaves.
    """
    chunk, policy = layer.chunk, state.policy
    stay: Iterator[Tensor | None] = iter(())  # of each group that is scored
    reserved = 0
    scored = scores.groups if policy.scores_after(chunk) else []
    if scored:
        chosen = choose(policy, scores)
        stay = iter(chosen)
        if chosen[0] is None and isinstance(scored[0].window, Visible):
            scored = []  # all that is visible stays, as under full attention
        elif policy.gathers and policy.spec.uneven:
            state.drop_beside(layer.index)  # nothing reads it again: entries are chosen once
        elif policy.gathers_after(chunk):
            gathered = scores.kept_of(policy, chosen)
            if policy.bounded:
                scores.hold(policy, gathered)
            state.keep_beside(layer.index, gathered)
        if policy.scores_each_chunk:
            reserved = policy.reserved_from(chunk, scores.view(policy))
    own_cache = groups is state.cache.layers[layer.index]
    if scored and policy.spec.uneven:
        parts = {id(group): group.apart() for group in scored}
        groups = [part for group in groups for part in parts.get(id(group), [group])]
        scored = [part for group in scored for part in parts[id(group)]]
    if own_cache:
        scores.release()  # or all old entries of the layer would be kept until all have moved
    for group in groups:
        own, size = group.select(layer.own), layer.entry_bytes
        heads, before, capacity = len(group.heads), group.length, group.capacity
        if policy.separate and group in scored:
            move_chosen(state, group, own, next(stay), layer)
        elif group.window is not None:
            room = policy.reserved(layer.index, group.window)
            mine = group
            if not own_cache:
                mine = state.cache.group_like(layer.index, group)
                mine.hold_as(group, room)
            mine.slide(own, chunk.start, room)
            if isinstance(group.window, Visible):
                continue  # `count_visible` does
            if mine.capacity != capacity:
                state.accounting.moved(heads, capacity, mine.capacity, size)
            counted = counted_of(group, before, chunk)
            state.accounting.evicted(heads, before, chunk.tokens, mine.length, size, counted)
        elif group in scored:
            chosen_here = next(stay)
            if group.limit is not None:
                chosen_here = among_all(chosen_here, own, group, chunk)
            group.take(own, chosen_here, reserved)
            if group.limit is not None:
                group.drop_hidden(chunk.start + chunk.length)
            if group.capacity != capacity:
                state.accounting.moved(heads, capacity, group.capacity, size)
            counted = counted_of(group, before, chunk)
            state.accounting.evicted(heads, before, chunk.tokens, group.length, size, counted)
        elif own_cache:
            if chunk.question and layer.index in policy.acting:
                room = policy.reserved_for_question(before, chunk)
            else:
                room = policy.reserved(layer.index, None)
            group.add(own, room)
            if capacity and group.capacity != capacity:
                state.count_growth(group, capacity)
        else:  # counted as if the row had read the prompt alone
            mine = state.cache.group_like(layer.index, group)
            everything = torch.arange(before + chunk.length, device=own.keys.device)
            room = policy.reserved(layer.index, None)
            mine.replace(group, own, everything.expand(heads, -1), room)
    return scored


def counted_of(group: HeadGroup, before: int, chunk: Chunk) -> int:
    """Entries of a chunk that were counted on top of the `before` ones of a group."""
    if group.limit is None:
        return chunk.tokens
    return space_in_sight(before, chunk.length, group.limit) + chunk.patched


def among_all(chosen: Tensor | None, own: Entries, group: HeadGroup, chunk: Chunk) -> Tensor | None:
    """Indices among a chunk's entries, of indices among those of them that stay visible."""
    assert group.limit is not None
    hidden = chunk.length - min(chunk.length, group.limit.held(chunk.start + chunk.length))
    if chosen is None and hidden:
        last = torch.arange(chunk.length - hidden, device=own.keys.device)
        chosen = last.expand(len(group.heads), -1)
    return None if chosen is None else chosen + hidden


def move_chosen(
    state: RowState, group: HeadGroup, own: Entries, stay: Tensor | None, layer: LayerChunk
) -> None:
    """Move the entries `stay` [Kg, c] (None: all) of a group and of the prompt's last chunk."""
    before, new, limit = group.length, layer.chunk.length, group.limit
    window, accounting = group.window, state.accounting
    if limit is not None:  # the chosen ones are counted from the first that is still visible
        hidden = before + new - limit.held(layer.chunk.start + new)
        if stay is None:
            stay = torch.arange(hidden, before + new, device=own.keys.device)
            stay = stay.expand(len(group.heads), -1)
        else:
            stay = stay + hidden
    if stay is None:
        everything = torch.arange(before + new, device=own.keys.device)
        stay = everything.expand(len(group.heads), -1)
    kept, policy = stay.shape[1], state.policy
    reserved = kept
    if layer.chunk.last:
        reserved = policy.reserved_for_answer(kept, before, new)
    past = group.capacity if policy.bounded else before  # entries of storage, if it ran alone
    state.cache.group_like(layer.index, group).replace(group, own, stay, reserved)
    for _ in group.heads:  # when the row runs alone, each head has its storage and moves by itself
        if isinstance(window, Visible) and limit is not None:
            stored = policy.reserved(layer.index, window) if layer.chunk.start else 0
            accounting.moved(1, stored, reserved, layer.entry_bytes)
            accounting.left_sight(1, limit, layer.chunk.start + new, kept)
            accounting.freed(1, layer.chunk.tokens, 0, layer.entry_bytes)
        else:
            accounting.moved(1, past, reserved, layer.entry_bytes)
            accounting.evicted(1, before, new, kept, layer.entry_bytes)


def make_streams(
    model: LoadedModel, rows: Sequence[Row], prefill_chunk: int | None, ledger: Ledger
) -> tuple[list[RowState], list[Stream]]:
    """The states of the rows, in order, and the streams that they share."""
    states: list[RowState] = []
    leaving: list[RowState] = []  # evict once the prompt is read
    keeping: list[RowState] = []
    streams = []

    def add_stream(members: list[RowState], cache: RowCache) -> None:
        streams.append(Stream(members, cache))

    devices = [layer.device for layer in model.layers]
    policies = [policy_of(model, row, prefill_chunk) for row in rows]
    sharing = sum(p.keeps_whole_prompt and not p.evicts_late for p in policies) > 1
    for row, policy in zip(rows, policies, strict=True):
        # The storage of a shared cache stays as a whole until the last row has left it.
        shared = policy.keeps_whole_prompt and not policy.evicts_late and sharing
        apart = policy.spec.uneven or policy.bounded or (policy.scores_once and not shared)
        layers = policy.acting if apart and policy.evicts_by_score else ()
        cache = RowCache(policy.windows, ledger, devices, limits=policy.limits, apart=layers)
        states.append(RowState(row, policy, cache))
        if policy.keeps_all:
            keeping.append(states[-1])
        elif policy.keeps_whole_prompt and not policy.evicts_late:
            leaving.append(states[-1])
        else:
            add_stream([states[-1]], cache)
    if keeping:
        add_stream([*leaving, keeping[0]], keeping[0].cache)
        for state in keeping[1:]:
            add_stream([state], state.cache)
    elif len(leaving) == 1:
        add_stream(leaving, leaving[0].cache)
    elif leaving:
        policy = leaving[0].policy
        cache = RowCache(policy.windows, ledger, devices, limits=policy.limits)
        add_stream(leaving, cache)
    return states, streams


def pieces(streams: Sequence[Stream], step: int, device: torch.device) -> list[Piece]:
    """What is read in step `step` of a prompt: the first chunk once for all that read the same."""
    alike: dict[int, list[Stream]] = {}
    for index, stream in enumerate(streams):
        alike.setdefault(index if step else -stream.chunks[0].patched, []).append(stream)
    result = []
    for members in alike.values():
        chunk = members[0].chunks[step]
        stop = chunk.start + chunk.tokens
        result.append(Piece(members, chunk, torch.arange(chunk.start, stop, device=device)))
    return result


def packs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces that go through the model together."""
    pack: list[Piece] = []
    for piece in pieces:
        if pack and sum(p.chunk.tokens for p in pack) + piece.chunk.tokens > PACKED_TOKENS:
            yield pack
            pack = []
        pack.append(piece)
    yield pack
