"""The attention function that transformers calls, and what it hands to the engine.

transformers lets a program register an attention function by name; keyword arguments given to
`model(...)` arrive there. A forward is therefore called with `kv=...`, an object that computes
attention (`KVAttention`), and no model is patched.

A second name, `PROBE`, is for one short forward when a model is wrapped: masks are then described
(`MaskRule`) instead of left out, so that `kvbench.models.layers` learns what each layer sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from kvbench.errors import InputError
from kvbench.method import Limit, Rotation

ATTENTION = "kvbench"  # the name under which the function is registered
PROBE = "kvbench-probe"

COMPARED = 4096  # a longer sliding window or chunk is compared with its mask at some entries only

# Arguments of attention that change nothing here: what a layer attends to is the engine's business,
# positions are in the keys already, and the rest asks for additional outputs.
NEUTRAL = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True)
class LayerShape:
    """What one layer's attention is, as a probe of the model found it."""

    kv_heads: int
    query_heads: int
    key_size: int
    value_size: int
    limit: Limit | None = None  # what the model itself lets the layer see
    source: int = 0  # the layer whose keys and values it reads: itself, or an earlier one
    readers: tuple[int, ...] = ()  # all layers that read these keys and values, the source first
    rotation: Rotation | None = None  # RoPE, None where it is not known
    # Where its keys and values are.
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def group(self) -> int:
        """G, the query heads that share one KV head."""
        return self.query_heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class Rules:
    """How one layer attends: what it does with the products of queries and keys.

    `scaling` multiplies these logits; with `softcap`, a logit l then becomes
    softcap * tanh(l / softcap). `limit` hides entries. `sinks` are learnt logits, one for each
    query head, that take part in the softmax and have no value.
    """

    scaling: float
    limit: Limit | None = None
    softcap: float | None = None
    sinks: Tensor | None = None  # [K, G]

    @property
    def softmax_only(self) -> bool:
        """Whether there are neither capped logits nor sinks."""
        return self.softcap is None and self.sinks is None

    @property
    def sliding(self) -> int | None:
        """The sliding window in tokens, None where the layer has none."""
        return None if self.limit is None or self.limit.chunked else self.limit.size


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call of attention: new tokens of B sequences, after RoPE."""

    layer: int  # from 0
    query: Tensor  # [B, H, T, D]
    key: Tensor  # [B, K, T, D]
    value: Tensor  # [B, K, T, Dv]
    rules: Rules
    module: Any = None  # the layer's attention

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


@dataclass(frozen=True)
class MaskRule:
    """A mask as the model asks transformers for it: who sees whom, by index.

    `size` is the sliding window or the chunk that the mask was made for, None for neither.
    """

    sees: Callable[..., Any]  # (batch, head, query index, entry index) -> bool
    size: int | None

    def limit(self) -> Limit | None:
        """The limit that this mask is; InputError if it is more than that."""
        size = self.size or 32
        marks = {0, 1, 2, 5, size - 1, size, size + 1, 2 * size - 1, 2 * size, 2 * size + 1}
        marks = {mark for mark in marks if mark >= 0}
        if size <= COMPARED:
            entries = set(range(2 * size + 2))
        else:
            some = [*marks, *range(0, 2 * size, size // 997)]
            near = {place + step for place in some for step in (-size - 1, -size, 1 - size, 0, 1)}
            entries = {entry for entry in near if entry >= 0}
        order, queries = torch.tensor(sorted(entries)), torch.tensor(sorted(marks))[:, None]
        zero = torch.tensor(0)
        try:
            seen = torch.as_tensor(self.sees(zero, zero, queries, order)).cpu()
        except (RuntimeError, IndexError, TypeError, ValueError):
            seen = torch.tensor(False)
        causal = order <= queries
        limits = [None] if self.size is None else [None, Limit(size), Limit(size, chunked=True)]
        for limit in limits:
            expected = causal if limit is None else causal & ~limit.hides(queries, order)
            if torch.equal(seen.expand_as(expected), expected):
                return limit
        raise InputError(
            "the model masks its attention in a way that kvbench does not compute: neither causal, "
            "nor a sliding window, nor chunks"
        )


@dataclass
class Probe:
    """A `KVAttention` that remembers what each layer was called with; its output is zero."""

    calls: list[AttentionCall] = field(default_factory=list)

    def attend(self, call: AttentionCall) -> Tensor:
        """Zeros [B, H, T, Dv]."""
        self.calls.append(call)
        return call.query.new_zeros((*call.query.shape[:3], call.value.shape[-1]))


def registered_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | MaskRule | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kv: KVAttention | None = None,
    kv_layers: Sequence[LayerShape] | None = None,
    kv_positions: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [B, T, H, Dv] and no weights.

    `kv_layers` are the model's layers as they were found; without them only the arguments are
    checked. `kv_positions` [B, T] are the tokens' positions. InputError if the model asks for
    something that kvbench does not compute.
    """
    check_arguments(module, others)
    if kv is None:
        raise InputError("the model does not hand its keyword arguments on to its attention")
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise InputError("the model's attention does not know which layer it belongs to")
    if isinstance(attention_mask, MaskRule):
        limit = attention_mask.limit()
    elif attention_mask is not None:
        raise InputError(
            "the model computes a mask of attention by itself, which kvbench would ignore"
        )
    elif kv_layers is not None:
        limit = kv_layers[layer].limit
    else:
        limit = None if sliding_window is None else Limit(sliding_window)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    query = rescaled(module, query, kv_positions)
    sinks = None if s_aux is None else s_aux.unflatten(0, (key.shape[1], -1))
    rules = Rules(scaling, limit, softcap or None, sinks)
    call = AttentionCall(layer, query, key, value, rules, module)
    if kv_layers is not None:
        check_shapes(call, kv_layers)
    return kv.attend(call).transpose(1, 2).contiguous(), None


def check_arguments(module: Any, others: dict[str, Any]) -> None:
    """InputError for an argument of attention that would have to change what is computed."""
    causal = others.pop("is_causal", None)
    if causal is False or getattr(module, "is_causal", True) is False:
        raise InputError("the model's attention is not causal; kvbench measures decoders")
    for name, value in others.items():
        if name in NEUTRAL or value is None or value is False:
            continue
        if type(value) in (int, float) and value == 0:
            continue
        raise InputError(
            f"the model's attention has an argument '{name}', which kvbench does not know and "
            "would ignore"
        )


def check_shapes(call: AttentionCall, layers: Sequence[LayerShape]) -> None:
    """InputError if tensors do not have the shapes of the layer; kernels rely on them."""
    layer = layers[call.layer]
    rows, heads, tokens, size = call.query.shape
    keys = (rows, layer.kv_heads, tokens, layer.key_size)
    values = (rows, layer.kv_heads, tokens, layer.value_size)
    fits = heads == layer.query_heads and size == layer.key_size
    if not fits or call.key.shape != keys or call.value.shape != values:
        found = tuple(tuple(tensor.shape) for tensor in (call.query, call.key, call.value))
        queries = (rows, layer.query_heads, tokens, layer.key_size)
        raise InputError(
            f"layer {call.layer} attends with queries, keys and values of shapes {found}, where "
            f"{(queries, keys, values)} were expected"
        )


def rescaled(module: Any, query: Tensor, positions: Tensor | None) -> Tensor:
    """The query with Llama 4's temperature by position, where the model took it by index.

    Layers without RoPE scale queries by 1 + attn_scale * log(1 + floor((p + 1) / floor_scale)).
    transformers takes p from its own cache, and so from 0 on in every chunk without one.
    """
    # `getattr` of a module is slow for what it does not have, and this is called for every token.
    tuned = vars(module).get("attn_temperature_tuning")
    if not tuned or getattr(module, "use_rope", True):
        return query
    if positions is None:
        raise InputError("the model's attention depends on positions, which it was not given")

    def scale(at: Tensor) -> Tensor:
        steps = torch.floor((at.float() + 1) / module.floor_scale)
        return torch.log1p(steps) * module.attn_scale + 1

    index = torch.arange(query.shape[2], device=query.device)
    ratio = scale(positions.to(query.device)) / scale(index)
    return (query * ratio[:, None, :, None]).to(query.dtype)


def no_mask(*_: Any, **__: Any) -> None:
    """No mask: `kv` hides entries by their position."""


def described_mask(*_: Any, **arguments: Any) -> MaskRule:
    """The rule of a mask, for a probe."""
    return MaskRule(arguments["mask_function"], arguments.get("local_size"))


AttentionInterface.register(ATTENTION, registered_attention)
AttentionMaskInterface.register(ATTENTION, no_mask)
AttentionInterface.register(PROBE, registered_attention)
AttentionMaskInterface.register(PROBE, described_mask)
