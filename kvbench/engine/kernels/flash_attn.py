"""Attention of prefill chunks by the package flash-attn, if it is installed.

Its kernels for sequences of different lengths read keys and values with any strides, so nothing is
copied; a chunk's queries are one sequence.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kvbench.engine.kernels.interface import Partial
from kvbench.method import Entries


def flash_attn_partial() -> Partial | None:
    """flash-attn as a `Partial`; None if it is not installed or does not load."""
    try:
        package: Any = import_module("flash_attn")
        varlen = package.flash_attn_varlen_func
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None

    def partial(q: Tensor, of: Entries, scaling: float, causal: bool) -> tuple[Tensor, Tensor]:
        new, held = q.shape[2], of.keys.shape[1]
        ends = torch.arange(2, dtype=torch.int32, device=q.device)
        tokens_first = (tensor.transpose(0, 1) for tensor in (q[0], of.keys, of.values))
        out, total, _ = varlen(
            *tokens_first,
            ends * new,
            ends * held,
            new,
            held,
            softmax_scale=scaling,
            causal=causal,
            return_attn_probs=True,
        )
        return out.transpose(0, 1), total

    return partial
