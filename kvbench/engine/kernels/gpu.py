"""Attention of single tokens on a GPU, in Triton: the counterpart of `cpu`.

One kernel reads the parts of each sequence in parallel, where they are stored. A second kernel
merges the parts (flash decoding), attends to the sequence's own token and stores its entry. Nothing
here synchronises with the GPU, so a decoding step can be captured in a CUDA graph.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvbench.engine.kernels.interface import Sequences, sinks_of
from kvbench.models.attention import Rules

BLOCK = 64  # entries that a program reads at once
LEAST_PART = 256  # the fewest entries that justify a program
PROGRAMS = 4  # programs of a kernel for each multiprocessor
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def token_kernel(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    rules: Rules,
) -> Tensor:
    """As `kvbench.engine.kernels.interface.TokenKernel`, for float16, bfloat16 and float32."""
    with torch.cuda.device_of(queries):  # Triton launches on the current GPU
        return _attended(queries, keys, values, sequences, rules)


def _attended(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sequences: Sequences,
    rules: Rules,
) -> Tensor:
    queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    count, group, size = queries.shape
    value_size = values.shape[1]
    parts = parts_of(count, sequences.longest, queries.device)
    sums = queries.new_empty((count, parts, group, value_size), dtype=torch.float32)
    totals = queries.new_empty((2, count, parts, group), dtype=torch.float32)
    out = queries.new_empty((count, group, value_size))
    shapes: dict[str, Any] = {
        "GROUP": group,
        "SIZE": size,
        "VALUE_SIZE": value_size,
        "GROUP_ROOM": max(16, triton.next_power_of_2(group)),  # 16 is the least for a matrix unit
        "SIZE_ROOM": max(16, triton.next_power_of_2(size)),
        "VALUE_ROOM": max(16, triton.next_power_of_2(value_size)),
        "SLIDING": rules.sliding or 0,
        "SOFTCAP": rules.softcap or 0.0,
    }
    sinks = queries if rules.sinks is None else sinks_of(rules, count)
    here, *where, lengths, slots = sequences.tensors
    whole = all(t.shape[1] * t.itemsize % 16 == 0 for t in (keys, values))
    _read[(count, parts)](
        queries,
        here,
        *where,
        lengths,
        sums,
        *totals,
        rules.scaling,
        TYPE=TYPES[queries.dtype],
        BLOCK=BLOCK,
        ALIGNED=16 if whole else 1,
        **shapes,
    )
    _join[(count,)](
        queries,
        keys,
        values,
        here,
        *where,
        slots,
        sums,
        *totals,
        sinks,
        out,
        rules.scaling,
        parts,
        TYPE=TYPES[queries.dtype],
        SINKS=rules.sinks is not None,
        PARTS_ROOM=triton.next_power_of_2(parts),
        **shapes,
    )
    return out


def parts_of(count: int, longest: int, device: torch.device) -> int:
    """How many parts each sequence is cut into: enough to keep the GPU busy, none too short."""
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = triton.cdiv(PROGRAMS * processors, count)
    return max(1, min(wanted, triton.cdiv(longest, LEAST_PART)))


@triton.jit
def _read(
    queries,
    here,
    keys,
    values,
    positions,
    lengths,
    sums,
    totals,
    mosts,
    scaling,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    GROUP_ROOM: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,
    SLIDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Attention to one part of a sequence: the weighted sum, the weights' total, the top logit."""
    u, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    g, d, e = tl.arange(0, GROUP_ROOM), tl.arange(0, SIZE_ROOM), tl.arange(0, VALUE_ROOM)
    s = tl.arange(0, BLOCK)
    asks = (g < GROUP)[:, None] & (d < SIZE)[None, :]
    q = tl.load(queries + (u * GROUP + g)[:, None] * SIZE + d[None, :], mask=asks, other=0.0)
    k_start = tl.load(keys + u).to(tl.pointer_type(TYPE))
    v_start = tl.load(values + u).to(tl.pointer_type(TYPE))
    p_start = tl.load(positions + u).to(tl.pointer_type(tl.int32))
    length = tl.load(lengths + u)
    hidden = tl.load(here + u) - SLIDING
    share = tl.cdiv(tl.cdiv(length, parts), BLOCK) * BLOCK
    start = share * part
    stop = tl.minimum(start + share, length)
    most = tl.full([GROUP_ROOM], -1e30, tl.float32)
    total = tl.zeros([GROUP_ROOM], tl.float32)
    sum = tl.zeros([GROUP_ROOM, VALUE_ROOM], tl.float32)
    for at in range(start, stop, BLOCK):
        there = at + s < stop
        k_at = k_start + (at + s)[None, :] * SIZE + d[:, None]
        k_at = tl.multiple_of(k_at, (ALIGNED, ALIGNED))
        k = tl.load(k_at, mask=there[None, :] & (d < SIZE)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * scaling
        if SOFTCAP > 0:
            logits = SOFTCAP * (2 * tl.sigmoid(2 * logits / SOFTCAP) - 1)  # tanh
        seen = there
        if SLIDING:
            seen = seen & (tl.load(p_start + at + s, mask=there, other=0) > hidden)
        logits = tl.where(seen[None, :], logits, -float("inf"))
        high = tl.maximum(most, tl.max(logits, 1))
        shrink = tl.exp(most - high)
        weights = tl.exp(logits - high[:, None])
        v_at = v_start + (at + s)[:, None] * VALUE_SIZE + e[None, :]
        v_at = tl.multiple_of(v_at, (ALIGNED, ALIGNED))
        v = tl.load(v_at, mask=there[:, None] & (e < VALUE_SIZE)[None, :], other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sum = sum * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        most = high
    to = (u * parts + part) * GROUP + g
    tl.store(totals + to, total, mask=g < GROUP)
    tl.store(mosts + to, most, mask=g < GROUP)
    inside = (g < GROUP)[:, None] & (e < VALUE_SIZE)[None, :]
    tl.store(sums + to[:, None] * VALUE_SIZE + e[None, :], sum, mask=inside)


@triton.jit
def _join(
    queries,
    key,
    value,
    here,
    keys,
    values,
    positions,
    slots,
    sums,
    totals,
    mosts,
    sinks,
    out,
    scaling,
    parts,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    GROUP_ROOM: tl.constexpr,
    SIZE_ROOM: tl.constexpr,
    VALUE_ROOM: tl.constexpr,
    SLIDING: tl.constexpr,
    SOFTCAP: tl.constexpr,
    TYPE: tl.constexpr,
    SINKS: tl.constexpr,
    PARTS_ROOM: tl.constexpr,
):
    """Merge all parts of a sequence and its own token, and store that token's entry."""
    u = tl.program_id(0)
    d, e, p = tl.arange(0, SIZE_ROOM), tl.arange(0, VALUE_ROOM), tl.arange(0, PARTS_ROOM)
    k = tl.load(key + u * SIZE + d, mask=d < SIZE, other=0.0)
    v = tl.load(value + u * VALUE_SIZE + e, mask=e < VALUE_SIZE, other=0.0)
    for g in range(GROUP):
        q = tl.load(queries + (u * GROUP + g) * SIZE + d, mask=d < SIZE, other=0.0)
        logit = tl.sum(q.to(tl.float32) * k.to(tl.float32), 0) * scaling
        if SOFTCAP > 0:
            logit = SOFTCAP * (2 * tl.sigmoid(2 * logit / SOFTCAP) - 1)
        at = (u * parts + p) * GROUP + g
        most = tl.load(mosts + at, mask=p < parts, other=-1e30)
        high = tl.maximum(tl.max(most, 0), logit)
        if SINKS:
            sink = tl.load(sinks + u * GROUP + g)
            high = tl.maximum(high, sink)
        weight = tl.exp(most - high)
        total = tl.sum(weight * tl.load(totals + at, mask=p < parts, other=0.0), 0)
        inside = (p < parts)[:, None] & (e < VALUE_SIZE)[None, :]
        sum = tl.load(sums + at[:, None] * VALUE_SIZE + e[None, :], mask=inside, other=0.0)
        own = tl.exp(logit - high)
        if SINKS:
            total += tl.exp(sink - high)
        result = (tl.sum(sum * weight[:, None], 0) + own * v.to(tl.float32)) / (total + own)
        to = out + (u * GROUP + g) * VALUE_SIZE + e
        tl.store(to, result.to(TYPE), mask=e < VALUE_SIZE)
    slot = tl.load(slots + u)
    k_start = tl.load(keys + u).to(tl.pointer_type(TYPE))
    v_start = tl.load(values + u).to(tl.pointer_type(TYPE))
    p_start = tl.load(positions + u).to(tl.pointer_type(tl.int32))
    tl.store(k_start + slot * SIZE + d, k, mask=d < SIZE)
    tl.store(v_start + slot * VALUE_SIZE + e, v, mask=e < VALUE_SIZE)
    tl.store(p_start + slot, tl.load(here + u).to(tl.int32))
