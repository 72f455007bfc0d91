"""Tests that need a GPU: kernels, graphs, memory, and layers that do not synchronise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from helpers.engine import measurable, spec, tokens
from helpers.models import plain_model
from helpers.sequences import Made
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvbench.engine.attention import Float64, backend_of, cuda_partial, gpu_token_kernel
from kvbench.engine.decoding import DecodeKV
from kvbench.engine.graph import Repeated
from kvbench.engine.prefill import PrefillKV
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.learning.attention import Stream, streaming_blocks, streaming_flex
from kvbench.method import Entries, Family, Method
from kvbench.models.attention import AttentionCall
from kvbench.models.load import LoadedModel, load_model, wrap_model
from kvbench.spec import method_names, parse_method

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)

ALL = [*method_names(), "prulong+snapkv-naive"]


def waits(name: str) -> bool:
    """Whether the host must know how many entries a KV head holds, or what a method selected."""
    each = spec(name)
    selects = each.scorer is not None and type(each.scorer).select is not Method.select
    return each.uneven or selects or each.method.family is Family.DYNAMIC_SPARSITY


def on_gpu(architecture: str = "llama", dtype: torch.dtype = torch.float32) -> LoadedModel:
    return wrap_model(plain_model(architecture).to("cuda", dtype), None, name=architecture)


# Decoded with the kernel alone, and without evictions on the way.
CAPTURED = ["full", "recency", "snapkv", "pyramidkv-naive", "snapkv-patched", "knorm", "random"]
CAPTURED += ["duoattention", "prulong+snapkv-naive"]


def rows(model: LoadedModel, names: Sequence[str], new: int = 12, budget: float = 0.4) -> list[Row]:
    """Two prompts with each method that the model can be measured with."""
    names = measurable(names, model)
    return [
        Row(tokens(90, seed), new + seed, spec(name), budget, seed)
        for seed in range(2)
        for name in names
    ]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral-sliding", "gemma3"])
def test_every_method_gives_on_a_gpu_what_it_gives_on_a_cpu(architecture: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    # Some architectures normalise keys: their norms tie, but for rounding.
    tie = architecture in ("gemma3", "qwen3")
    cpu = wrap_model(plain_model(architecture), None, name=architecture)
    several = [row for row in rows(cpu, ALL) if not (tie and "knorm" in row.spec.name)]
    expected = run_rows(cpu, several, prefill_chunk=25)
    got = run_rows(on_gpu(architecture), several, prefill_chunk=25)
    for row, a, b in zip(several, expected, got, strict=True):
        assert a.resident_rows == b.resident_rows
        assert a.tokens == b.tokens or ties(row), row.spec.name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_model_on_two_gpus_gives_what_it_gives_on_one(architecture: str) -> None:
    model = plain_model(architecture)
    outside = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    layers = {f"model.layers.{index}": int(index > 0) for index in range(3)}
    split = wrap_model(dispatch_model(model, outside | layers), None, name=architecture)
    assert [device.index for device in split.devices] == [0, 1]
    whole = on_gpu(architecture)
    tie = architecture == "gemma3"
    several = [row for row in rows(whole, ALL) if not (tie and "knorm" in row.spec.name)]
    expected = run_rows(whole, several, prefill_chunk=25)
    got = run_rows(split, several, prefill_chunk=25)
    for row, a, b in zip(several, expected, got, strict=True):
        assert a.resident_rows == b.resident_rows
        assert a.tokens == b.tokens, row.spec.name


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize("group", [1, 4, 17])
@pytest.mark.parametrize("size", [8, 80, 128])
@pytest.mark.parametrize("sliding", [None, 50])
def test_the_token_kernel_agrees_with_float64(
    dtype: torch.dtype, tolerance: float, group: int, size: int, sliding: int | None
) -> None:
    made = Made([1, 300, 2000, 64, 65, 9000], size, size, group, dtype, "cuda")
    kernel = gpu_token_kernel()
    assert kernel is not None
    made.check(kernel, sliding, tolerance)


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION])
@pytest.mark.parametrize("causal", [True, False])
def test_partial_attention_gives_the_logarithm_of_its_normaliser(
    causal: bool, kernel: SDPBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 8, 128, 64, device="cuda", dtype=torch.float16)
    stored = torch.randn(2, 2, 300, 64, device="cuda", dtype=torch.float16)
    keys, values = stored[:, :, : 128 if causal else 200]
    monkeypatch.setattr("kvbench.engine.attention.WORTH_CUDNN", {"own": 0, "past": 0})
    with sdpa_kernel(kernel):
        got, total = cuda_partial(q, Entries(keys, values, values), 0.2, causal)
    grouped = q[0].view(2, 4, 128, 64).double()
    logits = torch.einsum("kgtd,ksd->kgts", grouped, keys.double()) * 0.2
    if causal:
        logits = logits.masked_fill(torch.ones(128, 128, device="cuda").triu(1).bool(), -torch.inf)
    want = torch.einsum("kgts,ksd->kgtd", logits.softmax(-1), values.double()).flatten(0, 1)
    torch.testing.assert_close(got.double(), want, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(
        total.double(), logits.logsumexp(-1).flatten(0, 1), atol=2e-3, rtol=2e-3
    )


def ties(row: Row) -> bool:
    """Whether `torch.topk` decides which of equal scores stay, which differs between devices."""
    scorer = row.spec.scorer
    return row.spec.uneven or (scorer is not None and scorer.ties_by_topk)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ALL if not waits(name)])
def test_no_layer_waits_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, name: str
) -> None:
    model = on_gpu(dtype=dtype)
    several = rows(model, [name])
    # Whether a method wrote to its view is looked at once, in one layer.
    monkeypatch.setattr("kvbench.engine.eviction.check_contents", lambda *_: None)
    for kind in (PrefillKV, DecodeKV):
        attend: Any = kind.attend

        def watched(*arguments: Any, attend: Any = attend) -> Any:
            with waiting_is_an_error():
                return attend(*arguments)

        monkeypatch.setattr(kind, "attend", watched)
    with pytest.raises(RuntimeError, match="synchroniz"), waiting_is_an_error():
        torch.ones(1, device="cuda").item()  # shows that the check works
    assert run_rows(model, several, prefill_chunk=25)


def test_a_captured_step_gives_what_a_plain_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu()
    several = rows(model, CAPTURED, new=30)
    replayed = []
    replay = torch.cuda.CUDAGraph.replay

    def watched(graph: torch.cuda.CUDAGraph) -> None:
        replayed.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", watched)
    captured = run_rows(model, several, prefill_chunk=25)
    assert len(replayed) > 20
    plain = run_rows(model, several, prefill_chunk=25, repeat=partial(Repeated, first=10**9))
    for a, b in zip(captured, plain, strict=True):
        assert a.tokens == b.tokens


def test_rows_end_at_stop_strings_and_limits_as_on_a_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = load_model("tiny", device=device, dtype="float32")
        prompt = model.tokenizer.encode("The river is green. The stone is")
        spec = parse_method("full", {})
        free = run_rows(model, [Row(prompt, 40, spec, 1.0)], prefill_chunk=None)[0]
        word = model.tokenizer.decode(free.tokens[12:14]).strip()
        ends = [(40, (word,)), (40, ()), (3, ()), (25, ("never seen",)), (40, ("\n", word))]
        several = [
            Row(prompt, limit, parse_method(name, {}, model.card.options), 0.5, stop=stop)
            for limit, stop in ends
            for name in ("full", "recency", "snapkv-patched")
        ]
        found.append([outcome.tokens for outcome in run_rows(model, several, prefill_chunk=4)])
    assert found[0] == found[1]
    assert len({len(tokens) for tokens in found[0]}) > 2


def test_a_step_that_cannot_be_captured_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu()
    several = rows(model, CAPTURED, new=20)
    expected = run_rows(model, several, prefill_chunk=25)
    attend = DecodeKV.attend

    def waits(self: DecodeKV, call: AttentionCall) -> torch.Tensor:
        self.positions.sum().item()
        return attend(self, call)

    monkeypatch.setattr(DecodeKV, "attend", waits)
    for a, b in zip(expected, run_rows(model, several, prefill_chunk=25), strict=True):
        assert a.tokens == b.tokens


@pytest.mark.parametrize("name", ["full", "recency", "snapkv", "snapkv-patched"])
def test_the_allocator_gives_what_is_counted(name: str) -> None:
    model = load_model("tiny", device="cuda", dtype="bfloat16")
    spec = parse_method(name, {}, model.card.options)
    prompt = torch.randint(1, 200, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    wide = [Row([p % 500 + 1 for p in prompt[i:] + prompt[:i]], 8, spec, 0.5) for i in range(8)]
    for _ in range(2):
        weights = torch.cuda.memory_allocated()
        outcome = run_rows(model, wide, prefill_chunk=256)[0]
    assert outcome.device_bytes_peak is not None
    taken = outcome.device_bytes_peak - weights
    assert outcome.group_bytes_peak <= taken


def test_bfloat16_agrees_with_the_reference_as_far_as_it_can() -> None:
    model = on_gpu(dtype=torch.bfloat16)
    slow = wrap_model(
        plain_model().to("cuda", torch.bfloat16), None, name="llama", attention="reference"
    )
    assert isinstance(backend_of(slow.attention), Float64)
    several = rows(model, ALL, new=2)
    first = [
        [outcome.tokens[0] for outcome in run_rows(each, several, prefill_chunk=25)]
        for each in (model, slow)
    ]
    assert sum(a == b for a, b in zip(*first, strict=True)) > len(first[0]) * 0.8


def test_streaming_attention_in_training_is_what_blocks_give() -> None:
    torch.manual_seed(0)
    shapes = ((2, 4, 700, 32), (2, 2, 700, 32), (2, 2, 700, 32))
    given = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    weights = torch.randn(shapes[0], device="cuda")
    found = []
    query, key, value = given
    for attend in (streaming_blocks, streaming_flex):
        out = attend(query, key, value, 0.2, Stream(4, 64))
        found.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
