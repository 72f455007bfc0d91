"""What a model computes by itself, without kvbench's engine."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class Captured:
    """One layer under full attention, after RoPE; of the whole text."""

    queries: Tensor  # [H, n, D]
    keys: Tensor  # [K, n, D]
    values: Tensor  # [K, n, D]
    scaling: float
    output: Tensor  # [hidden size, H * D], the weight of the output projection


def captured(model: Any, ids: list[int]) -> list[Captured]:
    """The layers of a transformers model that reads the text `ids` at once."""
    seen: list[Captured] = []

    def recording(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any
    ) -> Any:
        output = module.o_proj.weight
        seen.append(Captured(query[0], key[0], value[0], named["scaling"], output))
        return sdpa_attention_forward(module, query, key, value, *rest, **named)

    AttentionInterface.register("recording", recording)
    before = model.config._attn_implementation
    model.set_attn_implementation("recording")
    try:
        with torch.inference_mode():
            model(torch.tensor([ids]), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return seen
