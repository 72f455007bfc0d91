"""Attention backends: a chunk attends to what is resident and to itself; single tokens to both.

All backends compute the same. `Float64` is slow and meant for tests.
"""

import sys
from dataclasses import replace
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvbench.engine.cache import RowCache
from kvbench.engine.kernels import cpu
from kvbench.engine.kernels.flash_attn import flash_attn_partial
from kvbench.engine.kernels.interface import Partial, TokenKernel
from kvbench.engine.pages import PageBounds
from kvbench.errors import InputError, did_you_mean
from kvbench.method import Entries
from kvbench.models.attention import Rules

# cuDNN's attention is used from this number of (query, key) pairs, over all query heads. It then
# saves the 40 to 60 ms that it takes to plan for each new length (measured on an H100, see
# results/benchmarks). A chunk has one length in all layers; resident entries may have many.
WORTH_CUDNN = {"own": 2**31, "past": 2**34}
QUERY_BLOCK = 512  # queries that share one mask, so that a mask has at most 512 x entries cells


class Backend(Protocol):
    """Computes attention."""

    def chunk(self, queries: Tensor, past: Entries | None, own: Entries, rules: Rules) -> Tensor:
        """T new tokens attend to the E resident entries of `past`, and causally to themselves.

        queries [K, G, T, D], past [K, E, ...], own [K, T, ...]; returns [K, G, T, Dv]. Past entries
        are in any order. Positions are used only where `rules` hide entries.
        """
        ...

    def token_kernel(self, entries: Entries) -> TokenKernel | None:
        """A kernel for single tokens of many sequences with entries of this dtype and size.

        None if there is none; then a single token is a chunk of length 1.
        """
        ...


def attend_groups(
    cache: RowCache, layer: int, queries: Tensor, new: Entries, rules: Rules, backend: Backend
) -> Tensor:
    """A chunk attends to what each KV head of a row's layer holds, and to itself.

    queries [K, G, T, D] and new [K, T, ...] of one row; returns [K, G, T, Dv].
    """
    parts = []
    for group in cache.layers[layer]:
        here = rules if rules.sinks is None else replace(rules, sinks=group.of(rules.sinks))
        mine, held, own = group.of(queries), group.resident(), group.select(new)
        if group.bounds is not None and held is not None:
            parts.append(paged_attention(group.bounds, mine, held, own, here, backend))
        else:
            parts.append(backend.chunk(mine, held, own, here))
    return cache.joined(layer, parts)


def paged_attention(
    bounds: PageBounds, queries: Tensor, held: Entries, own: Entries, rules: Rules, backend: Backend
) -> Tensor:
    """A token attends to its best pages of `held` and to itself; the pages' entries are gathered.

    queries [Kg, G, 1, D], held [Kg, E, ...], own [Kg, 1, ...]; returns [Kg, G, 1, Dv]. KV heads may
    read different numbers of entries, because the last page may hold fewer than the others.
    """
    parts = []
    for head, order in enumerate(bounds.best(queries[:, :, 0], held.positions.shape[1])):
        here = slice(head, head + 1)
        read = Entries(*(tensor[here, order] for tensor in held))
        mine = Entries(*(tensor[here] for tensor in own))
        sinks = None if rules.sinks is None else rules.sinks[here]
        parts.append(backend.chunk(queries[here], read, mine, replace(rules, sinks=sinks)))
        bounds.reads[head] += len(order)
    return torch.cat(parts)


class Sdpa:
    """PyTorch's scaled dot product attention, or `on_gpu` for half precision on a GPU.

    If the kernel also returns the normaliser, past and own entries are attended to separately and
    the results are merged, so that the entries need not be joined.
    """

    def __init__(self, on_gpu: Partial | None = None) -> None:
        self.on_gpu = on_gpu

    def chunk(self, queries: Tensor, past: Entries | None, own: Entries, rules: Rules) -> Tensor:
        """As `Backend.chunk`."""
        shape, scaling = queries.shape[:2], rules.scaling
        partial = self._partial(queries, own.values)
        if rules.softcap is not None or rules.limit is not None:
            return masked_chunk(queries, past, own, rules)
        q = queries.flatten(0, 1)[None]
        if past is None and partial is None and rules.sinks is None:
            k, v = own.keys[None], own.values[None]
            out = sdpa(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            return out[0].unflatten(0, shape)
        if partial is None:
            return masked_chunk(queries, past, own, rules)
        out, total = partial(q, own, scaling, True)
        if past is not None:
            earlier = partial(q, past, scaling, False)
            out = merged((out, total), earlier)
            if rules.sinks is not None:
                total = torch.logaddexp(total, earlier[1])
        if rules.sinks is not None:
            share = torch.sigmoid(total - rules.sinks.flatten()[:, None].to(total.dtype))
            out = out * share[..., None].to(out.dtype)
        return out.unflatten(0, shape)

    def _partial(self, queries: Tensor, values: Tensor) -> Partial | None:
        """The kernel that attends to part of the entries; None without one for such tensors."""
        size = queries.shape[-1]
        if values.shape[-1] != size:
            return None
        if queries.device.type == "cpu":
            return cpu_partial
        half = queries.dtype in (torch.float16, torch.bfloat16)
        ampere = torch.cuda.get_device_capability(queries.device) >= (8, 0)
        fits = half and ampere and not size % 8 and size <= 256
        return (self.on_gpu or cuda_partial) if fits else None

    def token_kernel(self, entries: Entries) -> TokenKernel | None:
        """As `Backend.token_kernel`."""
        keys, values = entries.keys, entries.values
        if keys.device.type != "cpu":
            return gpu_token_kernel()
        if keys.dtype != torch.float32:
            return None
        return cpu.token_kernel(keys.shape[-1], values.shape[-1])


@cache
def gpu_token_kernel() -> TokenKernel | None:
    """The kernel for single tokens on a GPU; None without Triton."""
    try:
        from kvbench.engine.kernels import gpu
    except ImportError:
        return None
    return gpu.token_kernel


def cpu_partial(q: Tensor, of: Entries, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """PyTorch's flash attention on a CPU; a `Partial`."""
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, of.keys[None], of.values[None], 0.0, causal, scale=scaling
    )
    return out[0], total[0]


def cuda_partial(q: Tensor, of: Entries, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention on a GPU in half precision, by PyTorch or cuDNN; a `Partial`.

    cuDNN is faster where PyTorch would choose it, but plans again for every new length.
    """
    k, v = of.keys[None], of.values[None]
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scaling, enable_gqa=True)
    pairs = q.shape[1] * q.shape[2] * k.shape[2]
    worth = pairs >= WORTH_CUDNN["own" if causal else "past"]
    if worth and choice == SDPBackend.CUDNN_ATTENTION.value:
        out, total, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scaling
        )
        return out[0], total[0, ..., 0]
    out, total, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q, k, v, 0.0, causal, False, scale=scaling
    )
    return out[0], total[0]


def merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention to two sets of entries, from the attention to each and its log normaliser."""
    (a, log_a), (b, log_b) = first, second
    share = torch.sigmoid(log_b - log_a)[..., None].to(a.dtype)
    return torch.lerp(a, b, share)


def masked_chunk(queries: Tensor, past: Entries | None, own: Entries, rules: Rules) -> Tensor:
    """As `Backend.chunk`, over past and own entries joined, with an explicit mask."""
    new, limit = queries.shape[2], rules.limit
    before = 0 if past is None else past.keys.shape[1]
    whole = side_by_side(past, own)
    parts = []
    for start in range(0, new, QUERY_BLOCK):
        stop = min(new, start + QUERY_BLOCK)
        # own entries that no query of the block sees are left out
        first = 0 if limit is None else max(0, start + 1 - limit.size)
        seen = Entries(*(tensor[:, : before + stop] for tensor in whole))
        if first:
            seen = side_by_side(past, Entries(*(tensor[:, first:stop] for tensor in own)))
        # past entries, and then own ones, by their place in the chunk
        order = torch.arange(first - before, stop, device=queries.device)
        asking = torch.arange(start, stop, device=queries.device)[:, None]
        visible = (order < first) | (order <= asking)
        if limit is not None:
            here = own.positions[:, start:stop, None]
            visible = visible & ~limit.hides(here, seen.positions[:, None])
        attend = softmax_attention if rules.softmax_only else capped_attention
        parts.append(attend(queries[:, :, start:stop], seen, visible, rules))
    return torch.cat(parts, dim=2)


def softmax_attention(queries: Tensor, of: Entries, visible: Tensor, rules: Rules) -> Tensor:
    """Attention [K, G, T, Dv] to the entries that are `visible` ([T, E] or [K, T, E])."""
    groups = queries.shape[1]
    mask = visible if visible.dim() == 2 else visible.repeat_interleave(groups, 0)[None]
    q, k, v = queries.flatten(0, 1)[None], of.keys[None], of.values[None]
    out = sdpa(q, k, v, attn_mask=mask, scale=rules.scaling, enable_gqa=True)
    return out[0].unflatten(0, queries.shape[:2])


def capped_attention(queries: Tensor, of: Entries, visible: Tensor, rules: Rules) -> Tensor:
    """As `softmax_attention`, with capped logits or learnt sinks; softmax in float32.

    It holds K x G x T x E logits.
    """
    logits = queries @ of.keys[:, None].transpose(2, 3) * rules.scaling
    if rules.softcap is not None:
        logits = rules.softcap * torch.tanh(logits / rules.softcap)
    hidden = ~visible if visible.dim() == 2 else ~visible[:, None]
    logits = logits.masked_fill(hidden, -torch.inf)
    if rules.sinks is None:
        weights = logits.float().softmax(-1)
    else:
        sinks = rules.sinks[..., None, None].to(logits.dtype).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits, sinks], -1).float().softmax(-1)[..., :-1]
    return weights.to(queries.dtype) @ of.values[:, None]


def side_by_side(past: Entries | None, own: Entries) -> Entries:
    """Past and own entries joined, a copy."""
    if past is None:
        return own
    return Entries(*(torch.cat(pair, 1) for pair in zip(past, own, strict=True)))


class Float64:
    """Attention by position, in float64."""

    def chunk(self, queries: Tensor, past: Entries | None, own: Entries, rules: Rules) -> Tensor:
        """As `Backend.chunk`."""
        keys, values, positions = side_by_side(past, own)
        here, there = own.positions[:, None, :, None], positions[:, None, None, :]
        hidden = there > here
        if rules.limit is not None:
            hidden = hidden | rules.limit.hides(here, there)
        logits = torch.einsum("kgtd,ked->kgte", queries.double(), keys.double()) * rules.scaling
        if rules.softcap is not None:
            logits = rules.softcap * torch.tanh(logits / rules.softcap)
        logits = logits.masked_fill(hidden, -torch.inf)
        if rules.sinks is not None:
            sinks = rules.sinks.double()[..., None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], -1)
        weights = logits.softmax(-1)[..., : keys.shape[1]]
        return torch.einsum("kgte,ked->kgtd", weights, values.double()).to(queries.dtype)

    def token_kernel(self, entries: Entries) -> TokenKernel | None:
        """None."""
        return None


BACKENDS: dict[str, Backend] = {"sdpa": Sdpa(), "reference": Float64()}


def backend_of(attention: str) -> Backend:
    """The backend for a `LoadedModel.attention`."""
    return Sdpa(flash_attn_partial()) if attention == "flash" else BACKENDS[attention]


def resolve_attention(attention: str, device: torch.device) -> str:
    """The attention backend that `--attention` names; InputError if the device cannot run it."""
    if attention == "auto":
        return "sdpa"
    if attention == "flash":
        if device.type != "cuda":
            raise InputError("attention 'flash' needs a GPU: use auto or sdpa, or --device cuda")
        if flash_attn_partial() is None:
            print("kvbench: flash-attn is not installed, using PyTorch's own", file=sys.stderr)
            return "sdpa"
        return "flash"
    if attention not in BACKENDS:
        names = ["auto", "flash", *BACKENDS]
        raise InputError(f"unknown attention '{attention}': {did_you_mean(attention, names)}")
    return attention
