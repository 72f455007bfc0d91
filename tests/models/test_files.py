"""A model's files: incomplete, foreign or changed ones are refused or seen by the fingerprint."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import plain_model
from safetensors.torch import load_file, save_file

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.engine.self_check import self_check
from kvbench.errors import InputError
from kvbench.models.card import EMBEDDED
from kvbench.models.load import load_model
from kvbench.spec import parse_method

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model's folder, with a tokenizer."""
    plain_model().save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED["tiny"] / name, tmp_path / "m")
    return tmp_path / "m"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_weights_are_named(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop("lm_head.weight"))
    assert "lack lm_head.weight" in refusal(folder)


def test_a_missing_layer_is_named(folder: Path) -> None:
    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith("model.layers.1.")]:
            del weights[name]

    rewrite(folder, drop)
    assert "model.layers.1." in refusal(folder)
    assert "more" in refusal(folder)


def test_renamed_weights_are_named(folder: Path) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.extra.weight"] = weights["model.norm.weight"].clone()

    rewrite(folder, rename)
    assert "no place for, model.layers.0.extra.weight" in refusal(folder)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"][:7].clone()

    rewrite(folder, cut)
    assert "lm_head.weight" in refusal(folder)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    plain_model(tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED["tiny"] / name, tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / WEIGHTS)
    load_model(str(tmp_path / "m"))


def change_json(name: str, **changes: Any) -> Callable[[Path], Any]:
    """Sets keys in a JSON file of a folder."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def as_integers(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.update({NORM: weights[NORM].int()}))


def in_two_shards(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shards = {"a.safetensors": weights, "b.safetensors": {NORM: 2 * weights[NORM]}}
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    where = {**dict.fromkeys(weights, "a.safetensors"), "other": "b.safetensors"}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


NORM = "model.norm.weight"
CONFIG, GENERATION, CARD = "config.json", "generation_config.json", "kvbench.json"
ROPE = {"rope_type": "spiral", "rope_theta": 1e4}
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "integers": (as_integers, f"holds {NORM} as I32"),
    "a tensor twice": (in_two_shards, f"both a.safetensors and b.safetensors hold {NORM}"),
    "an absolute path": (lambda folder: write_index(folder, f"/{WEIGHTS}"), "lies outside"),
    "no JSON": (lambda folder: (folder / GENERATION).write_text("{"), "is not a JSON object"),
    "an end token as text": (change_json(GENERATION, eos_token_id="5"), "has the end token '5'"),
    "an end token beyond": (change_json(GENERATION, eos_token_id=[5, 199]), "the end token 199"),
    "end tokens in lists": (change_json(GENERATION, eos_token_id=[[1]]), "the end token [1]"),
    "no tokens": (change_json(CONFIG, max_position_embeddings=0), "takes 0 tokens"),
    "unknown RoPE": (change_json(CONFIG, rope_parameters=ROPE), "the unknown type 'spiral'"),
    "unknown activation": (change_json(CONFIG, hidden_act="relish"), "KeyError: 'relish'"),
    "a context as text": (lambda folder: write_card(folder, context="x"), "context must be"),
    "half a context": (lambda folder: write_card(folder, context=2.5), "context must be"),
    "a list of options": (lambda folder: write_card(folder, options=[]), "options must be a dict"),
    "a number": (lambda folder: write_card(folder, options={"knorm": 5}), "options.knorm must be"),
}


def write_card(folder: Path, **content: Any) -> None:
    (folder / CARD).write_text(json.dumps(content))


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(folder)
    assert message in refusal(folder)


def test_tokens_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    model = load_model(str(folder))
    for token in (-1, 199):
        row = Row([3, token, 5], 4, parse_method("full", {}), 1.0)
        with pytest.raises(InputError, match=f"token {token} of a prompt is none of the 199"):
            run_rows(model, [row], prefill_chunk=None)


def test_a_model_must_take_more_than_the_check_needs(folder: Path) -> None:
    change_json(CONFIG, max_position_embeddings=3)(folder)
    with pytest.raises(InputError, match=r"takes 3 tokens .* kvbench needs more than 5"):
        self_check(load_model(str(folder)))


def write_index(folder: Path, shard: str) -> None:
    names = load_file(folder / WEIGHTS)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def test_an_index_may_not_name_other_formats(folder: Path) -> None:
    write_index(folder, "pytorch_model.bin")
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    assert "safetensors alone" in refusal(folder)


def test_an_index_may_not_name_files_outside(folder: Path) -> None:
    write_index(folder, "../outside.safetensors")
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    assert "outside the model's folder" in refusal(folder)


def test_links_to_files_outside_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")
    assert "outside the model's folder" in refusal(folder)


def test_the_cache_of_a_hub_may_link_to_its_blobs(folder: Path) -> None:
    blobs, snapshot = folder.parent / "blobs", folder.parent / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    load_model(str(snapshot))


def test_shards_in_a_folder_below_are_in_the_fingerprint(folder: Path) -> None:
    write_index(folder, "shards/a.safetensors")
    (folder / "shards").mkdir()
    (folder / WEIGHTS).rename(folder / "shards" / "a.safetensors")
    before = load_model(str(folder)).fingerprint
    weights = load_file(folder / "shards" / "a.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, folder / "shards" / "a.safetensors", metadata={"format": "pt"})
    assert load_model(str(folder)).fingerprint != before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", '{"eos_token_id": [1, 2]}'),
        ("chat_template.jinja", "{{ messages }}"),
        ("added_tokens.json", "{}"),
        ("special_tokens_map.json", "{}"),
    ],
)
def test_all_that_is_read_is_in_the_fingerprint(folder: Path, name: str, text: str) -> None:
    before = load_model(str(folder)).fingerprint
    (folder / name).write_text(text)
    assert load_model(str(folder)).fingerprint != before


def test_what_is_not_read_is_not_in_the_fingerprint(folder: Path) -> None:
    before = load_model(str(folder)).fingerprint
    (folder / "README.md").write_text("A model.")
    (folder / "kvbench.json").write_text("{}")
    assert load_model(str(folder)).fingerprint == before


def test_logits_that_are_not_finite_fail_their_row_alone(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.embed_tokens.weight"][150] = torch.nan

    rewrite(folder, spoil)
    model = load_model(str(folder))
    rows = [
        Row(prompt, 4, parse_method("full", {}), 1.0)
        for prompt in ([5, 6, 7, 8, 9, 10], [5, 6, 150, 8, 9], [11, 12, 13])
    ]
    good, bad, also = run_rows(model, rows, prefill_chunk=2)
    assert bad.failure is not None
    assert "not finite at token 1" in bad.failure
    assert bad.tokens == []
    assert good.failure is also.failure is None
    alone = run_rows(model, [rows[0]], prefill_chunk=2)[0]
    assert good.tokens == alone.tokens


def test_the_check_leaves_models_that_are_never_finite_to_the_cells(folder: Path) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][:] = torch.nan

    rewrite(folder, spoil)
    assert self_check(load_model(str(folder))).tokens == 0
