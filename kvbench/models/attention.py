"""The attention function that transformers calls, and what it hands to the engine.

transformers lets a program register an attention function by name; keyword arguments given to
`model(...)` arrive there. A forward is therefore called with `kv=...`, an object that computes
attention (`KVAttention`), and no model is patched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvbench.errors import InputError

ATTENTION = "kvbench"  # the name under which the function is registered
# What some models ask of attention beyond softmax(QK)V, by the name of the argument.
UNSUPPORTED = {"softcap": "soft-capped logits", "s_aux": "learnt attention sinks"}


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call of attention: new tokens of B sequences, after RoPE.

    `layer` counts from 0, `scaling` multiplies the logits, and `sliding` is the model's own sliding
    window in tokens, None where the layer sees everything.
    """

    layer: int
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, K, T, D]
    value: Tensor  # [B, K, T, Dv]
    scaling: float
    sliding: int | None

    def split(self, sizes: Sequence[int]) -> "list[AttentionCall]":
        """The calls of the parts of a packed sequence (B = 1), `sizes` tokens each."""
        tensors = (tensor.split(sizes, dim=2) for tensor in (self.query, self.key, self.value))
        parts = zip(*tensors, strict=True)
        return [replace(self, query=query, key=key, value=value) for query, key, value in parts]


class KVAttention(Protocol):
    """What `kv` is in `model(..., kv=kv)`: it computes the attention of every layer."""

    def attend(self, call: AttentionCall) -> Tensor:
        """The attention output [B, H, T, Dv] of one layer."""
        ...


def registered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    kv: KVAttention | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [B, T, H, Dv] and no weights.

    InputError if the model asks for something that kvbench does not compute.
    """
    for name, what in UNSUPPORTED.items():
        if others.get(name) is not None:
            raise InputError(
                f"the model's attention has {what} ({name}), which kvbench does not compute"
            )
    if kv is None:
        raise InputError("the model does not hand its keyword arguments on to its attention")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    call = AttentionCall(module.layer_idx, query, key, value, scaling, sliding_window)
    return kv.attend(call).transpose(1, 2), None


def no_mask(*_: Any, **__: Any) -> None:
    """No mask: `kv` hides entries by their position."""


AttentionInterface.register(ATTENTION, registered_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
