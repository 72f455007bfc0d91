"""Random models of many architectures, and what kvbench says of each: measured, or refused."""

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.25,  # far from uniform attention, so that a wrong entry shows
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
LLAMA4 = {"num_local_experts": 4, "intermediate_size_mlp": 48}
MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 1,
}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 199}
GEMMA3N = {
    **PER_LAYER,
    "sliding_window": 24,
    "num_hidden_layers": 6,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0] * 6,
    "intermediate_size": [48] * 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
GEMMA4 = {**PER_LAYER, "sliding_window": 24, "num_kv_shared_layers": 0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 3,
    "long_factor": [1.5] * 3,
    "original_max_position_embeddings": 256,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
ALTERNATE = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}

# Name in this table: the model type of transformers, what is special.
MEASURED: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {**EXPERTS, "sliding_window": 24, "num_dense_layers": 1}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", ALTERNATE),
    "cwm": ("cwm", {**ALTERNATE, "bos_token_id": 1, "eos_token_id": 2}),
    "deepseek-v2": ("deepseek_v2", {**EXPERTS, **LATENT}),
    "deepseek-v3": ("deepseek_v3", {**EXPERTS, **LATENT}),
    "dots1": ("dots1", EXPERTS),
    "ernie4.5": ("ernie4_5", {}),
    "exaone4": ("exaone4", ALTERNATE),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**ALTERNATE, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", ALTERNATE),
    "gemma3n": ("gemma3n_text", GEMMA3N),
    "gemma4": ("gemma4_text", {**GEMMA4, "global_head_dim": 32}),
    "gemma4-shared": (
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
    ),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "glm4-moe": ("glm4_moe", EXPERTS),
    "gpt-neox": ("gpt_neox", {}),
    "gpt-oss": ("gpt_oss", {"num_local_experts": 4, "sliding_window": 24}),
    "granite": ("granite", {}),
    "granitemoe": ("granitemoe", EXPERTS),
    "helium": ("helium", {"head_dim": 8}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "jetmoe": ("jetmoe", {**EXPERTS, "kv_channels": 8}),
    "llama": ("llama", {}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama4-chunks": ("llama4_text", {**LLAMA4, "attention_chunk_size": 20}),
    "llama4-temperature": (
        "llama4_text",
        {**LLAMA4, "attention_chunk_size": 8192, "floor_scale": 16, "attn_scale": 0.5},
    ),
    "longcat-flash": (
        "longcat_flash",
        {
            **LATENT,
            "num_layers": 2,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 24,
            "ffn_hidden_size": 48,
            "zero_expert_num": 1,
        },
    ),
    "mimo-v2-flash": (
        "mimo_v2_flash",
        {
            **EXPERTS,
            "sliding_window": 24,
            "v_head_dim": 8,
            "swa_num_key_value_heads": 2,
            "swa_num_attention_heads": 4,
            "swa_head_dim": 16,
            "swa_v_head_dim": 8,
            "moe_layer_freq": [0, 1, 1, 1],
            "hybrid_layer_pattern": [0, 1, 1, 0],
        },
    ),
    "minicpm3": ("minicpm3", LATENT),
    "minimax-m2": ("minimax_m2", EXPERTS),
    "ministral": ("ministral", ALTERNATE),
    "ministral3": ("ministral3", {"sliding_window": None}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-sliding": ("mistral", {"sliding_window": 24}),
    "mixtral": ("mixtral", EXPERTS),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", ALTERNATE),
    "olmoe": ("olmoe", EXPERTS),
    "phi": ("phi", {}),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-sliding": ("phi3", {"sliding_window": 24}),
    "phi4-mini": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 256,
            "rope_parameters": LONGROPE,
        },
    ),
    "phimoe": ("phimoe", EXPERTS),
    "qwen2": ("qwen2", {}),
    "qwen2-moe": ("qwen2_moe", EXPERTS),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "seed-oss": ("seed_oss", {}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "vaultgemma": ("vaultgemma", ALTERNATE),
    "youtu": ("youtu", LATENT),
}

# What the refusal says.
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", {}, "not an attention-only decoder"),
    "deepseek-v3.2": (
        "deepseek_v32",
        {**EXPERTS, **LATENT, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
        "indexer",
    ),
    "diffllama": ("diffllama", {}, "more than once"),
    "falcon-h1": ("falcon_h1", MAMBA, "hybrid"),
    "glm-5": (
        "glm_moe_dsa",
        {**EXPERTS, **LATENT, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
        "indexer",
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, "conv"),
    "nemotron": ("nemotron", {}, "does not hand its keyword arguments on"),
    "qwen3-next": ("qwen3_next", EXPERTS, "linear_attention"),
    "stablelm": ("stablelm", {}, "does not hand its keyword arguments on"),
}


def text_config(kind: str, special: dict[str, Any]) -> Any:
    """A small configuration of a model type, `SIZES` where it has such names."""
    config_class = CONFIG_MAPPING[kind]
    known = {*getattr(config_class, "__dataclass_fields__", {}), *config_class.attribute_map}
    known |= {"bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
    sizes = {key: value for key, value in SIZES.items() if key in known}
    return config_class(**{**sizes, **{k: v for k, v in special.items() if k in known}})


def random_model(kind: str, special: dict[str, Any]) -> Any:
    """A model with random weights, in float32; equal arguments give equal weights."""
    torch.manual_seed(0)
    config = text_config(kind, special)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    return shaken(model)


def shaken(model: Any) -> Any:
    """The model, with no weight that leaves something out: no zeros, ones or infinities."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim <= 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=draw))
            if not torch.isfinite(weight).all():
                weight.copy_(0.2 * torch.randn(weight.shape, generator=draw))
    model.generation_config.eos_token_id = None
    return model


def mistral3() -> Any:
    """A multimodal model whose text model is a Ministral."""
    torch.manual_seed(0)
    text = {**SIZES, "model_type": "ministral3", "sliding_window": None}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = CONFIG_MAPPING["mistral3"](text_config=text, vision_config=vision)
    model = transformers.Mistral3ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    return shaken(model.float().eval())


def qwen3_vl() -> Any:
    """A multimodal model with RoPE in three dimensions, of which text uses one."""
    torch.manual_seed(0)
    text = {
        **SIZES,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "deepstack_visual_indexes": [0],
    }
    config = CONFIG_MAPPING["qwen3_vl"](text_config=text, vision_config=vision)
    model = transformers.Qwen3VLForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    return shaken(model.float().eval())


MULTIMODAL = {"mistral3": mistral3, "qwen3-vl": qwen3_vl}


def measured_model(name: str) -> Any:
    """A model of the table `MEASURED`, or of `MULTIMODAL`."""
    if name in MULTIMODAL:
        return MULTIMODAL[name]()
    return random_model(*MEASURED[name])


PAGE = """# Architectures

Written by `tests/models/test_architectures.py`; do not edit. Each of these was built with random
weights, agrees with its own `generate` token for token at budget 1, in chunks and in batches, and
passes the check that `kvbench run` makes of every model before it measures. Names are transformers'
model types; another architecture may well pass that check too.

| architecture | model type | layers |
|---|---|---|
"""
REFUSALS = """
Refused, with one line that says why:

| architecture | model type |
|---|---|
"""


def kinds_of(model: Any) -> str:
    """What the layers of a wrapped model are, in words."""
    layers = model.layers
    limits = [layer.limit for layer in layers]
    chunks = any(limit is not None and limit.chunked for limit in limits)
    sliding = any(limit is not None and not limit.chunked for limit in limits)
    found = ["full"] if None in limits else []
    found += ["sliding window"] if sliding else []
    found += ["chunks"] if chunks else []
    if model.shares_keys:
        found.append("shared keys")
    if len({layer.key_size for layer in layers}) > 1:
        found.append("several head sizes")
    if any(layer.key_size != layer.value_size for layer in layers):
        found.append("keys and values of different sizes")
    return ", ".join(found)


def page(kinds: dict[str, str]) -> str:
    """The page of the documentation; `kinds` are the layers of each measured model."""
    types = {name: kind for name, (kind, _) in MEASURED.items()}
    types |= {name: name.replace("-", "_") for name in MULTIMODAL}
    rows = [f"| {name} | `{types[name]}` | {kinds[name]} |\n" for name in sorted(kinds)]
    refused = [f"| {name} | `{kind}` |\n" for name, (kind, _, _) in sorted(REFUSED.items())]
    return PAGE + "".join(rows) + REFUSALS + "".join(refused)
