"""RoPE as the probe learns it: what is undone is the query before RoPE."""

from typing import Any

import pytest
import torch
from helpers.architectures import MEASURED, measured_model
from torch import Tensor

from kvbench.models.attention import Probe
from kvbench.models.load import LoadedModel, forward, wrap_model
from kvbench.models.rope import NoRotation, Rope

# Neighbours: cohere, glm (which is also partial); partial: gpt-neox, phi, phi4-mini (LongRoPE).
CHECKED = ["llama", "llama-yarn", "qwen2", "qwen3", "mistral", "phi3", "gemma3", "cohere", "glm"]
CHECKED += ["gpt-neox", "phi", "phi4-mini", "gpt-oss", "smollm3"]


def wrapped(name: str) -> LoadedModel:
    return wrap_model(measured_model(name), None, name=name)


def before_rope(module: Any, hidden: Tensor) -> Tensor:
    """The queries [H, T, D] that a layer's attention makes of hidden states [1, T, size]."""
    if hasattr(module, "query_key_value"):
        size = module.head_size
        whole: Tensor = module.query_key_value(hidden)[0]
        return whole.view(len(whole), -1, 3 * size)[..., :size]
    size = module.head_dim
    made = module.qkv_proj(hidden) if hasattr(module, "qkv_proj") else module.q_proj(hidden)
    queries: Tensor = made[0, :, : module.config.num_attention_heads * size].unflatten(
        -1, (-1, size)
    )
    norm = getattr(module, "q_norm", None)
    if norm is not None:
        queries = norm(queries)
    return queries


@pytest.mark.parametrize("name", CHECKED)
def test_what_is_undone_is_the_query_before_rope(name: str) -> None:
    model, probe, entered = wrapped(name), Probe(), {}

    def enter(module: Any, arguments: Any, keywords: Any) -> None:
        entered[module.layer_idx] = keywords.get("hidden_states", *arguments[:1])

    for module in model.model.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "scaling"):
            module.register_forward_pre_hook(enter, with_kwargs=True)
    start = 40
    ids, positions = torch.arange(5, 105)[None], torch.arange(start, start + 100)[None]
    with torch.inference_mode():
        forward(model, ids, positions, probe)
        for call in probe.calls:
            rotation = model.layers[call.layer].rotation
            assert rotation is not None
            expected = before_rope(call.module, entered[call.layer]).transpose(0, 1)
            found = rotation.undo(call.query[0], positions[0])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            again = rotation.apply(found, positions[0])
            torch.testing.assert_close(again, call.query[0], rtol=1e-4, atol=1e-4)
            # Each head may have positions of its own.
            each = positions.expand(len(found), -1)
            torch.testing.assert_close(rotation.apply(found, each), again)


def test_the_probe_learns_the_rotation_of_nearly_every_architecture() -> None:
    unknown = [n for n in MEASURED if any(x.rotation is None for x in wrapped(n).layers)]
    assert unknown == ["hunyuan"]  # it normalises keys after RoPE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo3", "glm", "smollm3"])
def test_half_precision_gives_the_same_rotation(name: str, dtype: torch.dtype) -> None:
    whole = wrapped(name).layers
    model = measured_model(name)
    for weight in model.parameters():  # and not the frequencies, as transformers loads a model
        weight.data = weight.data.to(dtype)
    half = wrap_model(model, None, name=name).layers
    states, positions = torch.randn(2, 50, whole[0].key_size), torch.arange(100, 150)
    for a, b in zip(whole, half, strict=True):
        assert a.rotation is not None
        assert b.rotation is not None
        torch.testing.assert_close(
            a.rotation.apply(states, positions), b.rotation.apply(states, positions)
        )


def test_layers_without_rope_are_known() -> None:
    kinds = [type(layer.rotation) for layer in wrapped("smollm3").layers]
    assert kinds == [Rope, Rope, Rope, NoRotation]
