"""The variants of the paper's published code, compared with a slow implementation of their text.

`SlowModel` reads a prompt in chunks with the model's own layers in float64. It scores and evicts
one KV head, one query and one entry at a time, and shares no code with the engine.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.engine import SCORES, tokens, view_of
from helpers.models import loaded_model, plain_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvbench.engine.reference import run_reference
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.method import Entries, LayerView
from kvbench.spec import parse_method

PROMPT, KV_HEADS, GROUP, KERNEL, BETA = 70, 2, 2, 5, 20
WINDOW = 6


@dataclass
class Held:
    """What one KV head holds."""

    keys: Tensor  # [e, D]
    values: Tensor  # [e, D]
    positions: list[int]


class SlowModel:
    """Reads a prompt in chunks and evicts after each, as docs/methods.md describes it."""

    def __init__(
        self, layers: int, budget: float, *, pyramid: bool, patched: bool, **options: bool
    ) -> None:
        self.layers, self.budget = layers, budget
        self.pyramid, self.patched, self.options = pyramid, patched, options
        self.held: dict[tuple[int, int], Held] = {}
        self.start = self.new = self.patch = 0

    def read(self, prompt: list[int], chunk: int) -> list[list[list[int]]]:
        """The positions that each layer and KV head keeps of the prompt."""
        from transformers import AttentionInterface

        AttentionInterface.register("slow", self.attend)
        model = plain_model(num_hidden_layers=self.layers).double()
        model.set_attn_implementation("slow")
        for start in range(0, len(prompt), chunk):
            ids = prompt[start : start + chunk]
            last = start + chunk >= len(prompt)
            extra = prompt[-WINDOW:] if self.patched and not last else []
            self.start, self.new, self.patch = start, len(ids), len(extra)
            positions = torch.arange(start, start + len(ids) + len(extra))
            with torch.inference_mode():
                model(torch.tensor([ids + extra]), position_ids=positions[None], use_cache=False)
        return [
            [self.held[layer, head].positions for head in range(KV_HEADS)]
            for layer in range(self.layers)
        ]

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Causal attention over what is resident; then each KV head evicts."""
        layer, count = module.layer_idx, query.shape[2]
        here = list(range(self.start, self.start + count))
        out = torch.zeros_like(query)
        for head in range(KV_HEADS):
            empty = Held(key[0, 0, :0], value[0, 0, :0], [])
            past = self.held.get((layer, head), empty)
            held = Held(
                torch.cat([past.keys, key[0, head]]),
                torch.cat([past.values, value[0, head]]),
                past.positions + here,
            )
            queries = query[0, head * GROUP : (head + 1) * GROUP]
            later = torch.tensor(held.positions) > torch.tensor(here)[:, None]
            logits = queries @ held.keys.T / queries.shape[-1] ** 0.5
            weights = logits.masked_fill(later, -math.inf).softmax(-1)
            out[0, head * GROUP : (head + 1) * GROUP] = weights @ held.values
            chosen = [*range(len(past.positions)), *self.choose(layer, held, queries)]
            self.held[layer, head] = Held(
                held.keys[chosen], held.values[chosen], [held.positions[i] for i in chosen]
            )
        return out.transpose(1, 2), None

    def capacity(self, layer: int) -> int:
        """How many of the chunk's own entries stay."""
        window = 0 if self.patch else min(WINDOW, self.new)
        total = round(self.budget * self.new)
        if total <= window:
            return window if self.options["window_floor"] else total
        if not self.pyramid:
            return total
        spread = total - window
        # The layer with the largest share would keep everything.
        if self.options["equal_above_half"] and spread > (self.new + self.patch) / 2:
            return total
        high = min(2 * spread - spread // BETA, self.new - window)
        step = (2 * high - 2 * spread) / (self.layers - 1)
        if self.options["whole_steps"]:
            step = math.floor(step)
        line = high - layer * step
        assert line == int(line), "this implementation does not spread rounding"
        return window + int(line)

    def choose(self, layer: int, held: Held, queries: Tensor) -> list[int]:
        """Which of the chunk's own entries stay, as indices of `held`; queries [G, T, D]."""
        end = len(held.positions) - self.patch
        first = end - self.new
        window = 0 if self.patch else min(WINDOW, self.new)
        capacity = self.capacity(layer)
        if capacity >= self.new:
            return list(range(first, end))
        if capacity <= window:
            return list(range(end - capacity, end))
        seen = first if self.options["chunk_softmax"] else 0
        total = [0.0] * (len(held.positions) - seen)
        for g in range(GROUP):
            for t in range(queries.shape[1] - min(WINDOW, queries.shape[1]), queries.shape[1]):
                weights = softmax(
                    queries[g, t], held.keys[seen:], held.positions[seen:], self.start + t
                )
                total = [a + b / GROUP for a, b in zip(total, weights, strict=True)]
        scores = total[first - seen : end - window - seen]
        half = KERNEL // 2
        padded = [0.0] * half + scores + [0.0] * half
        smooth = [sum(padded[i : i + KERNEL]) / KERNEL for i in range(len(scores))]
        best = sorted(range(len(smooth)), key=lambda i: -smooth[i])[: capacity - window]
        return [first + i for i in sorted(best)] + list(range(end - window, end))


def softmax(query: Tensor, keys: Tensor, positions: list[int], at: int) -> list[float]:
    """The weights of a query at position `at`; 0 for later entries."""
    logits = (keys @ query / query.shape[0] ** 0.5).tolist()
    weights = [
        math.exp(logit) if position <= at else 0.0
        for logit, position in zip(logits, positions, strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def kept(name: str, layers: int, budget: float, chunk: int, **options: bool) -> Any:
    given = {**options, "window": WINDOW, "kernel": KERNEL}
    row = Row(tokens(PROMPT, 5), 2, parse_method(name, given), budget)
    model = loaded_model(num_hidden_layers=layers)
    return run_rows(model, [row], prefill_chunk=chunk, keep_positions=True)[0].kept


@pytest.mark.parametrize("chunk", [PROMPT, 25, 16])
@pytest.mark.parametrize("form", ["-naive", "-patched", ""])
@pytest.mark.parametrize("budget", [0.08, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("published", [False, True])
def test_kept_positions_are_those_of_the_description(
    published: bool, budget: float, form: str, chunk: int
) -> None:
    for name in ("snapkv", "pyramidkv"):
        options = {"chunk_softmax": published, "window_floor": published}
        if name == "pyramidkv":
            options |= {"equal_above_half": published, "whole_steps": published}
        # With 3 layers, the exact capacities of a pyramid are whole numbers.
        layers = 5 if published else 3
        slow = SlowModel(
            layers,
            budget,
            pyramid=name == "pyramidkv",
            patched=form == "-patched",
            **{"equal_above_half": False, "whole_steps": False, **options},
        )
        expected = slow.read(tokens(PROMPT, 5), chunk if form else PROMPT)
        assert kept(name + form, layers, budget, chunk, **options) == expected


@pytest.mark.parametrize("option", ["chunk_softmax", "window_floor", "equal_above_half"])
def test_each_option_alone_is_that_of_the_description(option: str) -> None:
    options = dict.fromkeys(("chunk_softmax", "window_floor", "equal_above_half"), False)
    for budget, form in ((0.08, "-naive"), (0.5, "-naive"), (0.8, "-patched")):
        choice = {**options, option: True}
        slow = SlowModel(
            3, budget, pyramid=True, patched=form == "-patched", whole_steps=False, **choice
        )
        found = kept("pyramidkv" + form, 3, budget, 25, **choice)
        assert found == slow.read(tokens(PROMPT, 5), 25), (budget, form)


def test_options_change_what_they_name() -> None:
    """The settings of the tests above tell the variants apart."""
    assert kept("snapkv-naive", 3, 0.5, 16) != kept("snapkv-naive", 3, 0.5, 16, chunk_softmax=True)
    few = kept("snapkv-naive", 3, 0.08, 25, window_floor=True)
    assert {len(positions) for layer in few for positions in layer} == {3 * WINDOW}
    even = kept("pyramidkv-naive", 3, 0.9, 25, equal_above_half=True)
    assert {len(positions) for layer in even for positions in layer} == {22 + 22 + 18}
    assert kept("pyramidkv", 5, 0.3, 25) != kept("pyramidkv", 5, 0.3, 25, whole_steps=True)


def test_a_method_whose_window_is_patched_has_no_floor() -> None:
    """The patched entries are dropped, so there is no window to keep but in the last chunk."""
    found = kept("snapkv-patched", 3, 0.08, 25, window_floor=True)
    assert {len(positions) for layer in found for positions in layer} == {2 + 2 + WINDOW}


@pytest.mark.parametrize("chunk", [None, 25, 16])
def test_the_engine_counts_the_variants_as_its_reference_does(chunk: int | None) -> None:
    """In retrieval heads too, and for rows that share a prefill."""
    options: dict[str, Any] = {"chunk_softmax": True, "window_floor": True, "window": WINDOW}
    pyramid = {**options, "equal_above_half": True, "whole_steps": True}
    split = {"scores": str(SCORES), "sinks": 2, "window": 7}
    given = {f"prulong.{key}": value for key, value in split.items()}
    given |= {f"pyramidkv.{key}": value for key, value in pyramid.items()}
    specs = [
        parse_method("snapkv", options),
        parse_method("snapkv-naive", options),
        parse_method("pyramidkv-patched", pyramid),
        parse_method("prulong+pyramidkv-naive", given),
    ]
    rows = [Row(tokens(PROMPT, 5), 4, spec, 0.3) for spec in specs]
    model = loaded_model()
    outcomes = run_rows(model, rows, prefill_chunk=chunk, keep_positions=True)
    for row, got in zip(rows, outcomes, strict=True):
        expected = run_reference(model, row, chunk)
        assert got.kept == expected.kept, row.spec.name
        assert got.tokens == expected.tokens, row.spec.name
        assert got.resident_rows == expected.resident_rows, row.spec.name


@settings(max_examples=40, deadline=None)
@given(
    past=st.integers(0, 20),
    new=st.integers(1, 20),
    patched=st.integers(0, 5),
    count=st.integers(1, 60),
)
def test_the_latest_entries_are_a_view_of_their_own(
    past: int, new: int, patched: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(past * 441 + new * 21 + patched)
    total, start = past + new + patched, 0
    joined = Entries(
        torch.randn(2, total, 4, generator=generator),
        torch.randn(2, total, 4, generator=generator),
        torch.arange(total).expand(2, -1),
    )
    blocks: list[Entries] = []
    for size in (past, new, patched):
        if size:
            blocks.append(Entries(*(tensor[:, start : start + size] for tensor in joined)))
        start += size
    fields = vars(view_of(new, 3, 0, 1))
    queries = torch.randn(2, 2, 3, 4, generator=generator)
    at = torch.arange(total, total + 3)
    view = LayerView(
        **{
            **fields,
            "blocks": [blocks],
            "queries": queries,
            "query_positions": at,
            "kv_heads": (0, 1),
        }
    )
    found = view.latest(count)
    assert found.entries == min(count, total)
    assert torch.equal(found.keys, joined.keys[:, -count:])
    assert torch.equal(found.positions, joined.positions[:, -count:])
    logits = torch.einsum("kgwd,ked->kgwe", queries, joined.keys[:, -count:])
    expected = logits.softmax(-1).sum(2).mean(1)
    torch.testing.assert_close(found.attention, expected, rtol=1e-5, atol=1e-6)
