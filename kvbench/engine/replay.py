"""Reads the prompt a second time over the held cache, to see which entries it needs (KVzip).

The rows of a replay are not rows of the text: they add nothing to the footprint. Their number is
recorded, and their entries count in the peak while they are held.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvbench.engine.attention import Backend, attend_groups, backend_of
from kvbench.engine.row import RowState
from kvbench.method import QUERY_BLOCK, Entries
from kvbench.models.attention import AttentionCall, LayerShape, Rules
from kvbench.models.load import LoadedModel, forward

REPLAY_CHUNK = 2048  # tokens that are read again at once
CUE = "\n\nThe same text once more:\n\n"  # precedes each chunk


def replay(model: LoadedModel, state: RowState, ids: Tensor) -> dict[int, Tensor]:
    """The largest attention that each entry gets while the prompt `ids` [n] is read again.

    Each chunk is read after a cue, at the positions after the prompt, over all entries that are
    held. Returns [K, E] by layer, of the layers that methods act on; the maximum is over queries
    and over the query heads of a group (Kim et al., arXiv 2505.23416).
    """
    policy = state.policy
    cue = [] if model.tokenizer is None else model.tokenizer.encode(CUE, add_special_tokens=False)
    kv = ReplayKV(state, backend_of(model.attention), model.layers)
    given = ids[: policy.evicted_from]
    for start in range(0, len(given), REPLAY_CHUNK):
        fed = torch.cat([ids.new_tensor(cue), given[start : start + REPLAY_CHUNK]])
        kv.positions = torch.arange(len(given), len(given) + len(fed), device=ids.device)
        forward(model, fed[None], kv.positions[None], kv)
        state.accounting.replayed(len(fed), kv.heads)
    return kv.largest


@dataclass
class ReplayKV:
    """A `KVAttention` for tokens that leave no entries; it notes who is attended to."""

    state: RowState
    backend: Backend
    layers: Sequence[LayerShape]
    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    largest: dict[int, Tensor] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """KV heads of all layers that hold entries."""
        return sum(x.kv_heads for index, x in enumerate(self.layers) if x.source == index)

    def attend(self, call: AttentionCall) -> Tensor:
        """B = 1: attend to what is held and, causally, to the tokens themselves."""
        source, cache = self.layers[call.layer].source, self.state.cache
        query, key, value = call.query[0], call.key[0], call.value[0]
        grouped = query.unflatten(0, (key.shape[0], -1))
        fed = Entries(key, value, self.positions.expand(key.shape[0], -1))
        if source in self.state.policy.acting:
            parts = []
            for group in cache.layers[source]:
                held, mine = group.resident(), group.select(fed)
                assert held is not None
                parts.append(largest_attention(group.of(grouped), held.keys, mine.keys, call.rules))
            noted = cache.joined(source, parts)
            before = self.largest.get(source)
            self.largest[source] = noted if before is None else torch.maximum(before, noted)
        out = attend_groups(cache, source, grouped, fed, call.rules, self.backend)
        return out.flatten(0, 1)[None]


def largest_attention(queries: Tensor, keys: Tensor, own: Tensor, rules: Rules) -> Tensor:
    """[K, E], the largest attention of queries [K, G, T, D] to each of the keys [K, E, D].

    The softmax also goes over the tokens' keys `own` [K, T, D], causally. It holds one KV head's
    G x 512 x (E + T) floats at most.
    """
    rows = []
    entries, tokens = keys.shape[1], own.shape[1]
    order = torch.arange(tokens, device=keys.device)
    for query, held, mine in zip(queries, keys, own, strict=True):
        best = torch.zeros(entries, device=keys.device)
        both = torch.cat([held, mine]).float()
        for start in range(0, tokens, QUERY_BLOCK):
            asking = query[:, start : start + QUERY_BLOCK].float()
            logits = asking @ both.T * rules.scaling
            if rules.softcap is not None:
                logits = rules.softcap * (logits / rules.softcap).tanh()
            later = order > order[start : start + QUERY_BLOCK, None]
            logits[..., entries:].masked_fill_(later, -torch.inf)
            weights = logits.softmax(-1)[..., :entries]
            best = torch.maximum(best, weights.amax((0, 1)))
        rows.append(best)
    return torch.stack(rows)
