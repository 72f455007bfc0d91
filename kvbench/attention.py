"""Attention of new tokens to what one group of KV heads holds.

Every backend computes the same function; `reference` is slow, in float64 and there for tests.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

QUERY_BLOCK = 512  # queries that share one mask: bounds it to 512 x entries, whatever the chunk

Backend = Callable[..., Tensor]


def attend_sdpa(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    query_positions: Tensor,
    positions: Tensor,
    sliding: int | None,
) -> Tensor:
    """Causal attention of T new tokens to E entries, the T newest of which are their own.

    queries [K, G, T, D], keys [K, E, D], values [K, E, Dv] -> [K, G, T, Dv]. A single new token
    sees every entry, in whatever order they lie; several see the E - T earlier ones and, causally,
    their own, which lie last and in order. `query_positions` [T] and `positions` [K, E] are read
    only if a sliding window of the model's (`sliding` tokens) hides what is further back.
    """
    new, entries = queries.shape[2], keys.shape[1]
    if new == 1:
        mask = None
        if sliding is not None:
            mask = (positions > query_positions - sliding)[None, :, None, :]
        # The query group stands where the tokens would: each KV head is read once, not G times.
        return sdpa(
            queries[:, :, 0][None], keys[None], values[None], attn_mask=mask, scale=scaling
        )[0][:, :, None]

    k, v = keys[None], values[None]
    q = queries.flatten(0, 1)[None]
    if new == entries and (sliding is None or new <= sliding):
        out = sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out[0].unflatten(0, queries.shape[:2])

    past = entries - new
    order = torch.arange(entries, device=keys.device)
    parts = []
    for start in range(0, new, QUERY_BLOCK):
        stop = min(new, start + QUERY_BLOCK)
        visible = order[: past + stop] <= order[past + start : past + stop, None]
        if sliding is not None:
            near = positions[:, None, : past + stop] > query_positions[start:stop, None] - sliding
            visible = (visible & near).repeat_interleave(queries.shape[1], 0)[None]
        parts.append(
            sdpa(
                q[:, :, start:stop],
                k[:, :, : past + stop],
                v[:, :, : past + stop],
                attn_mask=visible,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)[0].unflatten(0, queries.shape[:2])


def attend_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    query_positions: Tensor,
    positions: Tensor,
    sliding: int | None,
) -> Tensor:
    """The same as `attend_sdpa`, by position and in float64."""
    logits = torch.einsum("kgtd,ked->kgte", queries.double(), keys.double()) * scaling
    hidden = positions[:, None, None, :] > query_positions[:, None]
    if sliding is not None:
        hidden = hidden | (positions[:, None, None, :] <= query_positions[:, None] - sliding)
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("kgte,ked->kgtd", weights, values.double()).to(queries.dtype)


BACKENDS: dict[str, Backend] = {"sdpa": attend_sdpa, "reference": attend_reference}


def observed_attention(
    queries: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    positions: Tensor,
    scaling: float,
) -> Tensor:
    """Attention that entries get from an observation window (SnapKV, 2404.14469).

    queries [K, G, W, D], keys [K, E, D] -> [K, E]: softmax in float32 over all resident entries,
    causal by position, summed over the W queries and averaged over the G of the query group. One
    KV head at a time, so that the memory is G x W x E whatever the model.
    """
    hidden = positions[:, None, :] > query_positions[:, None]
    result = torch.empty(positions.shape, dtype=torch.float32, device=keys.device)
    for head in range(len(keys)):
        logits = (queries[head].float() @ keys[head].float().T) * scaling
        weights = logits.masked_fill(hidden[head], -torch.inf).softmax(-1)
        result[head] = weights.sum(1).mean(0)
    return result
