"""Reads the prompt a second time over the held cache, to see which entries it needs (KVzip).

The tokens of a replay are not rows of the text: they add nothing to the footprint. Their number is
recorded, and their entries count in the peak while they are held.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.engine.accounting import EntryBytes
from kvbench.engine.attention import Backend, attend_groups, backend_of
from kvbench.engine.cache import HeadGroup
from kvbench.engine.row import RowState
from kvbench.method import QUERY_BLOCK, Entries
from kvbench.models.attention import AttentionCall, LayerShape, Rules
from kvbench.models.load import LoadedModel, forward

REPLAY_CHUNK = 2048  # tokens that are read again at once
CUE = "\n\nThe same text once more:\n\n"  # precedes each chunk
SINKS = 4  # first entries of the text, which take part in the softmax of every chunk


def replay(model: LoadedModel, state: RowState, ids: Tensor) -> dict[int, Tensor]:
    """The most attention that each entry gets while its part of the prompt `ids` [n] is read again.

    Each chunk is read after a cue, at the positions after the prompt, and attends to all entries
    that are held. Its own entries, those that it was read into at first, get their scores from it:
    the maximum over the chunk's queries and the query heads of a group, of a softmax over the first
    entries of the text, these entries, and the cue and chunk themselves (Kim et al., arXiv
    2505.23416). Returns [K, n] by layer, of the KV heads that are scored, in the order of a view.
    """
    given = ids[: state.policy.evicted_from]
    cue = [] if model.tokenizer is None else model.tokenizer.encode(CUE, add_special_tokens=False)
    kv = ReplayKV(state, backend_of(model.attention), model.layers)
    parts: dict[int, list[Tensor]] = {}
    for start in range(0, len(given), REPLAY_CHUNK):
        chunk = given[start : start + REPLAY_CHUNK]
        fed = torch.cat([ids.new_tensor(cue), chunk])
        kv.positions = torch.arange(len(given), len(given) + len(fed), device=ids.device)
        kv.scored, kv.largest = slice(start, start + len(chunk)), {}
        forward(model, fed[None], kv.positions[None], kv)
        state.accounting.replayed(len(fed), kv.sizes)
        for layer, largest in kv.largest.items():
            parts.setdefault(layer, []).append(largest)
    return {layer: torch.cat(chunks, dim=1) for layer, chunks in parts.items()}


@dataclass
class ReplayKV:
    """A `KVAttention` for tokens that leave no entries; it notes who is attended to."""

    state: RowState
    backend: Backend
    layers: Sequence[LayerShape]
    positions: Tensor = field(default_factory=lambda: torch.empty(0))  # of the tokens that are fed
    scored: slice = field(default_factory=lambda: slice(0))  # the entries that they score
    largest: dict[int, Tensor] = field(default_factory=dict)  # by layer, [K, chunk]

    @property
    def sizes(self) -> list[tuple[int, EntryBytes]]:
        """The KV heads of each layer that holds entries, and the bytes of an entry."""
        own = (groups for groups in self.state.cache.layers if groups)
        return [
            (sum(len(group.heads) for group in groups), EntryBytes.of(groups[0].entries()))
            for groups in own
        ]

    def attend(self, call: AttentionCall) -> Tensor:
        """B = 1: attend to what is held and, causally, to the tokens themselves."""
        source, state = self.layers[call.layer].source, self.state
        query, key, value = call.query[0], call.key[0], call.value[0]
        grouped = query.unflatten(0, (key.shape[0], -1))
        positions = self.positions.to(key.device)
        fed = Entries(key, value, positions.expand(key.shape[0], -1))
        groups = state.cache.layers[source]
        scored = [group for group in groups if state.policy.scores(source, group)]
        if scored:
            parts = [self.noted(group, grouped, fed, call.rules) for group in scored]
            largest, before = torch.cat(parts), self.largest.get(source)
            self.largest[source] = largest if before is None else torch.maximum(before, largest)
        out = attend_groups(state.cache, source, grouped, fed, call.rules, self.backend)
        return out.flatten(0, 1)[None]

    def noted(self, group: HeadGroup, queries: Tensor, fed: Entries, rules: Rules) -> Tensor:
        """[Kg, chunk], the largest attention to the scored entries of a group."""
        held = group.resident()
        assert held is not None
        sinks = held.keys[:, : min(SINKS, self.scored.start)]
        keys = torch.cat([sinks, held.keys[:, self.scored], group.select(fed).keys], dim=1)
        first = sinks.shape[1]
        stop = first + self.scored.stop - self.scored.start
        return largest_attention(group.of(queries), keys, rules)[:, first:stop]


def largest_attention(queries: Tensor, keys: Tensor, rules: Rules) -> Tensor:
    """[K, E], the largest attention of queries [K, G, T, D] to each of the keys [K, E, D].

    The last T keys are those of the queries' tokens, which see earlier ones only. It holds one KV
    head's G x 512 x E floats at most.
    """
    order = torch.arange(keys.shape[1], device=keys.device)
    own = order[len(order) - queries.shape[2] :]
    rows = []
    for query, key in zip(queries.float(), keys.float(), strict=True):
        best = torch.zeros(len(key), device=key.device)
        for asking, place in zip(query.split(QUERY_BLOCK, 1), own.split(QUERY_BLOCK), strict=True):
            logits = asking @ key.T * rules.scaling
            if rules.softcap is not None:
                logits = rules.softcap * (logits / rules.softcap).tanh()
            logits = logits.masked_fill(order > place[:, None], -torch.inf)
            best = torch.maximum(best, logits.softmax(-1).amax((0, 1)))
        rows.append(best)
    return torch.stack(rows)
