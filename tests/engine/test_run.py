"""The engine against transformers' `generate`, and its measurements against closed forms."""

import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engine import measurable, tokens
from helpers.models import ARCHITECTURES, loaded_model, plain_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbench.engine.accounting import (
    bounded_rows,
    chunked_rows,
    chunks,
    entry_rows,
    full_rows,
    post_fill_rows,
)
from kvbench.engine.attention import Float64, Sdpa
from kvbench.engine.decoding import DecodeKV
from kvbench.engine.graph import Repeated
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.method import Entries, Limit
from kvbench.models.attention import Rules
from kvbench.spec import MethodSpec, method_names, parse_method

LAYERS, KV_HEADS = 3, 2


@pytest.fixture(scope="session")
def scores_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scores") / "scores.tsv"
    path.write_text("0.9 0.1\n0.2 0.8\n0.7 0.3\n")
    return path


def spec(name: str, scores: Path, **options: Any) -> MethodSpec:
    if name.startswith(("prulong", "duoattention", "saliency-heads")):
        options = {"scores": str(scores), "sinks": 2, "window": 5, **options}
    if "kv" in name and "window" not in options:
        options["snapkv.window"] = options["pyramidkv.window"] = 6
    return parse_method(name, options)


def generated(model: Any, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_budget_of_1_gives_what_generate_gives(architecture: str, scores_file: Path) -> None:
    prompt = tokens(75)
    expected = generated(plain_model(architecture), prompt, 12)
    assert len(set(expected)) > 3  # a model that repeats one token would prove nothing
    model = loaded_model(architecture)
    names = [*method_names(), "prulong+snapkv-naive"]
    for chunk in (None, 20):
        rows = [Row(prompt, 12, spec(name, scores_file), 1.0) for name in names]
        for name, outcome in zip(names, run_rows(model, rows, prefill_chunk=chunk), strict=True):
            assert outcome.tokens == expected, (name, chunk)
            assert outcome.kv_footprint == 1.0


def test_rows_do_not_depend_on_who_they_decode_with(scores_file: Path) -> None:
    model = loaded_model()
    rows = [
        Row(tokens(40 + 7 * i, i), 4 + 3 * i, spec(name, scores_file), 0.3, seed=i)
        for i, name in enumerate(["full", "recency", "snapkv-patched", "prulong", "random"])
    ]
    together = run_rows(model, rows, prefill_chunk=16)
    for row, outcome in zip(rows, together, strict=True):
        alone = run_rows(model, [row], prefill_chunk=16)[0]
        assert outcome.tokens == alone.tokens
        assert outcome.resident_rows == alone.resident_rows
        assert outcome.kv_peak == alone.kv_peak


def test_rows_that_keep_their_places_after_their_end_change_nothing(
    scores_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded_model()
    names = ["full", "recency", "snapkv-patched", "prulong", "random", "snapkv", "full"]
    rows = [
        Row(tokens(40 + 7 * i, i), 2 + 3 * i, spec(name, scores_file), 0.3, seed=i)
        for i, name in enumerate(names)
    ]
    expected = run_rows(model, rows, prefill_chunk=16)
    retired: list[int] = []
    retire = DecodeKV.retire

    def watched(self: DecodeKV, places: list[int]) -> None:
        retired.extend(places)
        retire(self, places)
        assert not any(group.capacity for at in places for group in self.caches[at].layers[0])

    monkeypatch.setattr(DecodeKV, "retire", watched)
    monkeypatch.setattr(DecodeKV, "capturable", True)  # as with a CUDA graph, but without one
    never = partial(Repeated, first=10**9)
    got = run_rows(model, rows, prefill_chunk=16, repeat=never)
    for a, b in zip(expected, got, strict=True):
        assert a.tokens == b.tokens
        assert a.timeline == b.timeline
        assert a.resident_rows == b.resident_rows
    assert len(retired) > 3


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "knorm", "random"])
def test_post_fill_does_not_depend_on_the_prefill_chunk(name: str, scores_file: Path) -> None:
    model = loaded_model()
    row = Row(tokens(83), 10, spec(name, scores_file), 0.25, seed=1)
    outcomes = [run_rows(model, [row], prefill_chunk=c)[0] for c in (None, 80, 17, 3)]
    assert len({tuple(o.tokens) for o in outcomes}) == 1
    assert len({o.resident_rows for o in outcomes}) == 1


def test_100_entries_resident_over_10_rows_are_1000_entry_rows() -> None:
    assert entry_rows(100, 10) - entry_rows(0, 10) == 1000


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(2, 90),
    new=st.integers(1, 9),
    chunk=st.one_of(st.none(), st.integers(1, 100)),
    budget=st.floats(0.05, 0.99),
    window=st.integers(1, 30),
    sinks=st.integers(0, 6),
)
def test_counted_footprints_are_the_closed_forms(
    prompt: int, new: int, chunk: int | None, budget: float, window: int, sinks: int
) -> None:
    scores = Path(__file__).parent.parent / "data" / "scores.tsv"
    options = {"window": window, "sinks": sinks, "scores": str(scores)}
    names = ["full", "recency", "snapkv", "snapkv-naive", "snapkv-patched", "knorm", "prulong"]
    rows = [Row(tokens(prompt), new, parse_method(name, options), budget) for name in names]
    model = loaded_model()
    got = dict(zip(names, run_rows(model, rows, prefill_chunk=chunk), strict=True))

    fed, heads = new - 1, LAYERS * KV_HEADS
    sizes = chunks(prompt, chunk)
    full = full_rows(prompt, fed)
    assert all(outcome.full_rows == heads * full for outcome in got.values())
    assert got["full"].resident_rows == heads * full
    recent = sinks + max(1, round(budget * prompt) - sinks)
    assert got["recency"].resident_rows == heads * bounded_rows(sizes, recent, fed)
    kept = min(prompt, round(budget * prompt))
    for name in ("snapkv", "knorm"):
        assert got[name].resident_rows == heads * post_fill_rows(prompt, fed, kept)
    stay = [min(size, round(budget * size)) for size in sizes]
    for name in ("snapkv-naive", "snapkv-patched"):
        assert got[name].resident_rows == heads * chunked_rows(sizes, stay, fed)
    assert got["snapkv-patched"].patch_rows == min(window, prompt) * (len(sizes) - 1)
    retrieval = round(budget * heads)
    assert got["prulong"].resident_rows == retrieval * full + (heads - retrieval) * bounded_rows(
        sizes, sinks + window, fed
    )
    for outcome in got.values():
        assert outcome.kv_reads == outcome.kv_footprint


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.integers(10, 400),
    budget=st.floats(0.02, 0.99),
    window=st.integers(1, 80),
    beta=st.integers(1, 30),
    layers=st.integers(1, 40),
)
def test_pyramidkv_keeps_snapkvs_share_on_average(
    prompt: int, budget: float, window: int, beta: int, layers: int
) -> None:
    from helpers.engine import view_of

    pyramid = parse_method("pyramidkv", {"window": window, "beta": beta}).method
    capacities = [
        pyramid.capacity(view_of(prompt, window, layer, layers), budget) for layer in range(layers)
    ]
    assert abs(sum(capacities) - layers * round(budget * prompt)) <= 1
    assert all(0 <= c <= prompt for c in capacities)
    assert all(a >= b - 1 for a, b in pairwise(capacities))


def test_peak_bytes_follow_the_footprint_at_4k_tokens() -> None:
    scores = Path(__file__).parent.parent / "data" / "scores.tsv"
    options = {"scores": str(scores), "sinks": 16, "window": 112}
    rows = [Row(tokens(4096), 8, parse_method(name, options), 0.5) for name in ("full", "prulong")]
    full, split = run_rows(loaded_model(num_hidden_layers=3), rows, prefill_chunk=256)
    share = split.kv_bytes_peak / full.kv_bytes_peak
    assert share == pytest.approx(split.kv_peak / full.kv_peak, rel=0.05)
    assert 0.5 < share < 0.56


def test_rows_that_cannot_be_run_are_refused(scores_file: Path) -> None:
    model = loaded_model()
    full = parse_method("full", {})
    with pytest.raises(InputError, match="more than model 'llama' takes"):
        run_rows(model, [Row(tokens(4608), 2, full, 1.0)], prefill_chunk=None)
    with pytest.raises(InputError, match="budget"):
        run_rows(model, [Row(tokens(8), 2, full, 0.0)], prefill_chunk=None)
    other = scores_file.with_name("other.json")
    other.write_text(json.dumps({"scores": [[1.0] * 8] * 32}))
    split = parse_method("prulong", {"scores": str(other)})
    with pytest.raises(InputError, match="32 layers of 8 KV heads"):
        run_rows(model, [Row(tokens(8), 2, split, 0.5)], prefill_chunk=None)


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    past=st.integers(0, 40),
    new=st.integers(1, 600),
    limit=st.one_of(st.none(), st.builds(Limit, st.integers(1, 50), st.booleans())),
    softcap=st.sampled_from([None, 0.7]),
    sinks=st.booleans(),
)
def test_sdpa_is_the_float64_reference_for_chunks(
    heads: int,
    group: int,
    past: int,
    new: int,
    limit: Limit | None,
    softcap: float | None,
    sinks: bool,
) -> None:
    generator = torch.Generator().manual_seed(past * 1000 + new)
    q = torch.randn(heads, group, new, 8, generator=generator)
    k, v = (torch.randn(heads, past + new, 8, generator=generator) for _ in range(2))
    positions = torch.arange(past + new).expand(heads, -1)
    learnt = torch.randn(heads, group, generator=generator) if sinks else None
    rules = Rules(0.3, limit, softcap, learnt)
    for dtype, atol, rtol in ((torch.float32, 2e-6, 1e-4), (torch.bfloat16, 3e-2, 3e-2)):
        whole = Entries(k.to(dtype), v.to(dtype), positions)
        before = Entries(*(t[:, :past].flip(1) for t in whole)) if past else None
        own = Entries(*(t[:, past:] for t in whole))
        expected = Float64().chunk(q.to(dtype), before, own, rules)
        got = Sdpa().chunk(q.to(dtype), before, own, rules)
        torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)


def slow_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    return_attn_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor, None]:
    """flash_attn_varlen_func of one sequence: q [T, H, D], k and v [S, K, D]."""
    assert cu_seqlens_q.tolist() == [0, max_seqlen_q] == [0, len(q)]
    assert cu_seqlens_k.tolist() == [0, max_seqlen_k] == [0, len(k)]
    assert return_attn_probs
    keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = torch.einsum("thd,shd->hts", q, keys) * softmax_scale
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -torch.inf)
    out = torch.einsum("hts,shd->thd", logits.softmax(-1), values)
    return out, logits.logsumexp(-1), None


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding"])
def test_flash_attn_gives_what_the_others_give(
    architecture: str, scores_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package takes half precision on a GPU only; a slow one of its kind takes float32 here.
    package = SimpleNamespace(flash_attn_varlen_func=slow_varlen)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(Sdpa, "_partial", lambda self, *_: self.on_gpu)
    names = measurable([*method_names(), "prulong+snapkv"], loaded_model(architecture))
    rows = [Row(tokens(90, 1), 10, spec(name, scores_file), 0.4, seed=3) for name in names]
    rows += [Row(tokens(60, 2), 5, spec("full", scores_file), 1.0)]
    expected = run_rows(loaded_model(architecture, attention="reference"), rows, prefill_chunk=25)
    model = loaded_model(architecture, attention="flash")
    for row, a, b in zip(rows, expected, run_rows(model, rows, prefill_chunk=25), strict=True):
        assert a.tokens == b.tokens, row.spec.name
        assert a.resident_rows == b.resident_rows


def refusal(model: Any) -> str:
    from kvbench.models.load import wrap_model

    def attempt() -> None:
        wrapped = wrap_model(model.eval(), None, name="odd")
        run_rows(wrapped, [Row(tokens(8), 2, parse_method("full", {}), 1.0)], prefill_chunk=None)

    with pytest.raises(InputError) as caught:
        attempt()
    return str(caught.value)


def test_models_that_attend_in_other_ways_are_refused() -> None:
    from transformers import (
        MambaConfig,
        MambaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = {"vocab_size": 199, "hidden_size": 16, "num_hidden_layers": 2}
    assert "not an attention-only decoder" in refusal(MambaForCausalLM(MambaConfig(**small)))
    both = T5ForConditionalGeneration(T5Config(vocab_size=199, d_model=16, d_ff=16, num_layers=1))
    assert "encoder-decoder" in refusal(both)


def test_rope_that_depends_on_the_length_is_refused() -> None:
    special: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic" in refusal(plain_model(rope_parameters=special))
