"""Attention for learning head scores: full and streaming attention mixed by a gate per KV head.

It reaches the model as the KV cache of an evaluation does: `model(..., kv=GatedAttention(...))`
passes it to the attention function of `kvbench.models.attention`, so models need no change.

Shapes: query [B, H, T, D], key [B, K, T, D], value [B, K, T, Dv], output [B, H, T, Dv].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvbench.errors import InputError
from kvbench.models.attention import AttentionCall

QUERY_BLOCK = 256  # queries that share one mask of at most 256 x (sinks + window + chunk + 256)


@dataclass(frozen=True)
class Stream:
    """What a token sees in streaming attention.

    It sees the sinks, its own prefill chunk up to itself, and the window before that chunk.
    `sliding` is the sliding window of the model's own layer, in tokens, the token itself included.
    """

    sinks: int
    window: int
    sliding: int | None = None
    chunk: int = 1  # tokens of a prefill chunk

    def sees(self, query: Tensor, entry: Tensor) -> Tensor:
        """Whether the token at position `query` sees the entry at position `entry`."""
        first = query // self.chunk * self.chunk
        seen = (entry <= query) & ((entry < self.sinks) | (entry >= first - self.window))
        return seen if self.sliding is None else seen & (entry > query - self.sliding)


class GatedAttention:
    """`gate * full + (1 - gate) * streaming` for every KV head (DuoAttention, 2410.10819, eq. 1).

    `gates` is [layers, B, K], or [layers, 1, K] for the same gates in all rows; None is full
    attention. A streaming head sees what evaluation leaves resident at a prefill chunk of `chunk`
    tokens.
    Only the layers `acting` have gates (None: all layers); methods leave the others as they are.
    With `fixed`, no gradient is wanted for gates that are exactly 0 or 1, as sampled masks have
    none there. Then a head whose gate is 0 or 1 costs one attention instead of two on a CPU.
    """

    def __init__(
        self,
        gates: Tensor | None,
        sinks: int,
        window: int,
        acting: Sequence[int] | None = None,
        chunk: int = 1,
        fixed: bool = False,
    ) -> None:
        self.gates, self.sinks, self.window, self.acting = gates, sinks, window, acting
        self.chunk, self.fixed = chunk, fixed

    def attend(self, call: AttentionCall) -> Tensor:
        """The mixed attention of one layer."""
        query, key, value = call.query, call.key, call.value
        scaling, sliding = call.rules.scaling, call.rules.sliding
        if not call.rules.softmax_only or (call.rules.limit and sliding is None):
            raise InputError(
                "head scores cannot be learnt for a model with soft-capped logits, learnt sinks or "
                "chunked attention"
            )
        if self.gates is None or (self.acting is not None and call.layer not in self.acting):
            return full_attention(query, key, value, scaling, sliding)
        stream = Stream(self.sinks, self.window, sliding, self.chunk)
        if sliding is not None and sliding < query.shape[2]:  # sinks leave the model's own window
            stream = Stream(0, min(self.sinks + self.window, sliding - 1), sliding, self.chunk)
        gate = self.gates[call.layer].to(query)
        if self.fixed and not query.is_cuda:
            return sparsely_mixed(query, key, value, scaling, stream, gate)
        full = full_attention(query, key, value, scaling, sliding)
        streamed = streaming_attention(query, key, value, scaling, stream)
        gate = gate.repeat_interleave(query.shape[1] // key.shape[1], dim=-1)[:, :, None, None]
        return gate * full + (1 - gate) * streamed


def sparsely_mixed(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, stream: Stream, gate: Tensor
) -> Tensor:
    """Full and streaming attention mixed by `gate` [B or 1, K], each where it has a weight.

    The KV heads of all rows become rows of one KV head, and those with a weight are taken.
    """
    batch, heads = key.shape[:2]
    gate = gate.expand(batch, heads).flatten()
    group = query.unflatten(1, (heads, -1)).flatten(0, 1)
    entries = key.flatten(0, 1)[:, None], value.flatten(0, 1)[:, None]
    out = group.new_zeros((*group.shape[:3], value.shape[3]))
    for weight, streams in ((gate, False), (1 - gate, True)):
        rows = weight.nonzero()[:, 0]
        if len(rows):
            some = group[rows], entries[0][rows], entries[1][rows], scaling
            if streams:
                part = streaming_attention(*some, stream)
            else:
                part = full_attention(*some, stream.sliding)
            out = out.index_add(0, rows, weight[rows, None, None, None] * part)
    return out.unflatten(0, (batch, heads)).flatten(1, 2)


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding: int | None
) -> Tensor:
    """Causal attention, within the layer's own sliding window if it has one."""
    if sliding is None or sliding >= query.shape[2]:
        return sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return streaming_attention(query, key, value, scaling, Stream(0, sliding - 1))


def streaming_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, stream: Stream
) -> Tensor:
    """Attention to the entries of a stream: T x (sinks + window) work, no T x T mask.

    Computed by FlexAttention on CUDA, and by blocks of queries elsewhere.
    """
    if query.shape[2] <= stream.sinks + stream.window + 1:
        return full_attention(query, key, value, scaling, stream.sliding)
    attend = streaming_flex if query.is_cuda else streaming_blocks
    return attend(query, key, value, scaling, stream)


def streaming_blocks(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, stream: Stream
) -> Tensor:
    """Streaming attention by blocks of queries, each against the entries that any of them sees."""
    length, sinks = query.shape[2], stream.sinks
    order = torch.arange(length, device=query.device)
    seen, masks = [], []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(length, start + QUERY_BLOCK)
        first = start // stream.chunk * stream.chunk - stream.window
        seen.append(torch.cat([order[: min(sinks, stop)], order[max(sinks, first) : stop]]))
        masks.append(stream.sees(order[start:stop, None], seen[-1]))
    # All entries are taken at once: each selection on its own would have a gradient of full length.
    taken, sizes = torch.cat(seen), [len(each) for each in seen]
    keys, values = (each.index_select(2, taken).split(sizes, dim=2) for each in (key, value))
    parts = [
        sdpa(some, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        for some, k, v, mask in zip(query.split(QUERY_BLOCK, 2), keys, values, masks, strict=True)
    ]
    return torch.cat(parts, dim=2)


def streaming_flex(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, stream: Stream
) -> Tensor:
    """Streaming attention by FlexAttention, which skips the blocks that no query sees."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(query.shape[2], stream, str(query.device))
    kernel = compiled_flex() if query.is_cuda else flex_attention
    out: Tensor = kernel(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """FlexAttention, fused; uncompiled it would hold the T x T logits."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def block_mask(length: int, stream: Stream, device: str) -> Any:
    """FlexAttention's mask: the blocks that are seen, and `sees` inside blocks seen in part."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(batch: Tensor, head: Tensor, query: Tensor, entry: Tensor) -> Tensor:
        return stream.sees(query, entry)

    return create_block_mask(rule, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)
