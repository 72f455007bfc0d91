"""A model whose layers are on several devices gives what it gives on one."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.devices import Apart, split_model
from helpers.engine import measurable, spec, tokens
from helpers.models import loaded_model, plain_model

from kvbench.engine.decoding import DecodeKV
from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.attention import AttentionCall
from kvbench.models.layers import source_of
from kvbench.models.load import check_placement, load_model, placement, resolve_device
from kvbench.sweep.command import Choices
from kvbench.sweep.cost import bytes_full, cost_of, workspace

# One for each thing that methods do: with layers that compete, a second reading of the prompt,
# evictions while decoding, what is kept beside entries, the model's weights, windows, and patches.
METHODS = ["full", "snapkv-patched", "pyramidkv", "kvzip", "h2o", "r-kv", "expected-attention"]


def split_rows(names: list[str], model: Any) -> list[Row]:
    prompt = tokens(60, 2)
    names = measurable([*names, "prulong+snapkv", "recency"], model)
    return [Row(prompt, 5, spec(n), 1.0 if n == "full" else 0.4, seed=4) for n in names]


def measured(outcome: Outcome) -> Outcome:
    return replace(outcome, prefill_seconds=0.0, decode_seconds=0.0)


@pytest.mark.parametrize(
    ("architecture", "attention", "names"),
    [
        ("llama", "sdpa", METHODS),
        ("gemma3", "sdpa", ["full", "snapkv-naive"]),
        ("llama", "reference", ["full", "quest", "h2o"]),
    ],
)
def test_a_split_model_measures_what_a_whole_one_does(
    architecture: str, attention: str, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = DecodeKV.attend

    def checked(kv: DecodeKV, call: AttentionCall) -> torch.Tensor:
        if kv.by_kernel:  # kernels take addresses, which `Apart` does not see
            tables = kv.sequences[call.layer].tensors
            assert {table.device for table in tables} == {call.key.device}
        return attend(kv, call)

    monkeypatch.setattr(DecodeKV, "attend", checked)
    whole = loaded_model(architecture, attention=attention)
    rows = split_rows(names, whole)
    expected = run_rows(whole, rows, prefill_chunk=25, keep_positions=True)
    with Apart() as apart:
        model = split_model(plain_model(architecture), [1, 1, 2], attention=attention)
        got = run_rows(model, rows, prefill_chunk=25, keep_positions=True)
    assert [layer.device.index for layer in model.layers] == [1, 1, 2]
    assert [device.index for device in model.devices] == [1, 2]
    assert set(apart.places.values()) == {1, 2}
    assert list(map(measured, got)) == list(map(measured, expected))


def test_devices_that_exist_in_name_only_do_not_mix() -> None:
    with Apart():
        one, two = torch.ones(3, device="cpu:1"), torch.ones(3, device="cpu:2")
        with pytest.raises(RuntimeError, match="tensors on the devices"):
            one + two
        with pytest.raises(RuntimeError, match="tensors on the devices"):
            one + torch.ones(3)
        assert (one + two.to(one.device)).device.index == 1
        assert (two * torch.tensor(2.0)).device.index == two[[0]].device.index == 2
        assert one.cpu().device.index is None


def test_a_copy_of_keys_on_another_device_is_the_same_keys() -> None:
    with Apart():
        keys = torch.rand(1, 2, 3, 4, device="cpu:1")
        calls: list[Any] = [
            SimpleNamespace(layer=0, key=keys, value=keys),
            SimpleNamespace(layer=1, key=keys.to("cpu:2"), value=keys.to("cpu:2")),
            SimpleNamespace(layer=2, key=keys.to("cpu:2") + 1, value=keys.to("cpu:2")),
        ]
        assert [source_of(call, calls) for call in calls] == [0, 0, 2]


@pytest.mark.parametrize("place", ["cpu", "disk", torch.device("meta")])
def test_weights_that_are_on_no_gpu_are_refused(place: Any) -> None:
    with pytest.raises(
        InputError, match=r"'big' does not fit on 2 GPUs, .* more --gpus-per-worker"
    ):
        check_placement({"model.layers.0": 0, "lm_head": place}, "big", 2)
    check_placement({"model.layers.0": 0, "lm_head": 1}, "big", 2)
    check_placement({"": place}, "small", 1)


def test_gpus_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(InputError, match="a worker needs 2 GPUs, this machine has 1"):
        load_model("tiny", gpus=2)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (5 + gpu, 9))
    assert placement(2) == {"device_map": "auto", "max_memory": {0: 5, 1: 6}}
    assert resolve_device("auto", 2) == torch.device("cuda", 0)
    with pytest.raises(InputError, match="goes with device cuda, not 'cuda:1'"):
        Choices(gpus_per_worker=2, device="cuda:1")


def test_memory_is_that_of_the_device_which_needs_most() -> None:
    whole = loaded_model("llama")
    places = [torch.device("cpu", index) for index in (1, 1, 2)]
    layers = [replace(layer, device=at) for layer, at in zip(whole.layers, places, strict=True)]
    split = replace(whole, device=places[0], layers=tuple(layers))
    rows = split_rows(["full", "snapkv-naive"], whole)[:1]
    alone, parted = (cost_of(model, rows, 25) for model in (whole, split))
    used = workspace(whole, 60, 25)
    kept = bytes_full(whole, 64)
    assert alone.bytes == max(kept + used, kept + kept // 3)
    assert parted.bytes == max(kept * 2 // 3 + used, kept)
    assert replace(parted, bytes=alone.bytes) == alone
