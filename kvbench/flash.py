"""Attention by FlashAttention's kernels for sequences of different lengths, on CUDA.

The kernels are flash-attn's where it is installed, else PyTorch's own. Both take sequences laid end
to end; here a sequence is one KV head with the query heads of its group. What they do not compute
(a sliding window of the model's, float32) goes through `Sdpa`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvbench.attention import Sdpa, merged
from kvbench.method import Entries

# (q [U*T, G, D], k [U*S, 1, D], v, number of queries T and room S of each sequence, lengths [U] or
# None for S, scaling, causal) -> output [U*T, G, Dv], log normaliser [G, U*T]
Kernel = Callable[..., tuple[Tensor, Tensor]]


class Flash:
    """FlashAttention where it applies."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.sdpa = Sdpa()

    def chunk(
        self,
        queries: Tensor,
        past: Entries | None,
        own: Entries,
        *,
        scaling: float,
        sliding: int | None,
    ) -> Tensor:
        """As `Backend.chunk`; past and own entries are attended to apart and merged."""
        if sliding is not None or not self.applies(queries, own.values):
            return self.sdpa.chunk(queries, past, own, scaling=scaling, sliding=sliding)
        mine = self._partial(queries, own, scaling, causal=True)
        if past is None:
            return mine[0]
        return merged(mine, self._partial(queries, past, scaling, causal=False))

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
        """As `Backend.token`; the kernel reads each sequence to its length, so it needs no mask."""
        if sliding is not None or not self.applies(queries, values):
            return self.sdpa.token(
                queries,
                keys,
                values,
                scaling=scaling,
                lengths=lengths,
                seen=seen,
                mask=mask,
                sliding=sliding,
            )
        room = keys.shape[1]
        k, v = (t.reshape(-1, 1, t.shape[-1]) for t in (keys, values))
        return self.kernel(queries, k, v, 1, room, lengths, scaling, causal=False)[0]

    def applies(self, queries: Tensor, values: Tensor) -> bool:
        """Whether the kernels take such tensors."""
        same_size = queries.shape[-1] == values.shape[-1]
        return same_size and queries.dtype in (torch.float16, torch.bfloat16)

    def _partial(
        self, queries: Tensor, of: Entries, scaling: float, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        heads, group, new = queries.shape[:3]
        q = queries.transpose(1, 2).reshape(heads * new, group, -1)
        k, v = (t.reshape(-1, 1, t.shape[-1]) for t in (of.keys, of.values))
        out, total = self.kernel(q, k, v, new, of.keys.shape[1], None, scaling, causal=causal)
        log = total.unflatten(1, (heads, new)).transpose(0, 1)
        return out.unflatten(0, (heads, new)).transpose(1, 2), log


def find_kernel() -> tuple[Kernel | None, str]:
    """The kernel that is installed, and what it is called; None where there is none."""
    for make, name in ((_flash_attn, "flash-attn"), (_pytorch, "PyTorch's varlen attention")):
        try:
            return make(), name
        except (ImportError, AttributeError, OSError, RuntimeError):
            continue
    return None, "PyTorch's scaled dot product attention"


def starts(count: int, step: int, device: torch.device) -> Tensor:
    """Where each of `count` sequences of `step` tokens starts, and where the last ends."""
    return torch.arange(count + 1, dtype=torch.int32, device=device) * step


def _flash_attn() -> Kernel:
    package: Any = import_module("flash_attn")
    varlen, decode = package.flash_attn_varlen_func, package.flash_attn_with_kvcache

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: int,
        room: int,
        lengths: Tensor | None,
        scaling: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        count = len(q) // new
        if lengths is not None:
            cache = (t.reshape(count, room, 1, -1) for t in (k, v))
            out = decode(q[:, None], *cache, cache_seqlens=lengths.int(), softmax_scale=scaling)
            return out[:, 0], out.new_empty(0)
        out, total, _ = varlen(
            q,
            k,
            v,
            starts(count, new, q.device),
            starts(count, room, q.device),
            new,
            room,
            softmax_scale=scaling,
            causal=causal,
            return_attn_probs=True,
        )
        return out, total

    return kernel


def _pytorch() -> Kernel:
    module: Any = import_module("torch.nn.attention.varlen")
    varlen, aux = module.varlen_attn, module.AuxRequest(lse=True)

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: int,
        room: int,
        lengths: Tensor | None,
        scaling: float,
        *,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        count = len(q) // new
        out, total = varlen(
            q,
            k,
            v,
            starts(count, new, q.device),
            starts(count, room, q.device),
            new,
            room,
            return_aux=aux,
            scale=scaling,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=True,
            seqused_k=None if lengths is None else lengths.int(),
        )
        return out, total

    return kernel
