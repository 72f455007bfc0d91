"""Rows that share work give the same as rows that run alone."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.engine import measurable, scores_tie, spec, tokens
from helpers.models import loaded_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.engine.cache import Ledger
from kvbench.engine.prefill import prefill
from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.spec import method_names

LAYERS, KV_HEADS = 3, 2
COMBINED = ["prulong+snapkv", "duoattention+pyramidkv-naive", "prulong+snapkv-patched"]


def measured(outcome: Outcome) -> Outcome:
    """An outcome without what depends on the other rows: times, and memory of all rows."""
    return replace(
        outcome,
        prefill_seconds=0.0,
        decode_seconds=0.0,
        shared_rows=0,
        group_bytes_peak=0,
    )


def assert_equals_alone(model: Any, rows: list[Row], chunk: int | None) -> None:
    together = run_rows(model, rows, prefill_chunk=chunk)
    for row, outcome in zip(rows, together, strict=True):
        alone = run_rows(model, [row], prefill_chunk=chunk)[0]
        assert measured(outcome) == measured(alone), (row.spec.name, row.budget, chunk)


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize("chunk", [None, 30])
def test_all_methods_and_budgets_of_a_prompt_equal_those_alone(
    architecture: str, chunk: int | None
) -> None:
    model = loaded_model(architecture)
    prompt = tokens(100, 2)
    names = [*method_names(), *COMBINED]
    if architecture == "gemma3":  # it normalises keys: their norms tie, but for rounding
        names = [name for name in names if "knorm" not in name]
    names = measurable(names, model)
    rows = [
        Row(prompt, 9, spec(name), budget, seed=4)
        for name in names
        for budget in ((1.0,) if name == "full" else (0.1, 0.6))
    ]
    assert_equals_alone(model, rows, chunk)
    without_baseline = [row for row in rows if row.spec.name in ("snapkv", "pyramidkv", "random")]
    assert_equals_alone(model, without_baseline, chunk)


@pytest.mark.parametrize("other", ["random", "full", "snapkv"])
def test_bytes_while_a_question_is_read_do_not_depend_on_other_rows(other: str) -> None:
    """A row that leaves a shared stream has its KV heads in one storage, and alone in several."""
    budget = 1.0 if other == "full" else 0.5
    rows = [
        Row(tokens(30), 2, spec(name), b, 0, 8) for name, b in ((other, budget), ("knorm", 0.01))
    ]
    together = run_rows(loaded_model("gemma3"), rows, prefill_chunk=1)[1]
    alone = run_rows(loaded_model("gemma3"), rows[1:], prefill_chunk=1)[0]
    assert together.kv_bytes_peak == alone.kv_bytes_peak


def test_answers_of_which_one_outgrows_the_models_own_windows() -> None:
    rows = [Row(tokens(17), new, spec("knorm"), 0.4) for new in (1, 40, 2)]
    assert_equals_alone(loaded_model("mistral-sliding"), [*rows, replace(rows[0], budget=1)], 5)


@settings(max_examples=12, deadline=None)
@given(
    prompts=st.lists(st.integers(2, 80), min_size=1, max_size=3),
    picks=st.lists(
        st.tuples(
            st.sampled_from([*method_names(), *COMBINED]),
            st.floats(0.05, 1.0),
            st.integers(1, 9),
            st.integers(0, 2),
        ),
        min_size=2,
        max_size=7,
    ),
    chunk=st.one_of(st.none(), st.integers(1, 90)),
    window=st.integers(1, 20),
)
def test_any_rows_together_equal_each_alone(
    prompts: list[int],
    picks: list[tuple[str, float, int, int]],
    chunk: int | None,
    window: int,
) -> None:
    rows = [
        Row(tokens(prompts[which % len(prompts)], which), new, spec(name, window), budget, 1)
        for name, budget, new, which in picks
        if not scores_tie(name, budget * (prompts[which % len(prompts)] + new))
        # A token that the model repeats has the norms that it had before, but for rounding.
        and not name.startswith("cur")
    ]
    assert_equals_alone(loaded_model(), rows, chunk)


def test_forks_do_not_disturb_each_other_or_the_baseline() -> None:
    """The same rows keep the same entries, in any order and with any other rows."""
    model = loaded_model()
    rows = [
        Row(tokens(90), 5, spec(name), budget, 2)
        for name, budget in (("snapkv", 0.2), ("full", 1.0), ("random", 0.6), ("snapkv", 0.7))
    ]

    def kept(order: list[int]) -> list[Any]:
        ledger = Ledger()
        with torch.inference_mode():
            states = prefill(model, [rows[i] for i in order], 40, ledger)
        held = sum(
            group.keys.nbytes + group.values.nbytes
            for state in states
            for groups in state.cache.layers
            for group in groups
            if group.keys is not None and group.values is not None
        )
        assert ledger.bytes == held  # all storage belongs to a row, or is freed
        found = {i: state.cache.kept() for i, state in zip(order, states, strict=True)}
        storages = [
            g.entries().keys.data_ptr() for s in states for gs in s.cache.layers for g in gs
        ]
        assert len(set(storages)) == len(storages)
        return [found[i] for i in sorted(order)]

    everything = kept([0, 1, 2, 3])
    assert kept([3, 2, 1, 0]) == everything
    assert [kept([i])[0] for i in range(4)] == everything


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(2, 90),
    new=st.integers(1, 12),
    chunk=st.one_of(st.none(), st.integers(1, 100)),
    budget=st.floats(0.05, 1.0),
    name=st.sampled_from([*method_names(), *COMBINED]),
)
def test_the_area_under_the_timeline_is_the_footprint(
    prompt: int, new: int, chunk: int | None, budget: float, name: str
) -> None:
    model = loaded_model()
    got = run_rows(model, [Row(tokens(prompt), new, spec(name), budget)], prefill_chunk=chunk)[0]
    line = got.timeline
    assert line[0] == [0, 0]
    assert line[-1][0] == prompt + got.new_tokens - 1
    assert all(a[0] <= b[0] for a, b in pairwise(line))
    # Each token adds an entry to each head: the line counts 1/2 for it on the way up, and the count
    # is 1. While a full window decodes, that entry leaves at once: the line is flat, and the count
    # is 1 above it.
    twice_area = sum((b[0] - a[0]) * (a[1] + b[1]) for a, b in pairwise(line))
    heads = LAYERS * KV_HEADS
    twice = twice_area + heads * line[-1][0]
    flat = sum(
        (b[0] - a[0]) * heads - (b[1] - a[1]) for a, b in pairwise(line) if prompt <= a[0] < b[0]
    )
    assert got.resident_rows * 2 == twice + flat
