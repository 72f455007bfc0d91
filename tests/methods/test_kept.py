"""What methods keep equals what slow implementations of their papers keep.

Those get queries, keys and values of a plain transformers forward (`helpers.oracles`).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers import oracles
from helpers.capture import Captured, captured
from helpers.models import loaded_model, plain_model

from kvbench.engine import decode_eviction
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.method import draw_seed
from kvbench.models.load import LoadedModel, load_model
from kvbench.registry import tasks
from kvbench.spec import method_names, parse_method
from kvbench.sweep.plan import Settings, encode_prompt, make_sample

Oracle = Callable[[Captured, int], oracles.Kept]  # of a layer and a capacity


def snapkv(layer: Captured) -> torch.Tensor:
    return oracles.snapkv_scores(layer.queries, layer.keys, layer.scaling)


AFTER_THE_PROMPT: dict[str, Oracle] = {
    "keydiff": lambda x, c: oracles.keydiff(x.keys, c),
    "lagkv": lambda x, c: oracles.lagkv(x.keys, x.values, c),
    "cur": lambda x, c: oracles.cur(x.keys, x.values, c),
    "tova": lambda x, c: oracles.tova(x.queries, x.keys, x.scaling, c),
    "h2o": lambda x, c: oracles.h2o(x.queries, x.keys, x.scaling, c),
    "r-kv": lambda x, c: oracles.r_kv(x.queries, x.keys, x.scaling, c),
    "snapkv": lambda x, c: oracles.kept(snapkv(x), c),
    "ada-snapkv": lambda x, c: oracles.ada(snapkv(x), c),
    "chunkkv": lambda x, c: oracles.chunkkv(snapkv(x), c),
    "criticalkv": lambda x, c: oracles.criticalkv(snapkv(x), x.values, x.output, c),
}


@cache
def example(name: str) -> tuple[LoadedModel, list[int], list[Captured]]:
    """A model, a prompt, and what the model computes of it by itself."""
    if name == "tiny":
        model = load_model("tiny", device="cpu", dtype="float32")
        settings = Settings(400, 0, 1, (400,), (0.5,), chat_template=False)
        sample = make_sample(model, tasks.get("recall")(), 0, settings)
        prompt = encode_prompt(model.tokenizer, sample, chat=None)
        return model, prompt, captured(model.model, prompt)
    prompt = torch.randint(1, 199, (333,), generator=torch.Generator().manual_seed(7)).tolist()
    return loaded_model(name), prompt, captured(plain_model(name), prompt)


@pytest.mark.parametrize("model", ["llama", "tiny"])
@pytest.mark.parametrize("name", AFTER_THE_PROMPT)
def test_after_the_prompt(name: str, model: str) -> None:
    loaded, prompt, layers = example(model)
    budgets = [0.25, 0.3, 0.51]
    rows = [Row(prompt, 1, parse_method(name, {"interval": 0}), budget) for budget in budgets]
    outcomes = run_rows(loaded, rows, prefill_chunk=100, keep_positions=True)
    for budget, outcome in zip(budgets, outcomes, strict=True):
        capacity = round(budget * len(prompt))
        expected = [AFTER_THE_PROMPT[name](layer, capacity) for layer in layers]
        if model == "tiny" and outcome.kept is not None:  # it repeats tokens, whose scores tie
            assert common(outcome.kept, expected) >= 0.999
        else:
            assert outcome.kept == expected, budget


def common(kept: list[oracles.Kept], expected: list[oracles.Kept]) -> float:
    """The share of the kept entries that both have."""
    pairs = [
        (set(ours), set(theirs))
        for layers in zip(kept, expected, strict=True)
        for ours, theirs in zip(*layers, strict=True)
    ]
    assert sum(len(ours) for ours, _ in pairs) == sum(len(theirs) for _, theirs in pairs)
    return sum(len(a & b) for a, b in pairs) / sum(len(a) for a, _ in pairs)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_lagkv_with_many_partitions(budget: float) -> None:
    loaded, prompt, layers = example("llama")
    row = Row(prompt, 1, parse_method("lagkv", {"interval": 0, "lag": 16, "sinks": 3}), budget)
    (outcome,) = run_rows(loaded, [row], prefill_chunk=None, keep_positions=True)
    capacity = round(budget * len(prompt))
    assert outcome.kept == [oracles.lagkv(x.keys, x.values, capacity, 3, 16) for x in layers]


OPTIONS: dict[str, dict[str, Any]] = {
    "lagkv": {"lag": 6, "sinks": 2},
    "cur": {"local": 5, "sinks": 2},
    "r-kv": {"window": 4, "kernel": 3},
}
WHILE_DECODING: dict[str, Oracle] = {
    "keydiff": lambda x, c: oracles.keydiff(x.keys, c),
    "lagkv": lambda x, c: oracles.lagkv(x.keys, x.values, c, sinks=2, lag=6),
    "cur": lambda x, c: oracles.cur(x.keys, x.values, c, sinks=2, window=5),
    "tova": lambda x, c: oracles.tova(x.queries, x.keys, x.scaling, c),
    "r-kv": lambda x, c: oracles.r_kv(x.queries, x.keys, x.scaling, c, window=4, kernel=3),
}
PROMPT, NEW = 40, 25


def evictions_of(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[oracles.Kept], list[oracles.Kept], Captured]:
    """Positions held after each eviction while decoding, and after the prompt; and the layer.

    The model has one layer, whose entries do not depend on what was evicted.
    """
    held: list[oracles.Kept] = []
    compact = decode_eviction.compact

    def noting(state: Any, group: Any, stay: Any) -> None:
        compact(state, group, stay)
        positions = group.entries().positions[:, : group.length].sort(dim=-1).values.tolist()
        if group.heads[0] == 0:
            held.append([])
        held[-1] += positions

    monkeypatch.setattr(decode_eviction, "compact", noting)
    prompt = torch.randint(1, 199, (PROMPT,), generator=torch.Generator().manual_seed(4)).tolist()
    row = Row(prompt, NEW, parse_method(name, options), 0.3, seed=5)
    model = loaded_model(num_hidden_layers=1)
    (outcome,) = run_rows(model, [row], prefill_chunk=16, keep_positions=True)
    text = prompt + outcome.tokens[:-1]
    assert 0 not in text  # its key is 0, and has no cosine
    (layer,) = captured(plain_model(num_hidden_layers=1), text)
    assert outcome.kept is not None
    return held, outcome.kept, layer


def ends(interval: int) -> list[int]:
    """Tokens that have been read at each eviction; the last token that is read ends the row."""
    return list(range(PROMPT, PROMPT + NEW - 1, interval))


@pytest.mark.parametrize("interval", [1, 3, 8])
@pytest.mark.parametrize("capacity", [21, 46])
@pytest.mark.parametrize("name", WHILE_DECODING)
def test_while_decoding(
    name: str, capacity: int, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"interval": interval, "capacity": capacity, **OPTIONS.get(name, {})}
    held, after_prompt, layer = evictions_of(name, options, monkeypatch)
    assert held

    def keep(head: int) -> Callable[[list[int]], list[int]]:
        # All heads of TOVA hold the same; the others choose for each head alone.
        group = 2

        def of(positions: list[int]) -> list[int]:
            heads = slice(None) if name == "tova" else slice(head, head + 1)
            queries = slice(None) if name == "tova" else slice(head * group, (head + 1) * group)
            at = torch.tensor(positions)
            seen = Captured(
                layer.queries[queries, : positions[-1] + 1],
                layer.keys[heads][:, at],
                layer.values[heads][:, at],
                layer.scaling,
                layer.output,
            )
            return WHILE_DECODING[name](seen, capacity)[0]

        return of

    def expected(evictions: list[int]) -> oracles.Kept:
        return [oracles.holding(keep(head), capacity, evictions) for head in range(2)]

    assert after_prompt == [expected([PROMPT])]
    late = [k for k, end in enumerate(ends(interval)) if k and end > capacity]
    wanted = [expected(ends(interval)[: k + 1]) for k in late]
    if name == "cur":  # a token that the model repeats has the norms that it had before
        assert_equal_until_a_tie(held, wanted, layer)
    else:
        assert held == wanted


def assert_equal_until_a_tie(
    held: list[oracles.Kept], wanted: list[oracles.Kept], layer: Captured
) -> None:
    """All evictions of a head keep what is wanted, or, at the first that does not, equal entries.

    Rounding decides between entries of the same token, and machines round differently. What is kept
    afterwards follows from that, so it is not compared.
    """
    assert len(held) == len(wanted)
    for head, values in enumerate(layer.values):
        for ours, theirs in zip(
            (kept[head] for kept in held), (kept[head] for kept in wanted), strict=True
        ):
            if ours != theirs:
                torch.testing.assert_close(values[ours].sum(0), values[theirs].sum(0))
                break


@pytest.mark.parametrize("interval", [1, 3, 8])
@pytest.mark.parametrize("capacity", [21, 46])
def test_h2o_while_decoding(capacity: int, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"interval": interval, "capacity": capacity}
    held, after_prompt, layer = evictions_of("h2o", options, monkeypatch)

    def expected(evictions: list[int]) -> oracles.Kept:
        read = evictions[-1]
        queries, keys = layer.queries[:, :read], layer.keys[:, :read]
        return oracles.h2o_decoding(queries, keys, layer.scaling, capacity, PROMPT, evictions)

    assert after_prompt == [expected([PROMPT])]
    late = [k for k, end in enumerate(ends(interval)) if k and end > capacity]
    assert held == [expected(ends(interval)[: k + 1]) for k in late]


@pytest.mark.parametrize("interval", [1, 3, 8])
@pytest.mark.parametrize("capacity", [40, 46])
def test_random_decoding(capacity: int, interval: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"interval": interval, "capacity": capacity}
    held, after_prompt, _ = evictions_of("random-decoding", options, monkeypatch)
    assert after_prompt == [[list(range(PROMPT))] * 2]
    late = [k for k, end in enumerate(ends(interval)) if k and end > capacity]

    def expected(head: int, evictions: list[int]) -> list[int]:
        starts = iter(end - interval for end in evictions if end > capacity)

        def draw(count: int) -> torch.Tensor:
            generator = torch.Generator().manual_seed(draw_seed(5, 0, next(starts)))
            return torch.rand((2, PROMPT + count), generator=generator)[head, PROMPT:]

        return oracles.random_keeping_prompt(draw, capacity, PROMPT, evictions)

    assert held == [[expected(head, ends(interval)[: k + 1]) for head in range(2)] for k in late]


def test_random_decoding_gives_up_the_answer_first(monkeypatch: pytest.MonkeyPatch) -> None:
    held, after_prompt, _ = evictions_of(
        "random-decoding", {"interval": 3, "capacity": 21}, monkeypatch
    )
    assert after_prompt[0][0] != after_prompt[0][1]  # each KV head draws
    assert held == [after_prompt[0]] * len(held)


def test_a_budget_of_1_is_full_attention() -> None:
    prompt = torch.randint(1, 199, (150,), generator=torch.Generator().manual_seed(9)).tolist()
    names = [
        name
        for name in method_names()
        if name.split("-")[0] not in ("prulong", "duoattention", "random")
    ]
    rows = [
        Row(prompt, 20, parse_method(name, {}), 1.0) for name in ["full", *names, "random-decoding"]
    ]
    baseline, *outcomes = run_rows(loaded_model(), rows, prefill_chunk=64)
    for row, outcome in zip(rows[1:], outcomes, strict=True):
        assert outcome.tokens == baseline.tokens, row.spec.name
        assert outcome.resident_rows == baseline.resident_rows, row.spec.name
