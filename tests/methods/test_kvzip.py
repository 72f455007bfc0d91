"""KVzip, compared with a slow implementation of the paper: plain forwards and the oracles."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engine import SCORES, tokens
from helpers.models import loaded_model, plain_model
from helpers.oracles import best, kvzip, kvzip_scores
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvbench.engine import replay
from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.load import LoadedModel
from kvbench.spec import method_names, parse_method

PROMPT, CHUNK, LAYERS, KV_HEADS, HEAD = 90, 40, 3, 2, 8
CUE = [7, 3, 11]


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "REPLAY_CHUNK", CHUNK)


def with_cue(architecture: str = "llama") -> LoadedModel:
    """A model whose tokenizer knows nothing but the cue."""
    tokenizer = SimpleNamespace(encode=lambda text, **_: CUE, eos_token_id=None)
    return replace(loaded_model(architecture), tokenizer=tokenizer)


def run(
    budget: float,
    name: str = "kvzip",
    architecture: str = "llama",
    chunk: int | None = None,
    **o: Any,
) -> Outcome:
    row = Row(tokens(PROMPT, 5), 6, parse_method(name, o), budget)
    model = with_cue(architecture)
    return run_rows(model, [row], prefill_chunk=chunk, keep_positions=True)[0]


def slow_scores(architecture: str) -> list[Tensor]:
    """[K, n] of each layer: each chunk is read again, after the cue, on top of the prompt."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def recording(module: Any, query: Tensor, key: Tensor, *rest: Any, **named: Any) -> Any:
        seen[module.layer_idx] = query[0].double(), key[0].double()
        return sdpa_attention_forward(module, query, key, *rest, **named)

    AttentionInterface.register("recording", recording)
    model, prompt = plain_model(architecture), tokens(PROMPT, 5)
    model.set_attn_implementation("recording")
    scores: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    for start in range(0, PROMPT, CHUNK):
        chunk = prompt[start : start + CHUNK]
        stop = start + len(chunk)
        with torch.inference_mode():  # no cache: the whole text once more, and what follows it
            model(torch.tensor([[*prompt, *CUE, *chunk]]), use_cache=False)
        for layer, (query, key) in seen.items():
            again = kvzip_scores(
                query[:, PROMPT:],
                key[:, : min(4, start)],
                key[:, start:stop],
                key[:, PROMPT:],
                query.shape[2] ** -0.5,
            )
            scores[layer].append(again)
    return [torch.cat(parts, 1) for parts in scores]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("chunk", [None, 25])
def test_it_keeps_what_the_paper_says(architecture: str, budget: float, chunk: int | None) -> None:
    scores, found = slow_scores(architecture), run(budget, "kvzip", architecture, chunk).kept
    kept = LAYERS * KV_HEADS * round(budget * PROMPT)
    assert found == kvzip(scores, LAYERS * KV_HEADS * PROMPT - kept)
    sizes = {len(head) for layer in found for head in layer}
    assert len(sizes) > 1  # layers and heads differ


@pytest.mark.parametrize("sinks", [0, 4])
def test_with_a_uniform_budget_each_head_keeps_its_best(sinks: int) -> None:
    found = run(0.3, uniform="true", sinks=sinks).kept
    for layer, scores in enumerate(slow_scores("llama")):
        scores[:, :sinks] = torch.inf
        assert found is not None
        assert found[layer] == [best(head, round(0.3 * PROMPT)) for head in scores]


def test_a_head_split_and_competing_heads_take_the_same_scores() -> None:
    scores = slow_scores("llama")
    for each in scores:
        each[:, :4] = torch.inf
    options: dict[str, Any] = {
        "scores": str(SCORES),
        "prulong.sinks": 2,
        "prulong.window": 7,
    }
    split = run(0.5, "prulong+kvzip", uniform="true", post_fill_budget=0.4, **options).kept
    layers = run(0.3, "ada-kvzip", head_share=0.0).kept
    assert split is not None
    assert layers is not None
    # In later layers, what the streaming heads have evicted changes what the retrieval heads read.
    assert split[0][0] == best(scores[0][0], round(0.4 * PROMPT))
    assert {len(split[layer][head]) for layer, head in ((1, 1), (2, 0))} == {round(0.4 * PROMPT)}
    for layer, kept in enumerate(layers):
        flat = [head * PROMPT + position for head in range(KV_HEADS) for position in kept[head]]
        assert flat == best(scores[layer].flatten(), KV_HEADS * round(0.3 * PROMPT))


def test_a_budget_of_1_is_full_attention_without_a_replay() -> None:
    outcome, full = run(1.0), run(1.0, "full")
    assert outcome.tokens == full.tokens
    assert outcome.kv_footprint == outcome.kv_peak == 1
    assert outcome.replay_rows == 0


@pytest.mark.parametrize("chunk", [None, 25])
def test_what_a_replay_holds_counts_in_the_peak_and_not_in_the_footprint(chunk: int | None) -> None:
    outcome, once = run(0.3, chunk=chunk), run(0.3, "knorm", chunk=chunk)
    longest, chunks = len(CUE) + CHUNK, -(-PROMPT // CHUNK)
    heads, end = LAYERS * KV_HEADS, PROMPT + 5
    assert outcome.replay_rows == PROMPT + chunks * len(CUE)
    assert once.replay_rows == 0
    assert outcome.resident_rows == once.resident_rows
    # A token is one moment in all layers; as executed, one layer at a time holds the replay, when
    # all others still hold the whole prompt.
    assert outcome.kv_peak == (PROMPT + longest) / end
    assert outcome.kv_held_peak == (heads * PROMPT + KV_HEADS * longest) / (heads * end)
    entry = 2 * HEAD * 4  # bytes of a key and a value
    storage = heads * (PROMPT + 5)  # for the answer as well
    assert outcome.kv_bytes_peak == entry * (storage + KV_HEADS * longest)


def test_a_budget_smaller_than_the_sinks() -> None:
    kept = run(0.01).kept
    assert kept is not None
    assert sum(len(head) for layer in kept for head in layer) == LAYERS * KV_HEADS
    assert all(position < 4 for layer in kept for head in layer for position in head)


def test_rows_of_one_prompt_measure_what_they_measure_alone() -> None:
    model = with_cue()
    rows = [
        Row(tokens(PROMPT, 5), 6, parse_method(name, {}), budget)
        for name in ("kvzip", "snapkv", "full")
        for budget in ((1.0,) if name == "full" else (0.2, 0.6))
    ]
    together = run_rows(model, rows, prefill_chunk=25, keep_positions=True)
    for row, outcome in zip(rows, together, strict=True):
        (alone,) = run_rows(model, [row], prefill_chunk=25, keep_positions=True)
        for name in ("tokens", "kept", "resident_rows", "kv_peak", "kv_held_peak", "kv_bytes_peak"):
            assert getattr(outcome, name) == getattr(alone, name), (row.spec.name, name)


def test_forms_that_cannot_be_measured_are_refused() -> None:
    assert {"kvzip", "ada-kvzip"} <= set(method_names())
    assert not {"kvzip-naive", "kvzip-bounded", "kvzip-patched"} & set(method_names())
    with pytest.raises(InputError, match="whole prompt"):
        parse_method("kvzip-naive", {"uniform": "true"})
    with pytest.raises(InputError, match="limited attention"):
        run(0.3, architecture="mistral-sliding", uniform="true")
