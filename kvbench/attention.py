"""Attention of a layer: of a prefill chunk to what is resident and to itself, and of single tokens.

A backend computes both; all backends compute the same. `Reference` is slow, in float64 and there
for tests.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvbench.compiled import token_kernel
from kvbench.method import Entries

QUERY_BLOCK = 512  # queries that share one mask: bounds it to 512 x entries, whatever the chunk


class Backend(Protocol):
    """What computes attention."""

    def chunk(
        self,
        queries: Tensor,
        past: Entries | None,
        own: Entries,
        *,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """T new tokens attend to `past`, E resident entries, and causally to themselves.

        queries [K, G, T, D], past [K, E, ...], own [K, T, ...] -> [K, G, T, Dv]. Past entries lie
        in any order; positions are read only if a sliding window of the model's (`sliding` tokens)
        hides what is further back.
        """
        ...

    def token(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        lengths: Tensor,
        seen: int,
        mask: Tensor | None,
        sliding: int | None,
    ) -> Tensor:
        """One token of each of U sequences, a KV head of a row each, attends to all it holds.

        queries [U, G, D], keys [U, S, D], values [U, S, Dv] -> [U, G, Dv]. Of sequence u the first
        `lengths[u]` entries count, at most `seen`. `mask` [U, seen] is added to the logits: -inf
        hides an entry, as it does all beyond the length and all that is outside `sliding`, a window
        of the model's in tokens. Without a mask, the first `seen` entries all count.
        """
        ...


class Sdpa:
    """PyTorch's scaled dot product attention."""

    def chunk(
        self,
        queries: Tensor,
        past: Entries | None,
        own: Entries,
        *,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """As `Backend.chunk`."""
        new = queries.shape[2]
        q = queries.flatten(0, 1)[None]
        if past is None and (sliding is None or new <= sliding):
            k, v = own.keys[None], own.values[None]
            out = sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            return out[0].unflatten(0, queries.shape[:2])
        same_size = own.keys.shape[-1] == own.values.shape[-1]
        if past is None or sliding is not None or not same_size or queries.device.type != "cpu":
            return masked_chunk(queries, past, own, scaling=scaling, sliding=sliding)
        return merged(
            _partial_cpu(q, own, scaling, causal=True),
            _partial_cpu(q, past, scaling, causal=False),
        ).unflatten(0, queries.shape[:2])

    def token(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        lengths: Tensor,
        seen: int,
        mask: Tensor | None,
        sliding: int | None,
    ) -> Tensor:
        """As `Backend.token`; the query group stands where tokens would, so keys are read once."""
        plain = queries.device.type == "cpu" and queries.dtype == torch.float32
        whole = keys.is_contiguous() and values.is_contiguous()
        if plain and whole and sliding is None and (kernel := token_kernel()) is not None:
            return kernel(queries, keys, values, lengths, seen, scaling)
        keys, values = keys[:, :seen], values[:, :seen]
        if plain:
            logits = torch.bmm(queries * scaling, keys.transpose(1, 2))
            if mask is not None:
                logits += mask[:, None]
            return torch.bmm(logits.softmax(-1), values)
        bias = None if mask is None else mask[:, None]
        return sdpa(queries, keys, values, attn_mask=bias, scale=scaling)


def _partial_cpu(q: Tensor, of: Entries, scaling: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [H, T, D] to some of the entries, and the logarithm [H, T] of its normaliser."""
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, of.keys[None], of.values[None], 0.0, causal, scale=scaling
    )
    return out[0], total[0]


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to two sets of entries together, from that to each and its log normaliser."""
    (a, log_a), (b, log_b) = first, second
    share = torch.sigmoid(log_b - log_a)[..., None].to(a.dtype)
    return torch.lerp(a, b, share)


def masked_chunk(
    queries: Tensor, past: Entries | None, own: Entries, *, scaling: float, sliding: int | None
) -> Tensor:
    """As `Backend.chunk`, past and own entries put side by side under an explicit mask."""
    groups, new = queries.shape[1:3]
    keys, values, positions = side_by_side(past, own)
    before = keys.shape[1] - new
    order = torch.arange(keys.shape[1], device=keys.device)
    q = queries.flatten(0, 1)[None]
    parts = []
    for start in range(0, new, QUERY_BLOCK):
        stop = min(new, start + QUERY_BLOCK)
        seen = before + stop
        visible = order[:seen] <= order[before + start : seen, None]
        if sliding is not None:
            here = own.positions[:, start:stop, None]
            near = positions[:, None, :seen] > here - sliding
            visible = (visible & near).repeat_interleave(groups, 0)[None]
        k, v = keys[None, :, :seen], values[None, :, :seen]
        parts.append(
            sdpa(q[:, :, start:stop], k, v, attn_mask=visible, scale=scaling, enable_gqa=True)
        )
    return torch.cat(parts, dim=2)[0].unflatten(0, queries.shape[:2])


def side_by_side(past: Entries | None, own: Entries) -> Entries:
    """Past and own entries as one, a copy."""
    if past is None:
        return own
    return Entries(*(torch.cat(pair, 1) for pair in zip(past, own, strict=True)))


class Reference:
    """Attention by position, in float64."""

    def chunk(
        self,
        queries: Tensor,
        past: Entries | None,
        own: Entries,
        *,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """As `Backend.chunk`."""
        keys, values, positions = side_by_side(past, own)
        distance = own.positions[:, None, :, None] - positions[:, None, None, :]
        hidden = distance < 0
        if sliding is not None:
            hidden = hidden | (distance >= sliding)
        return self._attend("kgtd,ked->kgte", queries, keys, values, scaling, hidden)

    def token(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        lengths: Tensor,
        seen: int,
        mask: Tensor | None,
        sliding: int | None,
    ) -> Tensor:
        """As `Backend.token`."""
        keys, values = keys[:, :seen], values[:, :seen]
        order = torch.arange(seen, device=keys.device)
        unseen = order >= lengths[:, None]
        if mask is not None:
            unseen = unseen | mask.isneginf()
        unseen = unseen[:, None]
        return self._attend("ugd,usd->ugs", queries, keys, values, scaling, unseen)

    def _attend(
        self, spec: str, q: Tensor, k: Tensor, v: Tensor, scaling: float, hidden: Tensor
    ) -> Tensor:
        logits = torch.einsum(spec, q.double(), k.double()) * scaling
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        a, b = spec.split("->")[0].split(",")
        back = f"{spec.split('->')[1]},{b}->{a}"
        return torch.einsum(back, weights, v.double()).to(q.dtype)


BACKENDS: dict[str, Backend] = {"sdpa": Sdpa(), "reference": Reference()}


def observed_attention(
    queries: Tensor, blocks: Sequence[Sequence[Entries]], query_positions: Tensor, scaling: float
) -> Tensor:
    """Attention that entries get from an observation window (SnapKV, 2404.14469).

    queries [K, G, W, D] and `blocks` as in a LayerView -> [K, E]: softmax in float32 over all
    resident entries, causal by position, summed over the W queries and averaged over the G of the
    query group. One KV head at a time, so that the memory is G x W x E whatever the model.
    """
    rows: list[Tensor] = []
    for block in blocks:
        for index in range(len(block[0].keys)):
            query = queries[len(rows)].float()
            logits = torch.cat([query @ piece.keys[index].float().T for piece in block], -1)
            positions = torch.cat([piece.positions[index] for piece in block])
            logits = (logits * scaling).masked_fill_(
                positions > query_positions[:, None], -torch.inf
            )
            rows.append(logits.softmax(-1).sum(1).mean(0))
    return torch.stack(rows)
