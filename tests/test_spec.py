"""Names and options of methods, and the messages for wrong ones."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import InputError
from kvbench.heads import ScoreSet, nearest, read_scores
from kvbench.method import Competition, Family, KVShape, Method
from kvbench.models.card import EMBEDDED, ModelCard, model_folder, read_card
from kvbench.registry import methods
from kvbench.spec import Chunking, check_option_names, method_names, parse_method

TINY = KVShape(layers=4, kv_heads=4, query_heads=8, head_dim=32)
SCORES = Path(__file__).parent / "data" / "scores.tsv"


def test_names_say_method_chunking_and_combination() -> None:
    spec = parse_method("snapkv-patched", {"window": "8"})
    assert (spec.chunking, spec.method.observation_window) == (Chunking.PATCHED, 8)
    assert spec.family == "chunked eviction (patched)"
    both = parse_method("prulong+pyramidkv-naive", {"scores": str(SCORES), "beta": 10})
    assert both.scorer is both.post_fill
    assert both.options["post_fill.beta"] == 10
    assert both.scorer_budget(0.3) == 0.5
    assert both.depends_on_chunk
    assert not parse_method("snapkv", {}).depends_on_chunk


def test_options_beat_the_card_and_the_card_the_defaults() -> None:
    card = {"snapkv": {"window": 16}}
    defaults = {"window": 64, "kernel": 5, "chunk_softmax": False, "window_floor": False}
    assert parse_method("snapkv", {}).options == defaults
    assert parse_method("snapkv", {}, card).options["window"] == 16
    assert parse_method("snapkv", {"window": 9}, card).options["window"] == 9
    options = {"window": 9, "snapkv.window": 7}
    assert parse_method("snapkv", options, card).options["window"] == 7
    assert parse_method("pyramidkv", options, card).options["window"] == 9


def test_a_score_file_is_recorded_by_its_content(tmp_path: Path) -> None:
    copy = tmp_path / "scores.tsv"
    copy.write_bytes(SCORES.read_bytes())
    here, there = (parse_method("prulong", {"scores": str(p)}).options for p in (SCORES, copy))
    assert here == there
    copy.write_text("0.1 0.2\n")
    assert parse_method("prulong", {"scores": str(copy)}).options != here


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("snapk", {}, "did you mean 'snapkv'"),
        ("snapkv-patch", {}, "did you mean 'snapkv-patched'"),
        ("recency-naive", {}, "only post-fill"),
        ("knorm-patched", {}, "use knorm-naive"),
        ("snapkv+prulong", {}, "not a head split"),
        ("prulong+recency", {}, "not a post-fill"),
        ("snapkv", {"window": "many"}, 'must be int, not "many"'),
        ("snapkv", {"window": 0}, "window must be at least 1"),
        ("snapkv", {"kernel": 4}, "kernel must be odd"),
        ("snapkv", {"snapkv.windw": 4}, "did you mean 'window'"),
        ("pyramidkv", {"beta": 0}, "beta must be at least 1"),
        ("recency", {"sinks": -1}, "sinks must be at least 0"),
        ("prulong", {"scores": "no/such.tsv"}, "cannot be read"),
    ],
)
def test_what_is_wrong_is_said(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_method(name, options)
    assert "\n" not in str(caught.value)


def test_methods_whose_heads_compete_have_no_chunked_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = property(lambda self: Competition.MODEL)
    monkeypatch.setattr(methods.get("knorm"), "competition", everywhere)
    assert [name for name in method_names() if "knorm" in name] == ["ada-knorm", "knorm"]


def test_every_option_has_a_help_text() -> None:
    for name in methods.names():
        for field in fields(methods.get(name)):
            assert field.metadata.get("help"), (name, field.name)


def test_an_option_that_no_method_has_is_refused() -> None:
    specs = [parse_method("snapkv", {}), parse_method("recency", {})]
    check_option_names({"window": 3, "recency.sinks": 2}, specs)
    with pytest.raises(InputError, match="did you mean 'window'"):
        check_option_names({"windw": 3}, specs)


def test_head_scores_of_either_format(tmp_path: Path) -> None:
    table = [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]
    assert read_scores(SCORES) == [ScoreSet(None, table)]
    for name, text in (("a.tsv", SCORES.read_text()), ("a.json", json.dumps({"scores": table}))):
        marked = tmp_path / name
        marked.write_text(text, encoding="utf-8-sig")  # as editors of Windows write it
        assert read_scores(marked) == [ScoreSet(None, table)]
    file = tmp_path / "scores.json"
    file.write_text('{"scores": [[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]], "seed": 1}')
    assert read_scores(file) == [ScoreSet(None, table)]
    file.write_text(
        '{"sets": [{"target": 0.3, "scores": [[1, 2]]}, {"target": 0.7, "scores": [[2, 1]]}]}'
    )
    low, high = read_scores(file)
    assert (low.scores, high.target) == ([[1.0, 2.0]], 0.7)
    assert [nearest([low, high], s) for s in (0.0, 0.49, 0.51, 1.0)] == [low, low, high, high]
    broken_files = (
        *('{"scores": "x"}', "[1", "[]", '{"scores": [[1, 2], [3]]}', '{"scores": [[NaN]]}'),
        *('{"sets": []}', '{"sets": [{"scores": [[1]]}, {"scores": [[1, 2]]}]}', '{"scores": []}'),
    )
    for broken in broken_files:
        file.write_text(broken)
        with pytest.raises(InputError, match="head scores"):
            read_scores(file)


def raising(*_: object) -> int:
    raise KeyError("such")


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("bad", {"family": "magic"}, "has the family 'magic'; expected Family.FULL"),
        ("bad", {"family": Family.RECENCY}, r"overrides scores, .* family is Family\.RECENCY"),
        ("bad", {"__post_init__": raising}, "method 'bad' raises KeyError: 'such'"),
        ("bad-patched", {"observation_window": property(raising)}, "'bad-patched' raises KeyError"),
    ],
)
def test_a_broken_method_is_bad_input(
    name: str, body: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"family": Family.POST_FILL, "scores": lambda self, view: None}
    bad: Any = dataclass(frozen=True)(type("Bad", (Method,), {**base, **body}))
    monkeypatch.setitem(methods._known, "bad", bad)
    bad.name = "bad"
    with pytest.raises(InputError, match=message):
        parse_method(name, {})


def test_score_files_beside_a_model_become_defaults(tmp_path: Path) -> None:
    (tmp_path / "scores-prulong.tsv").write_bytes(SCORES.read_bytes())
    card = read_card(tmp_path)
    assert parse_method("prulong", {}, card.options).options["scores"].startswith("scores-prulong")
    assert read_card(tmp_path / "nowhere") == ModelCard()
    (tmp_path / "kvbench.json").write_text('{"options": {"knorm": {"windw": 3}}}')
    with pytest.raises(InputError, match="the model's card gives knorm an option 'windw'"):
        parse_method("knorm", {}, read_card(tmp_path).options)
    (tmp_path / "kvbench.json").write_text('{"contxt": 3}')
    with pytest.raises(InputError, match="not a model card"):
        read_card(tmp_path)


@pytest.mark.parametrize("name", ["tinyy", "./none", "/no/such/folder", "a/b/c"])
def test_models_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match="no model"):
        model_folder(name)


def test_a_hub_id_is_left_to_the_hub() -> None:
    assert model_folder("organisation/name") is None


@pytest.mark.parametrize("name", ["prulong", "duoattention"])
def test_the_embedded_model_comes_with_head_scores(name: str) -> None:
    spec = parse_method(name, {}, read_card(EMBEDDED["tiny"]).options)
    assert spec.method.missing() is None
    kinds = [window for layer in spec.method.windows(TINY, 0.25, 1000) or () for window in layer]
    assert (len(kinds), kinds.count(None)) == (16, 4)
