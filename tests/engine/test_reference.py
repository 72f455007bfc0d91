"""The engine against the slow reference: tokens, positions kept, and everything counted."""

from dataclasses import dataclass

import pytest
from helpers.engine import measurable, scores_tie, spec, tokens, without_replay
from helpers.models import ARCHITECTURES, loaded_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.engine.reference import run_reference
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.method import EVERY_QUERY, Competition, DecodingMethod, LayerView
from kvbench.models.load import LoadedModel
from kvbench.spec import MethodSpec, method_names, parse_method

COMBINED = ["prulong+snapkv", "prulong+snapkv-naive", "duoattention+pyramidkv"]
COMBINED += ["duoattention+pyramidkv-patched"]
METHODS = without_replay(sorted({*method_names(), *COMBINED}))


def assert_agrees(model: LoadedModel, rows: list[Row], chunk: int | None) -> None:
    outcomes = run_rows(model, rows, prefill_chunk=chunk, keep_positions=True)
    for row, got in zip(rows, outcomes, strict=True):
        expected = run_reference(model, row, chunk)
        where = row.spec.name, row.budget, chunk
        assert got.kept == expected.kept, where
        assert got.tokens == expected.tokens, where
        assert got.resident_rows == expected.resident_rows, where
        assert round(got.kv_reads * got.full_rows) == expected.read_rows, where
        assert got.patch_rows == expected.patch_rows, where
        if all(layer.limit is None for layer in model.layers):  # else rows count what they see
            assert got.kv_peak == expected.kv_peak, where
        assert got.kv_peak <= 1 or got.patch_rows, where


def names_for(architecture: str) -> list[str]:
    """Some architectures normalise keys: their norms tie, but for rounding."""
    ties = architecture in ("gemma3", "qwen3")
    names = [name for name in METHODS if not (ties and "knorm" in name)]
    return measurable(names, loaded_model(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("chunk", [None, 25])
def test_every_method_on_every_architecture(architecture: str, chunk: int | None) -> None:
    rows = [Row(tokens(64, 1), 7, spec(name), 0.4, seed=3) for name in names_for(architecture)]
    assert_agrees(loaded_model(architecture), rows, chunk)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("name", ["tova", "h2o", "random-decoding", "keydiff-bounded"])
def test_evictions_while_the_models_own_windows_fill(name: str, attention: str) -> None:
    rows = [Row(tokens(5), new, spec(name, interval=2), 0.4) for new in (3, 20, 40)]
    assert_agrees(loaded_model("gemma3", attention=attention), rows, 4)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("budget", [0.05, 0.4, 1.0])
def test_every_method_at_every_budget(attention: str, budget: float) -> None:
    rows = [Row(tokens(70, 2), 6, spec(name), budget, seed=1) for name in METHODS]
    assert_agrees(loaded_model(attention=attention), rows, 16)


@dataclass(frozen=True)
class Attended(DecodingMethod):
    """Scores entries by all attention so far, and lets KV heads compete."""

    name = "attended"
    observation_window = EVERY_QUERY
    competition = Competition.LAYER

    def gather(self, view: LayerView) -> Tensor:
        return view.attention if view.gathered is None else view.gathered + view.attention

    def scores(self, view: LayerView) -> Tensor:
        assert view.gathered is not None
        return view.gathered


@pytest.mark.parametrize("context", [None, 60])
@pytest.mark.parametrize("chunk", [None, 25])
def test_heads_that_compete_by_what_a_method_has_gathered(
    chunk: int | None, context: int | None
) -> None:
    attended = MethodSpec("attended", Attended(interval=0))
    assert_agrees(loaded_model(), [Row(tokens(90, 1), 6, attended, 0.3, context=context)], chunk)


@pytest.mark.parametrize("name", ["snapkv-naive", "snapkv-patched"])
@pytest.mark.parametrize(("chunk", "budget"), [(32, 0.4), (40, 0.5), (90, 0.3), (20, 0.2)])
def test_chunked_eviction(name: str, chunk: int, budget: float) -> None:
    assert_agrees(loaded_model(), [Row(tokens(96, 5), 4, spec(name), budget)], chunk)


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_that_are_shorter_than_the_observation_window(chunk: int) -> None:
    names = [name for name in METHODS if name.endswith(("-naive", "-bounded"))]
    rows = [Row(tokens(24, 7), 5, spec(name), 0.5) for name in names]
    assert_agrees(loaded_model(), rows, chunk)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(("chunk", "budget"), [(None, 0.3), (25, 0.3), (16, 0.7)])
def test_a_question_that_is_read_after_the_eviction(
    architecture: str, chunk: int | None, budget: float
) -> None:
    rows = [
        Row(tokens(64, 1), 7, spec(name), budget, seed=3, context=42)
        for name in names_for(architecture)
    ]
    assert_agrees(loaded_model(architecture), rows, chunk)


@settings(max_examples=20, deadline=None)
@given(
    prompt=st.integers(2, 80),
    new=st.integers(1, 12),
    budget=st.floats(0.03, 1.0),
    chunk=st.one_of(st.none(), st.integers(1, 90)),
    window=st.integers(1, 20),
    interval=st.integers(0, 5),
    question=st.integers(0, 30),
    names=st.lists(st.sampled_from(METHODS), min_size=1, max_size=3),
)
def test_any_rows(
    prompt: int,
    new: int,
    budget: float,
    chunk: int | None,
    window: int,
    interval: int,
    question: int,
    names: list[str],
) -> None:
    context = prompt - question if 0 < question < prompt else None
    names = [name for name in names if not scores_tie(name, budget * (prompt + new))]
    rows = [
        Row(tokens(prompt), new, spec(name, window, interval), budget, 2, context) for name in names
    ]
    assert_agrees(loaded_model(), rows, chunk)


def test_an_end_token_ends_the_answer() -> None:
    model = loaded_model()
    row = Row(tokens(40), 12, parse_method("full", {}), 1.0)
    answer = run_reference(model, row, None).tokens
    model.model.generation_config.eos_token_id = answer[5]
    expected = answer[: answer.index(answer[5])]
    assert run_reference(model, row, None).tokens == expected
    assert_agrees(model, [row], 16)
