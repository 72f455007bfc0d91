"""Evicts from rows while they decode: every `interval` tokens, a row's entries compete again."""

import time
from collections.abc import Sequence

from torch import Tensor, cat

from kvbench.engine.accounting import EntryBytes
from kvbench.engine.cache import HeadGroup
from kvbench.engine.contract import Asked, check_finite
from kvbench.engine.decoding import DecodeKV
from kvbench.engine.eviction import LayerChunk, LayerScores, choose
from kvbench.engine.policy import Chunk
from kvbench.engine.row import RowState
from kvbench.method import Entries
from kvbench.models.attention import LayerShape


def evict_due(
    kv: DecodeKV, batch: Sequence[RowState], places: Sequence[int], layers: Sequence[LayerShape]
) -> None:
    """Evict from the rows at `places` of the batch whose interval has ended."""
    due = [place for place in places if batch[place].evicts_now]
    finite: list[tuple[Asked, int, Tensor]] = []
    for place in due:
        state, started = batch[place], time.perf_counter()
        kv.update_lengths(place)
        with state.evicting():
            for layer in state.policy.acting:
                finite += evict_layer(kv, place, state, layer, layers[layer])
        state.decode_seconds += time.perf_counter() - started
    check_finite(finite)
    if due:
        kv.lengths_changed()


def evict_layer(
    kv: DecodeKV, place: int, state: RowState, layer: int, shape: LayerShape
) -> list[tuple[Asked, int, Tensor]]:
    """Evict from one layer of a row; returns what `check_finite` takes."""
    policy, groups = state.policy, state.cache.layers[layer]
    since = policy.interval
    read = policy.prompt + state.fed
    chunk = Chunk(read - since, since, 0, last=False, final=False, decoded=True)
    rules, module = kv.called[layer]
    entries = groups[0].entries()
    queries = entries.keys.new_empty((shape.query_heads, 0, entries.keys.shape[-1]))
    if policy.queries_needed:
        queries = latest_queries(kv, place, state, layer)
    none = Entries(
        *(t.new_empty((shape.kv_heads, 0, *t.shape[2:]), dtype=t.dtype) for t in entries)
    )
    here = LayerChunk(layer, chunk, none, None, queries, rules, module, shape.rotation)
    scores = LayerScores(groups, here, state.gathered_by_method(layer))
    if policy.gathers:
        state.keep_beside(layer, scores.gather(policy))
    if groups[0].length <= policy.held:
        return []
    chosen = choose(policy, scores)
    if policy.gathers:
        state.keep_beside(layer, scores.kept_of(policy, chosen))
    scores.release()
    for group, stay in zip(groups, chosen, strict=True):
        if stay is not None:
            compact(state, group, stay)
    kv.set_length(layer, place, groups[0].length)
    return scores.finite


def compact(state: RowState, group: HeadGroup, stay: Tensor) -> None:
    """Hold only the entries `stay` [Kg, c] of a group, and count the copies that are made."""
    before, size = group.length, EntryBytes.of(group.entries())
    group.compact(stay)
    state.accounting.copied(group.length * max(size))  # one KV head at a time, if it ran alone
    if not state.flat:
        state.accounting.evicted(len(group.heads), before, 0, group.length, size)


def latest_queries(kv: DecodeKV, place: int, state: RowState, layer: int) -> Tensor:
    """The queries [H, W, D] of a row's observation window, the prompt's last ones among them."""
    wanted = state.policy.queries_needed
    new = min(wanted, state.fed)
    queries = kv.recent.latest(layer, place, new)
    if new < wanted and layer in state.queries:
        queries = cat([state.queries[layer], queries], dim=1)
    return queries[:, -wanted:]
