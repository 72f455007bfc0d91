"""Architectures: equal to their own `generate`, or refused; never wrong in silence."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import (
    MEASURED,
    MULTIMODAL,
    REFUSED,
    kinds_of,
    measured_model,
    page,
    random_model,
)
from helpers.engine import tokens
from transformers import AttentionInterface

from kvbench.engine import self_check as checking
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.engine.self_check import self_check
from kvbench.errors import InputError
from kvbench.method import Limit
from kvbench.models import attention, layers, load
from kvbench.models.load import LoadedModel, wrap_model
from kvbench.spec import parse_method

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
PROMPTS = [tokens(75), tokens(60, 3)]
ANSWER = 10
# Architectures with something that a plain Llama has not.
SPECIAL = [
    "cohere2",
    "deepseek-v3",
    "gemma2",
    "gemma3n",
    "gemma4",
    "gemma4-shared",
    "gpt-oss",
    "llama4-chunks",
    "llama4-temperature",
    "mistral-sliding",
    "phi4-mini",
]


def generated(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def row(prompt: list[int], method: str, budget: float) -> Row:
    options = {"snapkv.window": 6, "pyramidkv.window": 6}
    return Row(prompt, ANSWER, parse_method(method, options), budget)


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    """What the tests of each architecture found its layers to be."""
    return {}


@pytest.mark.parametrize("name", [*MEASURED, *MULTIMODAL])
def test_full_attention_equals_generate(name: str, kinds: dict[str, str]) -> None:
    plain = measured_model(name)
    expected = [generated(plain, prompt) for prompt in PROMPTS]
    assert len(set(expected[0])) > 3  # a model that repeats one token would prove nothing
    model = wrap_model(plain, None, name=name)
    assert self_check(model).difference < 1e-3
    rows = [row(prompt, "full", 1.0) for prompt in PROMPTS]
    for chunk in (None, 20):
        for outcome, tokens_ in zip(
            run_rows(model, rows, prefill_chunk=chunk), expected, strict=True
        ):
            assert outcome.tokens == tokens_
            assert outcome.kv_footprint == outcome.kv_peak == outcome.kv_reads == 1.0
    kinds[name] = kinds_of(model)


def test_the_documentation_lists_them(kinds: dict[str, str]) -> None:
    if kinds.keys() != {*MEASURED, *MULTIMODAL}:
        pytest.skip("only some architectures were tested")
    written = page(kinds)
    if os.environ.get("KVBENCH_WRITE_DOCS"):
        DOCUMENT.write_text(written)
    assert DOCUMENT.read_text() == written, "run the tests with KVBENCH_WRITE_DOCS=1"


@pytest.mark.parametrize("name", SPECIAL)
def test_methods_agree_with_float64(name: str) -> None:
    plain = measured_model(name)
    methods = ["recency", "snapkv", "snapkv-naive", "snapkv-patched", "pyramidkv"]
    rows = [row(PROMPTS[0], method, 0.4) for method in methods]
    fast = run_rows(wrap_model(plain, None, name=name), rows, prefill_chunk=20)
    exact = wrap_model(plain, None, name=name, attention="reference")
    for a, b in zip(fast, run_rows(exact, rows, prefill_chunk=20), strict=True):
        assert a.tokens == b.tokens
        assert a.resident_rows == b.resident_rows
        assert a.kv_footprint <= 1.0


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_a_reason(name: str) -> None:
    kind, special, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        self_check(wrap_model(random_model(kind, special), None, name=name))


def refused_by_the_check(model: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"at token \d+ .* differ from the model's own attention"):
        self_check(model)


def test_the_check_finds_a_state_beside_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "check_kinds", lambda *_: None)
    kind, special, _ = REFUSED["falcon-h1"]
    refused_by_the_check(wrap_model(random_model(kind, special), None, name="falcon-h1"))


def test_the_check_finds_a_temperature_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "rescaled", lambda module, query, positions: query)
    kind, special = MEASURED["llama4-temperature"]
    far = {**special, "floor_scale": 8192}  # short prompts do not reach it by themselves
    refused_by_the_check(wrap_model(random_model(kind, far), None, name="llama4"))


@pytest.mark.parametrize("name", ["mistral-sliding", "llama4-chunks", "gemma3"])
def test_the_check_finds_a_limit_that_is_ignored(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.MaskRule, "limit", lambda rule: None)
    refused_by_the_check(wrap_model(measured_model(name), None, name=name))


@pytest.mark.parametrize("name", ["gemma2", "gpt-oss"])
def test_the_check_finds_logits_that_are_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plainly(*arguments: Any, **named: Any) -> Any:
        named |= {"softcap": None, "s_aux": None}
        return attention.registered_attention(*arguments, **named)

    for registered in (attention.ATTENTION, attention.PROBE):
        monkeypatch.setitem(AttentionInterface._global_mapping, registered, plainly)
    refused_by_the_check(wrap_model(measured_model(name), None, name=name))


def test_the_check_leaves_the_model_as_it_was() -> None:
    model = wrap_model(measured_model("gemma3"), None, name="m")
    self_check(model)
    assert model.model.config.sliding_window == 24
    assert model.model.model.layers[0].self_attn.sliding_window == 24
    assert checking.THRESHOLDS["sliding_window"] < 24


def test_longrope_is_chosen_once_by_the_length_of_a_run() -> None:
    model = wrap_model(measured_model("phi4-mini"), None, name="phi4-mini")
    assert model.long_rope is not None
    prompt = tokens(300)
    expected = generated(measured_model("phi4-mini"), prompt)
    assert run_rows(model, [row(prompt, "full", 1.0)], prefill_chunk=64)[0].tokens == expected
    short = run_rows(model, [row(PROMPTS[0], "full", 1.0)], prefill_chunk=20)[0].tokens
    assert short == generated(measured_model("phi4-mini"), PROMPTS[0])
    assert model.long_rope.choose(300, fix=True) == "long"
    fixed = run_rows(model, [row(PROMPTS[0], "full", 1.0)], prefill_chunk=20)[0].tokens
    assert fixed != short


def test_yarn_reaches_factor_times_the_trained_length() -> None:
    assert wrap_model(measured_model("llama-yarn"), None, name="m").max_context == 2048


def test_arguments_that_would_be_ignored_are_refused() -> None:
    module: Any = torch.nn.Module()
    module.layer_idx = 0
    query = torch.zeros(1, 2, 3, 4)
    unknown: list[dict[str, Any]] = [{"position_bias": query}, {"indices": query}, {"new": 1}]
    for given in unknown:
        with pytest.raises(InputError, match=next(iter(given))):
            attention.registered_attention(module, query, query, query, None, **given)
    with pytest.raises(InputError, match="not causal"):
        attention.registered_attention(module, query, query, query, None, is_causal=False)
    with pytest.raises(InputError, match="mask"):
        attention.registered_attention(
            module, query, query, query, torch.zeros(1, 1, 3, 3), kv=attention.Probe()
        )


def test_wrong_shapes_never_reach_a_kernel() -> None:
    model = wrap_model(measured_model("llama"), None, name="m")
    heads = torch.zeros(1, 4, 3, 16)
    call = attention.AttentionCall(0, heads, heads, heads, attention.Rules(1.0))
    with pytest.raises(InputError, match="shapes"):
        attention.check_shapes(call, model.layers)


def test_masks_that_are_more_than_causal_are_refused() -> None:
    def both_ways(batch: Any, head: Any, query: Any, entry: Any) -> Any:
        return entry <= query + 1

    with pytest.raises(InputError, match="masks its attention"):
        attention.MaskRule(both_ways, None).limit()


@pytest.mark.parametrize("size", [24, 4097, 131072, 10**12])
def test_masks_of_any_size_are_recognised(size: int) -> None:
    def sliding(batch: Any, head: Any, query: Any, entry: Any) -> Any:
        return (entry <= query) & (entry > query - size)

    def chunked(batch: Any, head: Any, query: Any, entry: Any) -> Any:
        return (entry <= query) & (entry // size == query // size)

    def longer(batch: Any, head: Any, query: Any, entry: Any) -> Any:
        return (entry <= query) & (entry >= query - size)

    assert attention.MaskRule(sliding, size).limit() == Limit(size)
    assert attention.MaskRule(chunked, size).limit() == Limit(size, chunked=True)
    with pytest.raises(InputError, match="masks its attention"):
        attention.MaskRule(longer, size).limit()


def test_layers_that_share_keys_count_once() -> None:
    model = wrap_model(measured_model("gemma3n"), None, name="m")
    assert [layer.source for layer in model.layers] == [0, 1, 2, 3, 2, 3]
    outcome = run_rows(model, [row(PROMPTS[0], "full", 1.0)], prefill_chunk=None)[0]
    n = len(PROMPTS[0]) + ANSWER - 1
    window = 24
    full, sliding = n * (n + 1) // 2, window * (window + 1) // 2 + (n - window) * window
    assert outcome.full_rows == outcome.resident_rows == 2 * (2 * full + 2 * sliding)
    assert layers.kv_shape(model.layers, "m").acting == (1, 3)
