"""What a method may not do: each is stopped with an error that names it, and harms nobody."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import broken
from helpers.architectures import measured_model
from helpers.engine import spec, tokens
from helpers.models import loaded_model

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import ContractError, InputError
from kvbench.method import EVERY_QUERY, DecodingMethod, Family, LayerView, Method, Pages
from kvbench.models.load import wrap_model
from kvbench.spec import Chunking, MethodSpec, checked

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


def decoding(**members: Any) -> MethodSpec:
    """A method that evicts every second decoded token, with other members."""
    own = {"name": "bad", "scores": lambda self, view: broken.norms(view), **members}
    return broken.spec(type("Bad", (DecodingMethod,), own)(interval=2))


EVERY = {"observation_window": EVERY_QUERY}


@pytest.mark.parametrize(
    ("gather", "message"),
    [
        (lambda self, view: None, "gather returns None; expected a tensor"),
        (lambda self, view: view.attention[:, :3], "expected [KV heads, entries] = [2, "),
        (lambda self, view: view.queries.mul_(0).sum((1, 2)), "gather writes to the view"),
        (lambda self, view: view.attention * torch.nan, "scores returns "),
    ],
)
def test_wrong_gathering(gather: Any, message: str) -> None:
    bad = decoding(**EVERY, gather=gather, scores=lambda self, view: view.gathered)
    assert message in fault(bad, 25)


@pytest.mark.parametrize("per_entry", [True, False])
@pytest.mark.parametrize("where", ["gather", "scores"])
def test_what_was_gathered_is_read_only(where: str, per_entry: bool) -> None:
    """It is shared by all budgets of a sweep."""

    def gather(self: Method, view: LayerView) -> torch.Tensor:
        if view.gathered is None or where == "scores":
            return view.attention
        return view.gathered.mul_(2)

    def scores(self: Method, view: LayerView) -> torch.Tensor:
        assert view.gathered is not None
        return broken.norms(view) + (view.gathered.add_(1).sum() if where == "scores" else 0)

    bad = decoding(**EVERY, gather=gather, scores=scores, gathers_per_entry=per_entry)
    assert f"{where} writes to the view" in fault(bad, 25)


@pytest.mark.parametrize(
    "select",
    [
        lambda self, view, scores, capacity: scores.topk(capacity).indices * 0,
        lambda self, view, scores, capacity: scores.topk(capacity).indices + 1000,
        lambda self, view, scores, capacity: scores.topk(capacity).values,
        lambda self, view, scores, capacity: scores.topk(capacity - 1).indices,
    ],
)
def test_wrong_selections(select: Any) -> None:
    assert "layer 0: select returns " in fault(decoding(select=select), 25)


def test_a_selection_that_draws_does_not_depend_on_other_budgets() -> None:
    def select(self: Method, view: LayerView, scores: torch.Tensor, capacity: int) -> torch.Tensor:
        return torch.rand(scores.shape, generator=view.generator).topk(capacity).indices

    method = decoding(select=select)
    rows = [Row(PROMPT, 9, method, budget) for budget in (0.2, 0.4, 0.6)]
    together = run_rows(loaded_model(), rows, prefill_chunk=None, keep_positions=True)
    for row, got in zip(rows, together, strict=True):
        alone = run_rows(loaded_model(), [row], prefill_chunk=None, keep_positions=True)[0]
        assert (alone.kept, alone.tokens) == (got.kept, got.tokens)


@pytest.mark.parametrize(
    "pages",
    [
        7,
        Pages(0, 0.5, 1),
        Pages(4, 0.5, 0),
        Pages(2.5, 0.5, 1),  # type: ignore[arg-type]
        Pages(4, float("nan"), 1),
        Pages(4, 1.5, 1),
        Pages(4, "all", 1),  # type: ignore[arg-type]
    ],
)
def test_wrong_pages(pages: Any) -> None:
    own = {"name": "bad", "family": Family.DYNAMIC_SPARSITY}
    bad = type("Bad", (Method,), own | {"pages": lambda self, shape, layer, budget: pages})
    assert "layer 0: pages returns " in fault(broken.spec(bad()), 25)


def test_pages_of_keys_that_several_layers_read_are_refused() -> None:
    loaded = wrap_model(measured_model("gemma3n"), None, name="gemma3n")
    with pytest.raises(
        InputError, match="'quest' cannot be measured on a model whose layers share"
    ):
        run_rows(loaded, [Row(PROMPT, 3, spec("quest"), 0.4)], prefill_chunk=None)


@pytest.mark.parametrize("member", [{"competition": "layer"}, {"head_share": 2.0}])
def test_a_wrong_competition(member: dict[str, Any]) -> None:
    bad = decoding(**member)
    with pytest.raises(InputError, match=r"method 'bad' has the competition .*; expected"):
        checked(bad)


def test_queries_that_no_eviction_will_see_are_not_kept() -> None:
    rows = [Row(PROMPT, 5, spec("h2o", interval=interval), 0.4) for interval in (4, 10**9)]
    short, long = run_rows(loaded_model(), rows, prefill_chunk=None)
    assert short.kv_bytes_peak == long.kv_bytes_peak
