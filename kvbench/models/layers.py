"""Learns what each layer of a model attends to, by one short forward (`probe_layers`).

Nothing is taken from the configuration that the forward itself can tell: head counts and sizes, the
limits of layers, and which layers share keys. `wrap_model` calls this before anything is measured.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvbench.errors import InputError
from kvbench.method import KVShape
from kvbench.models.attention import ATTENTION, PROBE, AttentionCall, LayerShape, Probe
from kvbench.models.rope import rotary_calls, rotation_of

KINDS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
KIND_LISTS = ("layer_types", "layers_block_type", "block_types")  # names in configurations


def check_kinds(config: Any, name: str) -> None:
    """InputError for a configuration that names layers that kvbench does not measure."""
    if getattr(config, "index_topk", None) is not None:
        raise InputError(
            f"model '{name}' selects entries with an indexer (DeepSeek sparse attention), which "
            "kvbench does not compute"
        )
    for key in KIND_LISTS:
        listed = getattr(config, key, None)
        unknown = sorted({str(kind) for kind in listed or ()} - KINDS)
        if unknown:
            raise InputError(
                f"model '{name}' is not an attention-only decoder: it has layers of type "
                f"{', '.join(unknown)} (known are full_attention, sliding_attention and "
                "chunked_attention)"
            )


def probe_layers(model: Any, layers: int, name: str) -> tuple[LayerShape, ...]:
    """What each of the `layers` layers of a transformers model is.

    Afterwards the model's attention is the engine's. InputError if the model attends in a way that
    kvbench does not compute.
    """
    model.set_attn_implementation(PROBE)
    probe = Probe()
    device = next(model.parameters()).device
    # The same tokens at several places, so that keys differ by RoPE alone.
    positions = torch.arange(3, device=device) + torch.tensor([[0], [7], [300]], device=device)
    ids = torch.arange(1, 4, device=device).expand(len(positions), -1)
    try:
        with torch.inference_mode(), rotary_calls(model) as rotaries:
            model(
                input_ids=ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=[2],
                kv=probe,
                kv_positions=positions,
            )
    except InputError as error:
        raise InputError(f"model '{name}' cannot be measured: {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model '{name}' cannot be measured: its forward fails where kvbench computes the "
            f"attention ({type(error).__name__}: {reason})"
        ) from None
    model.set_attn_implementation(ATTENTION)
    found = found_layers(probe.calls, layers, name)
    return tuple(
        replace(layer, rotation=rotation_of(call, positions, rotaries))
        for layer, call in zip(found, probe.calls, strict=True)
    )


def found_layers(calls: Sequence[AttentionCall], layers: int, name: str) -> tuple[LayerShape, ...]:
    """The layers that `calls` describe; InputError if they are not one call for each layer."""
    order = [call.layer for call in calls]
    missed = sorted(set(range(layers)) - set(order))
    if missed:
        raise InputError(
            f"model '{name}' is not an attention-only decoder: layers {missed} do not attend "
            "through the registered attention"
        )
    if order != list(range(layers)):
        raise InputError(
            f"model '{name}' attends more than once in a layer, or in another order (layers "
            f"{order}), which kvbench does not measure"
        )
    sources = [source_of(call, calls) for call in calls]
    found = []
    for call, source in zip(calls, sources, strict=True):
        _, heads, tokens, size = call.query.shape
        kv_heads = call.key.shape[1]
        fits = call.key.shape[2:] == (tokens, size) and call.value.shape[1:3] == (kv_heads, tokens)
        if not fits or heads % kv_heads:
            shapes = [tuple(t.shape) for t in (call.query, call.key, call.value)]
            raise InputError(
                f"model '{name}' attends in layer {call.layer} with queries, keys and values of "
                f"shapes {shapes}, which do not fit together"
            )
        readers = tuple(layer for layer in range(layers) if sources[layer] == source)
        found.append(
            LayerShape(
                kv_heads,
                heads,
                size,
                call.value.shape[3],
                call.rules.limit,
                source,
                readers,
                device=call.key.device,
            )
        )
        if call.key.device != found[source].device:
            raise InputError(
                f"model '{name}': layer {call.layer} reads the keys of layer {source}, which is on "
                "another GPU; choose other --gpus-per-worker, or one GPU that holds the model"
            )
        if call.rules.limit != found[source].limit:
            raise InputError(
                f"model '{name}': layer {call.layer} reads the keys of layer {source} but sees "
                "another part of them, which kvbench does not measure"
            )
    return tuple(found)


def source_of(call: AttentionCall, calls: Sequence[AttentionCall]) -> int:
    """The first layer that attended to the same keys and values, or to those that it is a copy of.

    A layer on another GPU gets a copy.
    """

    def place(each: AttentionCall) -> tuple[int, ...]:
        return each.key.data_ptr(), *each.key.shape, each.value.data_ptr(), *each.value.shape

    def same(each: AttentionCall) -> bool:
        if each.key.device == call.key.device:
            return place(each) == place(call)
        return torch.equal(each.key.to(call.key.device), call.key)

    return next(each.layer for each in calls if same(each))


def kv_shape(layers: Sequence[LayerShape], name: str) -> KVShape:
    """The shape that methods see: that of the layers they act on.

    These are the layers that hold keys and are not limited, or, where there are none, all that hold
    keys. InputError if they differ in their heads, or if all layers attend in chunks.
    """
    own = [layer for index, layer in enumerate(layers) if layer.source == index]
    free = [layer for layer in own if layer.limit is None]
    acting = free or own
    if any(layer.limit is not None and layer.limit.chunked for layer in acting):
        raise InputError(
            f"model '{name}' attends in chunks in all of its layers; kvbench measures models with "
            "layers that see everything, or with sliding windows in all"
        )
    shapes = {(layer.kv_heads, layer.query_heads, layer.key_size) for layer in acting}
    if len(shapes) > 1:
        raise InputError(
            f"model '{name}' has layers of different head counts or sizes {sorted(shapes)} "
            "among those that methods act on, which kvbench does not measure"
        )
    kv_heads, query_heads, size = shapes.pop()
    places = tuple(layer.source for layer in acting)
    everywhere = len(places) == len(layers)
    return KVShape(len(layers), kv_heads, query_heads, size, None if everywhere else places)
