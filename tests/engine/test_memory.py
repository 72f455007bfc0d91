"""Bytes of keys and values: counted, predicted by the footprint, and really allocated."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import loaded_model
from torch.profiler import ProfilerActivity, profile

from kvbench.engine.cache import Ledger
from kvbench.engine.prefill import prefill
from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.spec import MethodSpec, parse_method

FAMILIES = ("full", "recency", "prulong", "snapkv", "snapkv-naive", "snapkv-patched", "knorm")


def spec(name: str, scores: Path) -> MethodSpec:
    options: dict[str, Any] = {"snapkv.window": 16} if "snapkv" in name else {}
    if name.startswith("prulong"):
        split = {"scores": str(scores), "sinks": 16, "window": 112}
        options |= {f"prulong.{option}": value for option, value in split.items()}
    return parse_method(name, options)


def prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 199, (length,), generator=generator).tolist()


def write_scores(folder: Path, layers: int, heads: int) -> Path:
    table = torch.rand(layers, heads, generator=torch.Generator().manual_seed(0)).tolist()
    path = folder / "scores.tsv"
    path.write_text("\n".join("\t".join(map(str, row)) for row in table))
    return path


def test_peak_bytes_are_within_two_percent_of_the_footprints_at_4k_tokens(tmp_path: Path) -> None:
    model = loaded_model(num_hidden_layers=20, head_dim=8)
    scores = write_scores(tmp_path, 20, 2)
    rows = [
        Row(prompt(4096), 8, spec(name, scores), budget)
        for name in FAMILIES
        for budget in ((1.0,) if name == "full" else (0.1, 0.5))
    ]
    entry = 2 * model.shape.head_dim * model.dtype.itemsize
    for row, got in zip(rows, run_rows(model, rows, prefill_chunk=256), strict=True):
        entries = got.kv_held_peak * (4096 + got.new_tokens - 1) * 20 * 2
        assert 1 <= got.kv_bytes_peak / (entries * entry) < 1.02, (row.spec.name, row.budget)


@pytest.mark.parametrize("name", ["snapkv", "snapkv-naive", "snapkv-bounded", "keydiff", "kvzip"])
def test_peak_bytes_follow_the_footprint_if_the_question_comes_last(
    name: str, tmp_path: Path
) -> None:
    model = loaded_model(num_hidden_layers=16, head_dim=8)
    row = Row(prompt(1536), 8, spec(name, tmp_path), 0.1, context=1500)
    (got,) = run_rows(model, [row], prefill_chunk=128)
    entries = got.kv_held_peak * (1536 + got.new_tokens - 1) * 16 * 2
    predicted = entries * 2 * model.shape.head_dim * model.dtype.itemsize
    assert 1 <= got.kv_bytes_peak / predicted < 1.05


def allocated(function: Callable[[], list[Outcome]]) -> tuple[list[Outcome], int]:
    """What a call returns, and the peak of the bytes that it allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events: list[Any] = profiler.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, peak


@pytest.mark.parametrize("budget", [0.1, 0.9])
@pytest.mark.parametrize("name", ["full", "recency", "prulong", "snapkv", "prulong+snapkv"])
def test_no_more_is_allocated_than_is_counted(name: str, budget: float, tmp_path: Path) -> None:
    layers, heads, head_dim, context, chunk = 4, 4, 128, 2048, 64
    model = loaded_model(
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
    )
    row = Row(prompt(context), 8, spec(name, write_scores(tmp_path, layers, heads)), budget)
    if name == "full":
        row = Row(row.prompt, 8, row.spec, 1.0)
    run_rows(model, [row], prefill_chunk=chunk)  # the first run allocates other things too
    (outcome,), peak = allocated(lambda: run_rows(model, [row], prefill_chunk=chunk))
    # The rest is a chunk's activations, the attention of an observation window, and positions. It
    # would be far more if old and new entries of a whole layer existed at the same time.
    layer = heads * context * 2 * head_dim * 4
    assert outcome.group_bytes_peak <= peak < outcome.group_bytes_peak + layer / 5


def test_storage_is_counted_once_if_a_chunk_keeps_nothing() -> None:
    # The last layer keeps no entry of the first chunk, so its storage is allocated but empty.
    row = Row(prompt(100), 4, parse_method("pyramidkv-patched", {"window": 6}), 0.1)
    ledger = Ledger()
    with torch.inference_mode():
        state = prefill(loaded_model(), [row], 30, ledger)[0]
    groups = [group for groups in state.cache.layers for group in groups]
    stored = [group.entries() for group in groups]
    assert ledger.bytes == sum(each.keys.nbytes + each.values.nbytes for each in stored)
    assert ledger.bytes == state.accounting.bytes
