"""What a method may not do: each is stopped with an error that names it, and harms nobody."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import broken
from helpers.engine import spec, tokens
from helpers.models import loaded_model

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import ContractError
from kvbench.method import LayerView, Method
from kvbench.spec import Chunking, MethodSpec

PROMPT = tokens(60)


def fault(bad: MethodSpec, chunk: int | None) -> str:
    """The error of a run with a method."""
    with pytest.raises(ContractError) as found:
        run_rows(loaded_model(), [Row(PROMPT, 3, bad, 0.4)], prefill_chunk=chunk)
    assert found.value.method == "bad"
    return str(found.value)


@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize("chunking", [Chunking.NONE, Chunking.NAIVE])
@pytest.mark.parametrize(("scores", "message"), broken.SCORES.values(), ids=broken.SCORES)
def test_wrong_scores(
    scores: Callable[[LayerView], Any], message: str, chunking: Chunking, chunk: int | None
) -> None:
    text = fault(broken.spec(broken.method(scores), chunking), chunk)
    assert text.startswith("method 'bad', layer 0: scores returns ")
    assert message in text


@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize(("capacity", "message"), broken.CAPACITIES.values(), ids=broken.CAPACITIES)
def test_wrong_capacities(
    capacity: Callable[[LayerView, float], Any], message: str, chunk: int | None
) -> None:
    text = fault(broken.spec(broken.method(capacity=capacity)), chunk)
    assert text.startswith("method 'bad', layer 0: capacity returns ")
    assert message in text


@pytest.mark.parametrize(("windows", "message"), broken.WINDOWS.values(), ids=broken.WINDOWS)
def test_wrong_windows(windows: Callable[[Any], Any], message: str) -> None:
    text = fault(broken.spec(broken.method(windows=windows)), 25)
    assert text.startswith("method 'bad'")
    assert message in text


@pytest.mark.parametrize("window", [-1, 2.0, None, True])
def test_a_wrong_observation_window(window: Any) -> None:
    class Watching(type(broken.method())):  # type: ignore[misc]
        observation_window = window

    assert "observation_window is " in fault(broken.spec(Watching()), 25)


def test_a_wrong_answer_in_a_later_layer_names_the_layer() -> None:
    def scores(view: LayerView) -> torch.Tensor:
        good = broken.norms(view)
        return good if view.layer < 2 else good * torch.nan

    text = fault(broken.spec(broken.method(scores)), None)
    assert text == (
        "method 'bad', layer 2: scores returns 120 of 120 scores that are NaN or infinite; "
        "expected finite ones (torch.finfo(dtype).max for what must stay)"
    )


@pytest.mark.parametrize(
    "good",
    [
        broken.method(capacity=lambda view, budget: np.int64(7)),
        broken.method(capacity=lambda view, budget: 10**6),  # all stay
        broken.method(capacity=lambda view, budget: 0),
        broken.method(lambda view: broken.norms(view).to(torch.bfloat16)),
        broken.method(lambda view: broken.norms(view).double().cpu()),
        broken.method(lambda view: broken.norms(view).masked_fill(view.positions < 2, 3.4e38)),
        broken.method(lambda view: view.attention.clone().add_(view.keys.clone().mul_(2).sum(-1))),
    ],
)
def test_what_is_allowed(good: Method) -> None:
    for chunking in (Chunking.NONE, Chunking.NAIVE):
        row = Row(PROMPT, 3, broken.spec(good, chunking), 0.4)
        assert run_rows(loaded_model(), [row], prefill_chunk=25)


@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize("write", broken.WRITES.values(), ids=broken.WRITES)
def test_a_method_that_writes_to_its_view_is_stopped(
    write: Callable[[LayerView], Any], chunk: int | None
) -> None:
    text = fault(broken.spec(broken.writing(write)), chunk)
    assert text == (
        "method 'bad', layer 0: scores writes to the view; views are read-only; clone what you "
        "change"
    )


def test_a_capacity_that_writes_to_its_view_is_stopped() -> None:
    def capacity(view: LayerView, budget: float) -> int:
        view.queries.zero_()
        return 5

    assert "capacity writes to the view" in fault(broken.spec(broken.method(capacity=capacity)), 9)


@pytest.mark.parametrize("chunk", [None, 25])
def test_what_a_method_does_to_its_own_copies_reaches_no_other_method(chunk: int | None) -> None:
    """Writes that are not looked for: in a layer that is not the first, through NumPy."""

    def scores(view: LayerView) -> torch.Tensor:
        good = broken.norms(view)
        if view.layer:
            for shown in (view.queries, view.keys, view.values, view.positions, view.attention):
                shown.numpy().fill(0)
        return good

    class Watching(type(broken.method(scores))):  # type: ignore[misc]
        observation_window = 6  # that of SnapKV below: they would share a view

    model = loaded_model()
    others = [Row(PROMPT, 6, spec(name), 0.3) for name in ("snapkv", "pyramidkv", "full")]
    expected = run_rows(model, others, prefill_chunk=chunk, keep_positions=True)
    rows = [Row(PROMPT, 6, broken.spec(Watching()), 0.3), *others]
    together = run_rows(model, rows, prefill_chunk=chunk, keep_positions=True)
    for alone, beside in zip(expected, together[1:], strict=True):
        assert (alone.kept, alone.tokens) == (beside.kept, beside.tokens)
