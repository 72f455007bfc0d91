"""Attention for learning head scores: full and streaming attention mixed by a gate per KV head.

It reaches the model as evaluation's does: `model(..., kv=GatedAttention(...))` hands it to the
attention function that `kvbench.models.attention` registers, so any architecture is trained
untouched.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvbench.errors import InputError
from kvbench.models.attention import AttentionCall

QUERY_BLOCK = 256  # queries that share one mask; bounds it to 256 x (sinks + window + 256)


class GatedAttention:
    """`gate * full + (1 - gate) * streaming` for every KV head (DuoAttention, 2410.10819, eq. 1).

    `gates` is [layers, B, K], B the batch's rows or 1 for all of them; None is full attention.
    A streaming head sees `sinks` entries, the `window` before a token, and the token itself: what
    evaluation leaves resident at one token a chunk.
    """

    def __init__(self, gates: Tensor | None, sinks: int, window: int) -> None:
        self.gates, self.sinks, self.window = gates, sinks, window

    def attend(self, call: AttentionCall) -> Tensor:
        """The attention output [B, H, T, Dv] of one layer."""
        query, key, value = call.query, call.key, call.value
        scaling, sliding = call.rules.scaling, call.rules.sliding
        if not call.rules.softmax_only or (call.rules.limit and sliding is None):
            raise InputError(
                "head scores cannot be learnt for a model with soft-capped logits, learnt sinks or "
                "chunked attention"
            )
        full = full_attention(query, key, value, scaling, sliding)
        if self.gates is None:
            return full
        streamed = streaming_attention(query, key, value, scaling, self.sinks, self.window, sliding)
        gate = self.gates[call.layer].to(full.dtype)
        gate = gate.repeat_interleave(query.shape[1] // key.shape[1], dim=-1)[:, :, None, None]
        return gate * full + (1 - gate) * streamed


def full_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, sliding: int | None
) -> Tensor:
    """Causal attention, within the model's own sliding window where a layer has one."""
    if sliding is None or sliding >= query.shape[2]:
        return sdpa(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return streaming_attention(query, key, value, scaling, 0, sliding - 1, None)


def streaming_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sinks: int,
    window: int,
    sliding: int | None,
) -> Tensor:
    """Attention to `sinks` first entries, the `window` before a token, and itself.

    T x (sinks + window) work and no T x T mask: FlexAttention on CUDA, blocks of queries elsewhere.
    """
    if query.shape[2] <= sinks + window + 1:
        return full_attention(query, key, value, scaling, sliding)
    if query.is_cuda:
        return streaming_flex(query, key, value, scaling, sinks, window, sliding)
    return streaming_blocks(query, key, value, scaling, sinks, window, sliding)


def streaming_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sinks: int,
    window: int,
    sliding: int | None,
) -> Tensor:
    """Streaming attention by blocks of queries, each against the entries that any of them sees."""
    length = query.shape[2]
    order = torch.arange(length, device=query.device)
    parts = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(length, start + QUERY_BLOCK)
        first = max(sinks, start - window)
        seen = torch.cat([order[: min(sinks, stop)], order[first:stop]])
        k = torch.cat([key[:, :, :sinks], key[:, :, first:stop]], 2)[:, :, : len(seen)]
        v = torch.cat([value[:, :, :sinks], value[:, :, first:stop]], 2)[:, :, : len(seen)]
        mask = visible(order[start:stop, None], seen, sinks, window, sliding)
        q = query[:, :, start:stop]
        parts.append(sdpa(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True))
    return torch.cat(parts, dim=2)


def streaming_flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sinks: int,
    window: int,
    sliding: int | None,
) -> Tensor:
    """Streaming attention by FlexAttention, which skips the blocks that no query sees."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = block_mask(query.shape[2], sinks, window, sliding, str(query.device))
    kernel = compiled_flex() if query.is_cuda else flex_attention
    out: Tensor = kernel(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return out


@lru_cache(maxsize=1)
def compiled_flex() -> Any:
    """FlexAttention, fused; uncompiled it would hold the T x T logits."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def block_mask(length: int, sinks: int, window: int, sliding: int | None, device: str) -> Any:
    """Which blocks of a T x T attention are seen, and the rule inside those seen in part."""
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(batch: Tensor, head: Tensor, query: Tensor, entry: Tensor) -> Tensor:
        return visible(query, entry, sinks, window, sliding)

    return create_block_mask(rule, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)


def visible(query: Tensor, entry: Tensor, sinks: int, window: int, sliding: int | None) -> Tensor:
    """Whether the token at position `query` sees the entry at position `entry`."""
    seen = (entry <= query) & ((entry < sinks) | (entry >= query - window))
    return seen if sliding is None else seen & (entry > query - sliding)
