"""Scores and selections of methods on small views, computed by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kvbench.errors import InputError
from kvbench.method import Entries, LayerView
from kvbench.registry import methods
from kvbench.spec import method_names, parse_method


def view_of(
    keys: list[Any], values: list[Any] | None = None, queries: list[Any] | None = None, **more: Any
) -> LayerView:
    """A view of keys [K, E, D], values [K, E, Dv] and queries [K, G, W, D] with scaling 1."""
    states = torch.tensor(keys)
    heads, entries, _ = states.shape
    asking = torch.empty(heads, 1, 0, states.shape[2]) if queries is None else torch.tensor(queries)
    given: dict[str, Any] = {"prompt": entries, "new": entries, **more}
    return LayerView(
        blocks=[
            [
                Entries(
                    states,
                    states if values is None else torch.tensor(values),
                    torch.arange(entries).expand(heads, -1),
                )
            ]
        ],
        queries=asking,
        query_positions=torch.arange(entries - asking.shape[2], entries),
        scaling=1.0,
        kv_heads=tuple(range(heads)),
        layer=0,
        layers=1,
        patched=0,
        last=True,
        generator=torch.Generator(),
        **given,
    )


def scores(name: str, view: LayerView, **options: Any) -> Tensor:
    found = methods.get(name)(**options).scores(view)
    assert found is not None
    return found


def equal(found: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected))


def test_keydiff() -> None:
    view = view_of([[[2.0, 0.0], [1.0, 0.0], [0.0, 5.0]]])
    # The mean of the unit keys is (2, 1) / 3.
    equal(scores("keydiff", view), [[-2 / 5**0.5, -2 / 5**0.5, -1 / 5**0.5]])


def test_lagkv() -> None:
    # A sink, a partition of two, a partition with values from 0 to 1, and one entry more. On that
    # scale the second entry's channels deviate more than the first's.
    keys = [[9.0, 9.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [7.0, 7.0]]
    view = view_of([keys])
    equal(scores("lagkv", view, sinks=1, lag=2), [[1.0, 0.0, 0.5, 1.0, 1.0, 1.0]])
    equal(scores("lagkv", view, sinks=1, lag=3), [[1.0, 0.0, 0.2, 0.4, 0.6, 0.8]])  # one partition
    chosen = methods.get("lagkv")().select(view, torch.tensor([[1.0, 0.0, 0.5, 1.0]]), 3)
    assert chosen is not None
    assert sorted(chosen[0].tolist()) == [0, 2, 3]


def test_lagkv_of_entries_that_do_not_vary() -> None:
    view = view_of([[[1.0, 2.0]] * 9])
    assert scores("lagkv", view, sinks=1, lag=2).isfinite().all()


def test_cur() -> None:
    view = view_of([[[1.0], [2.0], [3.0]]], [[[1.0], [3.0], [3.0]]])
    # Shares of a pair: 1/5 and 4/5 of keys, 1/10 and 9/10 of values; the last entry is alone.
    total = 0.02 + 0.72 + 1
    equal(scores("cur", view, sinks=0, local=2), [[0.02 / total, 0.72 / total, 1 / total]])
    equal(scores("cur", view, sinks=1, local=2), [[1.0, 0.72 / total, 1 / total]])


def test_tova() -> None:
    # The first query doubles the weight of the second key, the second sees all keys alike.
    keys = [[[0.0], [math.log(2)], [0.0]]] * 2
    view = view_of(keys, queries=[[[[1.0]]], [[[0.0]]]])
    equal(scores("tova", view), [[7 / 24, 10 / 24, 10 / 24 + 1]] * 2)  # the last entry stays


def test_h2o() -> None:
    method = methods.get("h2o")()
    view = view_of([[[0.0], [0.0], [0.0]]], queries=[[[[1.0], [1.0]]]])  # of the last two tokens
    gathered = method.gather(view)
    assert gathered is not None
    equal(gathered, [[1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3]])
    chosen = method.select(view, torch.tensor([[5.0, 1.0, 3.0, 2.0]]), 3)  # one is recent
    assert chosen is not None
    assert sorted(chosen[0].tolist()) == [0, 2, 3]


def test_r_kv() -> None:
    # Three keys that are alike, and that of the window. The latest look-alike of the first two is
    # the third, of the third the second: mean cosines are 2/4, 1/4, 0 and 0.
    keys = [[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]
    view = view_of(keys, queries=[[[[0.0, 0.0]]]])
    total = math.exp(0.5) + math.exp(0.25) + 2
    redundancy = [math.exp(0.5) / total, math.exp(0.25) / total, 1 / total]
    found = scores("r-kv", view, window=1, lam=0.25, kernel=1)
    equal(found, [[*(0.25 / 3 - 0.75 * x for x in redundancy), 0.0]])


def test_random_decoding() -> None:
    view = view_of([[[0.0]] * 6] * 2, prompt=4, new=6)
    first, second = (scores("random-decoding", view, draw=draw) for draw in (0, 1))
    assert not first.equal(second)
    assert (first[:, :4] >= 1).all()
    assert (first[:, 4:] < 1).all()
    assert first[0].ne(first[1]).all()


def test_the_window_competes_above_all_others() -> None:
    view = view_of([[[0.0]] * 4] * 2, queries=[[[[0.0], [0.0]]]] * 2)
    attention = (1 / 3 + 1 / 4) / 2
    for name in ("chunkkv", "criticalkv"):
        equal(scores(name, view, window=2, kernel=1), [[attention] * 2 + [attention + 1] * 2] * 2)
        alone = scores(name, view, window=9, kernel=1)  # nothing comes before the window
        equal(alone, (view.attention / 2).tolist())


def test_chunkkv() -> None:
    view = view_of([[[0.0]] * 5] * 2)
    given = torch.tensor([[1.0, 2.0, 8.0, 0.0, 3.0], [1.0, 0.0, 0.0, 1.0, 3.0]])
    # Means of the pairs are 2, 4.5 and, of one entry, 6.
    for capacity, expected in ((1, [4]), (2, [2, 4]), (3, [2, 3, 4]), (4, [0, 2, 3, 4])):
        chosen = parse_method("chunkkv", {"length": 2}).method.select(view, given, capacity)
        assert chosen is not None
        assert [sorted(head) for head in chosen.tolist()] == [expected] * 2


def test_criticalkv() -> None:
    attention = torch.nn.Module()
    attention.o_proj = torch.nn.Linear(2, 2, bias=False)  # two query heads, one KV head
    attention.o_proj.weight.data = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    values = [[[1.0], [-3.0], [10.0], [2.0]]]
    view = view_of([[[0.0]] * 4], values, [[[[0.0]], [[0.0]]]], module=attention)
    # A value counts 3 times in the first query head, once in the second. 0 is the best score, then
    # 2 and 1 have the highest scores times 2 times the value.
    given = torch.tensor([[0.9, 0.4, 0.2, 0.5]])
    for capacity, expected in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2])):
        with torch.no_grad():
            chosen = methods.get("criticalkv")().select(view, given, capacity)
        assert chosen is not None
        assert sorted(chosen[0].tolist()) == expected


@pytest.mark.parametrize("module", [None, torch.nn.Module(), "narrow"])
def test_criticalkv_needs_an_output_projection(module: Any) -> None:
    if module == "narrow":
        module = torch.nn.Module()
        module.o_proj = torch.nn.Linear(3, 3)
    view = view_of([[[0.0]] * 4], None, [[[[0.0]], [[0.0]]]], module=module)
    with pytest.raises(InputError, match=r"^criticalkv: .*o_proj.*; choose snapkv"):
        methods.get("criticalkv")().select(view, torch.rand(1, 4), 2)


@pytest.mark.parametrize("name", ["chunkkv", "criticalkv", "h2o"])
def test_what_selects_by_kv_head_does_not_compete(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' selects entries in each KV head.*; use {name}"):
        parse_method(f"ada-{name}", {"interval": 0})


def test_what_only_breaks_ties_by_topk_competes() -> None:
    assert parse_method("ada-expected-attention", {}).uneven
    assert "ada-expected-attention" in method_names()
    for name in ("keydiff", "lagkv", "cur", "tova"):
        assert parse_method(f"ada-{name}", {"interval": 0}).uneven


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lagkv", {"lag": 1}),
        ("lagkv", {"sinks": -1}),
        ("cur", {"local": 0}),
        ("cur", {"sinks": -1}),
        ("r-kv", {"lam": 1.5}),
        ("r-kv", {"window": 0}),
        ("r-kv", {"kernel": 2}),
        ("r-kv", {"kernel": -1}),
        ("chunkkv", {"length": 0}),
        ("criticalkv", {"first": 2}),
        ("criticalkv", {"epsilon": -1}),
        ("keydiff", {"interval": -1}),
        ("random-decoding", {"capacity": 0}),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"^{name}: {next(iter(options))} must be"):
        parse_method(name, options)
