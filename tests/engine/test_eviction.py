"""What methods keep, compared with slow implementations of the papers, in float64."""

import math
from typing import Any

import pytest
import torch
from helpers.models import loaded_model, plain_model
from torch import Tensor

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.spec import parse_method

PROMPT, LAYERS, KV_HEADS, GROUP = 96, 3, 2, 2


def prompt_tokens() -> list[int]:
    return torch.randint(1, 199, (PROMPT,), generator=torch.Generator().manual_seed(5)).tolist()


def queries_and_keys() -> list[tuple[Tensor, Tensor]]:
    """Each layer's queries [H, n, D] and keys [K, n, D] after RoPE, under full attention.

    They are recorded from the calls of the plain model's attention function.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[tuple[Tensor, Tensor]] = []

    def recording(module: Any, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((query[0].double(), key[0].double()))
        return sdpa_attention_forward(module, query, key, *rest, **named)

    AttentionInterface.register("recording", recording)
    model = plain_model()
    model.set_attn_implementation("recording")
    with torch.inference_mode():
        model(torch.tensor([prompt_tokens()]), use_cache=False)
    return seen


def window_attention(query: Tensor, key: Tensor, window: int, kv_head: int) -> list[float]:
    """Sum over the window's queries and mean over the group, one weight at a time."""
    total = [0.0] * PROMPT
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        for t in range(PROMPT - window, PROMPT):
            logits = [float(query[head, t] @ key[kv_head, e]) / 8**0.5 for e in range(t + 1)]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            for e, weight in enumerate(weights):
                total[e] += weight / sum(weights) / GROUP
    return total


def pooled(values: list[float], kernel: int) -> list[float]:
    half = kernel // 2
    padded = [0.0] * half + values + [0.0] * half
    return [sum(padded[i : i + kernel]) / kernel for i in range(len(values))]


def top(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


def kept(
    name: str, budget: float, chunk: int | None = None, **options: Any
) -> list[list[list[int]]]:
    row = Row(prompt_tokens(), 4, parse_method(name, options), budget)
    outcome = run_rows(loaded_model(), [row], prefill_chunk=chunk, keep_positions=True)[0]
    assert outcome.kept is not None
    return outcome.kept


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("chunk", [None, 40])
def test_snapkv_keeps_what_the_paper_says(budget: float, chunk: int | None) -> None:
    window, kernel = 12, 5
    capacity = round(budget * PROMPT)
    recorded = queries_and_keys()
    found = kept("snapkv", budget, chunk, window=window, kernel=kernel)
    # Eviction happens after the prompt is read, so all layers have the queries and keys of full
    # attention.
    for layer, (query, key) in enumerate(recorded):
        for head in range(KV_HEADS):
            if capacity <= window:
                expected = list(range(PROMPT - capacity, PROMPT))
            else:
                scores = window_attention(query, key, window, head)[: PROMPT - window]
                expected = top(pooled(scores, kernel), capacity - window)
                expected += range(PROMPT - window, PROMPT)
            assert found[layer][head] == expected, (layer, head)


def test_pyramidkv_keeps_snapkvs_best_in_falling_numbers() -> None:
    window, budget, beta = 8, 0.35, 20
    mean = round(budget * PROMPT) - window
    low = mean // beta
    high = 2 * mean - low
    found = kept("pyramidkv", budget, window=window)
    sizes = []
    for layer, (query, key) in enumerate(queries_and_keys()):
        line = window + high - layer * (high - low) / (LAYERS - 1)
        for head in range(KV_HEADS):
            size = len(found[layer][head])
            assert abs(size - line) <= 1
            scores = pooled(window_attention(query, key, window, head)[: PROMPT - window], 5)
            assert found[layer][head] == [
                *top(scores, size - window),
                *range(PROMPT - window, PROMPT),
            ]
        sizes.append(size)
    assert sizes[0] > sizes[1] > sizes[2]
    assert abs(sum(sizes) - LAYERS * round(budget * PROMPT)) <= 1


def test_recency_keeps_sinks_and_the_latest() -> None:
    for chunk in (None, 7):
        for layer in kept("recency", 0.25, chunk, sinks=4):
            for positions in layer:
                assert positions == [0, 1, 2, 3, *range(PROMPT - 20, PROMPT)]


def test_the_patched_tokens_leave_nothing_behind() -> None:
    for layer in kept("snapkv-patched", 0.5, 30, window=9):
        for positions in layer:
            assert len(positions) == len(set(positions)) == 48
            assert max(positions) == PROMPT - 1
