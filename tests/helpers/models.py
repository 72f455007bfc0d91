"""Small models with random weights, one for each architecture that kvbench supports."""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kvbench.models.load import LoadedModel, wrap_model

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4608,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # attention far from uniform, so that a wrong entry matters
}
SLIDING = {"sliding_window": 24}

ARCHITECTURES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralForCausalLM, MistralConfig, SLIDING),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": None}),
    "phi3-sliding": (Phi3ForCausalLM, Phi3Config, SLIDING),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 16,
            "tie_word_embeddings": False,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **SLIDING,
        },
    ),
}


def plain_model(architecture: str = "llama", **changes: Any) -> Any:
    """A model with its own attention; the same weights for the same arguments."""
    model_class, config_class, special = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    config = config_class(**{**SIZES, **special, **changes})
    config._attn_implementation = "sdpa"
    model = model_class(config).eval()
    model.generation_config.eos_token_id = None
    return model


def loaded_model(architecture: str = "llama", **changes: Any) -> LoadedModel:
    """The same model, wrapped for kvbench."""
    attention = changes.pop("attention", "sdpa")
    model = plain_model(architecture, **changes)
    return wrap_model(model, None, name=architecture, attention=attention)
