"""Learning head scores: attention (also against evaluation), gradients, constraints, data, loop."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from helpers.learning import BASIC, SHAPE, OneProcess, RandomRows, quiet, recipe
from helpers.models import loaded_model, plain_model
from helpers.process import interruptible
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import Tensor

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.learning.attention import (
    GatedAttention,
    Stream,
    full_attention,
    streaming_blocks,
    streaming_flex,
)
from kvbench.learning.checkpoint import CHECKPOINT
from kvbench.learning.corpus import documents
from kvbench.learning.duoattention import DuoAttention
from kvbench.learning.examples import TrainingRow
from kvbench.learning.loop import learn, uninterrupted
from kvbench.learning.masks import (
    HIGH,
    LOW,
    TEMPERATURE,
    constraint,
    expected_sparsity,
    hard_concrete,
    target_at,
    zero_probability,
)
from kvbench.learning.objective import forward
from kvbench.learning.prulong import PruLong
from kvbench.learning.recipe import make_recipe
from kvbench.learning.rows import PackedRows, PasskeyRows, TaskRows, read_tokens
from kvbench.models.load import LoadedModel, load_model
from kvbench.spec import parse_method

CPU = torch.device("cpu")
# Attention


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gemma3"])
def test_gates_of_1_are_the_model_exactly(architecture: str) -> None:
    ids = torch.randint(1, 199, (2, 60), generator=torch.Generator().manual_seed(3))
    plain, ours = plain_model(architecture), loaded_model(architecture)
    gates = torch.ones(SHAPE.layers, 1, SHAPE.kv_heads)
    with torch.no_grad():
        expected = plain(ids).logits
        full = forward(ours.model, ids, GatedAttention(None, 2, 6)).logits
        gated = forward(ours.model, ids, GatedAttention(gates, 2, 6)).logits
    torch.testing.assert_close(full, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(gated, full)


def streaming_row(prompt: list[int], new_tokens: int, folder: Path) -> Row:
    """A row of an evaluation in which no head is a retrieval head."""
    scores = folder / "scores.tsv"
    scores.write_text("1 2\n3 4\n5 6\n")
    options = {"scores": str(scores), "sinks": 2, "window": 6}
    return Row(prompt, new_tokens, parse_method("prulong", options), 0.01)


@pytest.mark.parametrize("chunk", [7, 16])
@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gemma3"])
def test_gates_of_0_are_streaming_evaluation_at_the_same_chunk(
    architecture: str, chunk: int, tmp_path: Path
) -> None:
    model = loaded_model(architecture)
    ids = torch.randint(1, 199, (50,), generator=torch.Generator().manual_seed(5)).tolist()
    evaluated = [
        run_rows(model, [streaming_row(ids[:end], 1, tmp_path)], prefill_chunk=chunk)[0].tokens[0]
        for end in range(30, 51)
    ]
    gates = torch.zeros(SHAPE.layers, 1, SHAPE.kv_heads)
    with torch.no_grad():
        first, other = (
            forward(
                model.model,
                torch.tensor([ids]),
                GatedAttention(gates, 2, 6, model.shape.acting, chunk=each),
            )
            .logits[0, 29:]
            .argmax(-1)
            .tolist()
            for each in (chunk, 1)
        )
    assert first == evaluated
    assert other != evaluated


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gemma3"])
def test_gates_of_0_are_streaming_evaluation_at_one_token_a_chunk(
    architecture: str, tmp_path: Path
) -> None:
    model = loaded_model(architecture)
    prompt = torch.randint(1, 199, (50,), generator=torch.Generator().manual_seed(5)).tolist()
    row = streaming_row(prompt, 10, tmp_path)
    evaluated = run_rows(model, [row], prefill_chunk=1)[0].tokens

    gates = torch.zeros(SHAPE.layers, 1, SHAPE.kv_heads)
    attention = GatedAttention(gates, 2, 6, model.shape.acting)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(10):
            logits = forward(model.model, torch.tensor([ids]), attention).logits
            ids.append(int(logits[0, -1].argmax()))
    assert ids[len(prompt) :] == evaluated
    assert len(set(evaluated)) > 3
    full = Row(prompt, 10, parse_method("full", {}), 1.0)
    assert run_rows(model, [full], prefill_chunk=None)[0].tokens != evaluated


def dense_streaming(q: Tensor, k: Tensor, v: Tensor, scaling: float, stream: Stream) -> Tensor:
    """Streaming attention in float64 with a T x T mask that is filled entry by entry."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for token in range(length):
        for entry in range(token + 1):
            near = stream.sliding is None or entry > token - stream.sliding
            first = token - token % stream.chunk  # of the token's chunk
            resident = entry < stream.sinks or entry >= first - stream.window
            mask[token, entry] = near and resident
    k, v = k.repeat_interleave(group, 1).double(), v.repeat_interleave(group, 1).double()
    logits = (q.double() @ k.transpose(2, 3)) * scaling
    return (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ v).to(q.dtype)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(1, 300),
    sinks=st.integers(0, 40),
    window=st.integers(1, 150),
    sliding=st.one_of(st.none(), st.integers(5, 100)),
    chunk=st.one_of(st.just(1), st.integers(2, 200)),
)
def test_blocks_of_streaming_attention_are_the_dense_mask(
    length: int, sinks: int, window: int, sliding: int | None, chunk: int
) -> None:
    stream = Stream(sinks, window, sliding, chunk)
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(1, 4, length, 8, generator=generator)
    k, v = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(2))
    expected = dense_streaming(q, k, v, 0.4, stream)
    with mock.patch("kvbench.learning.attention.QUERY_BLOCK", 64):
        got = streaming_blocks(q, k, v, 0.4, stream)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:flex_attention called")  # it is fused only on CUDA
@pytest.mark.parametrize("stream", [Stream(5, 33), Stream(5, 33, 70), Stream(5, 33, None, 50)])
def test_flex_attention_is_the_dense_mask(stream: Stream) -> None:
    q = torch.randn(1, 4, 300, 16, generator=torch.Generator().manual_seed(1))
    k, v = q[:, :2] * 0.5, q[:, 2:] + 1
    expected = dense_streaming(q, k, v, 0.4, stream)
    got = streaming_flex(q, k, v, 0.4, stream)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-4)


def test_a_sliding_layer_sees_its_window() -> None:
    q = torch.randn(1, 4, 90, 8, generator=torch.Generator().manual_seed(1))
    k, v = q[:, :2] * 0.5, q[:, 2:] + 1
    expected = dense_streaming(q, k, v, 0.3, Stream(0, 89, 20))
    torch.testing.assert_close(full_attention(q, k, v, 0.3, 20), expected, atol=2e-6, rtol=1e-4)


# Masks and gradients


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 1.2, 4.0])
def test_the_sampler_follows_its_formulas(log_alpha: float) -> None:
    count = 400_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = hard_concrete(torch.tensor(log_alpha, dtype=torch.float64), uniform)
    zero = zero_probability(torch.tensor(log_alpha, dtype=torch.float64)).item()

    def above(threshold: float) -> float:
        """P(z > threshold) of the stretched concrete variable (1712.01312, appendix)."""
        place = (threshold - LOW) / (HIGH - LOW)
        return float(1 / (1 + np.exp(TEMPERATURE * np.log(place / (1 - place)) - log_alpha)))

    assert zero == pytest.approx(1 - above(0.0), abs=1e-12)
    mean = quad(above, 0, 1)[0]  # of a variable in [0, 1]: the integral of P(z > t)
    assert (drawn == 0).double().mean().item() == pytest.approx(
        zero, abs=5 * (zero * (1 - zero) / count) ** 0.5
    )
    assert drawn.mean().item() == pytest.approx(mean, abs=5 * drawn.std().item() / count**0.5)
    assert (drawn == 1).double().mean().item() == pytest.approx(above(1.0), abs=5e-3)


def finite_difference(function: Any, at: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, entry by entry."""
    result = torch.zeros_like(at)
    for place in np.ndindex(*at.shape):
        up, down = at.clone(), at.clone()
        up[place] += step
        down[place] -= step
        result[place] = (function(up) - function(down)) / (2 * step)
    return result


def gradient(function: Any, at: Tensor) -> Tensor:
    """The gradient by autograd."""
    leaf = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(leaf), leaf)
    return found


def test_gradients_of_masks_sparsity_and_multipliers_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    log_alpha = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    uniform = torch.rand(3, 2, generator=generator, dtype=torch.float64) * 0.4 + 0.3
    multipliers = torch.tensor([0.7, -1.3], dtype=torch.float64)
    for function, at in (
        (lambda a: (hard_concrete(a, uniform) * torch.arange(6.0).view(3, 2)).sum(), log_alpha),
        (expected_sparsity, log_alpha),
        (lambda a: constraint(expected_sparsity(a), 0.6, multipliers), log_alpha),
        (lambda m: constraint(expected_sparsity(log_alpha), 0.6, m), multipliers),
    ):
        expected = finite_difference(function, at)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient(function, at), expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("kind", [PruLong, DuoAttention])
def test_gradients_of_a_whole_step_in_float64(kind: Any) -> None:
    model = plain_model().double()
    ours = loaded_model()
    ours.model.load_state_dict(model.state_dict())
    net = ours.model.double()
    objective = kind(SHAPE, recipe("prulong" if kind is PruLong else "duoattention"), CPU)
    name, start = ("log_alpha", -0.3) if kind is PruLong else ("gate", 0.6)
    noise = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    at = start + 0.1 * noise
    rows = [RandomRows(40).row(0, index) for index in range(2)]

    def loss(value: Tensor) -> Tensor:
        setattr(objective, name, value)
        if kind is PruLong:
            objective.multipliers = torch.tensor([0.5, 0.25], dtype=torch.float64)
        total: Tensor = objective.data_loss(net, rows, 3, [0, 1]) + objective.penalty(3)
        return total

    # The model's norms always compute in float32, so the step is well above their rounding.
    expected = finite_difference(loss, at, step=1e-3)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(gradient(loss, at), expected, atol=2e-3, rtol=1e-2)


def test_the_target_rises_over_four_fifths_of_the_steps() -> None:
    assert [target_at(s, 100, 0.8) for s in (0, 40, 80, 99)] == [0.0, 0.4, 0.8, 0.8]


# The loop


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_prulong_ends_within_one_head_of_its_target(target: float, tmp_path: Path) -> None:
    how = recipe("prulong", target=target, steps=300)
    model = loaded_model()
    model.model.requires_grad_(False)
    objective = PruLong(SHAPE, how, model.device)
    log = learn(model.model, objective, RandomRows(24), how, tmp_path, OneProcess, quiet)
    heads = SHAPE.layers * SHAPE.kv_heads
    assert abs(expected_sparsity(objective.log_alpha).item() - target) <= 1 / heads
    streaming = (zero_probability(objective.log_alpha) > 0.5).sum().item()
    assert abs(streaming - target * heads) <= 1
    assert [line["step"] for line in log] == list(range(300))
    assert {"loss", "sparsity", "target", "l1", "l2"} <= set(log[0])


def test_heads_that_nothing_depends_on_lose_their_gates(tmp_path: Path) -> None:
    how = recipe("duoattention", steps=200)
    model = loaded_model()
    objective = DuoAttention(SHAPE, how, model.device)
    # nine tokens fit sinks + window + 1, so streaming attention equals full attention
    learn(model.model, objective, RandomRows(9), how, tmp_path, OneProcess, quiet)
    assert objective.gate.max().item() == 0.0
    objective = DuoAttention(SHAPE, recipe("duoattention", steps=200, l1=0.0), model.device)
    learn(
        model.model, objective, RandomRows(9), objective.recipe, tmp_path / "x", OneProcess, quiet
    )
    assert objective.gate.min().item() == 1.0


def test_a_broken_training_goes_on_to_the_same_end(tmp_path: Path) -> None:
    def train(folder: Path, stop: int | None) -> Tensor:
        how = recipe("prulong", steps=12)
        model = loaded_model()
        objective = PruLong(SHAPE, how, model.device)

        def show(line: dict[str, float]) -> None:
            if line["step"] == stop:
                raise KeyboardInterrupt

        learn(model.model, objective, RandomRows(24), how, folder, OneProcess, show)
        return objective.log_alpha.detach()

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", 5)
    with (tmp_path / "broken" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # torn by the kill
    assert torch.equal(train(tmp_path / "broken", None), whole)
    lines = [json.loads(t) for t in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12))


def test_ctrl_c_waits_until_a_step_is_whole() -> None:
    interruptible()  # where a shell started the tests in the background
    done = []

    def step() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("updated")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert done == ["updated"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_has_diverged_is_not_saved(tmp_path: Path) -> None:
    class Diverging(PruLong):
        def settle(self, step: int) -> None:
            self.log_alpha.data.fill_(torch.nan)

    how = recipe("prulong", steps=5)
    model = loaded_model()
    objective = Diverging(SHAPE, how, CPU)
    with pytest.raises(InputError, match="diverged at step 0: give a smaller --rate"):
        learn(model.model, objective, RandomRows(9), how, tmp_path, OneProcess, quiet)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_checkpoint_of_other_settings_or_a_broken_one_is_refused(tmp_path: Path) -> None:
    model = loaded_model()
    how = recipe("prulong", steps=2)
    learn(model.model, PruLong(SHAPE, how, CPU), RandomRows(9), how, tmp_path, OneProcess, quiet)
    other = recipe("prulong", steps=3)
    with pytest.raises(InputError, match="other settings"):
        learn(
            model.model,
            PruLong(SHAPE, other, CPU),
            RandomRows(9),
            other,
            tmp_path,
            OneProcess,
            quiet,
        )
    (tmp_path / CHECKPOINT).write_bytes(b"torn")
    with pytest.raises(InputError, match="broken"):
        learn(
            model.model, PruLong(SHAPE, how, CPU), RandomRows(9), how, tmp_path, OneProcess, quiet
        )


def test_a_loss_over_no_token_is_refused() -> None:
    how = recipe("prulong", loss_tokens=1, steps=1)
    rows = [TrainingRow(list(range(1, 41)), [0] * 40)]
    objective = PruLong(SHAPE, how, CPU)
    with pytest.raises(InputError, match="step 0 has no token to predict: 1 of 40 tokens"):
        objective.data_loss(loaded_model().model, rows, 0, [0])


def test_weights_are_trained_only_if_asked_to(tmp_path: Path) -> None:
    changed = {}
    for rate in (0.0, 1e-3):
        model = loaded_model()
        before = model.model.lm_head.weight.clone()
        model.model.requires_grad_(bool(rate))
        how = recipe("prulong", steps=2, weights_rate=rate)
        objective = PruLong(SHAPE, how, CPU)
        learn(model.model, objective, RandomRows(24), how, tmp_path / str(rate), OneProcess, quiet)
        changed[rate] = not torch.equal(model.model.lm_head.weight, before)
    assert changed == {0.0: False, 1e-3: True}


# Data


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", device="cpu")


def test_the_standard_library_is_documents_on_every_machine() -> None:
    found = list(documents("stdlib", seed=0))
    assert sum(map(len, found)) > 5_000_000
    other = list(documents("stdlib", seed=1))
    assert found != other
    assert sorted(found) == sorted(other)
    longest = max(found, key=len)
    assert "import" in longest
    assert len(longest) > 300_000  # a whole package, not a file


def test_a_folder_of_text_and_code(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "deep" / "b.py").write_bytes(b"beta \xff")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    (tmp_path / "empty.md").write_text(" ")
    assert sorted(documents(str(tmp_path), 0)) == ["alpha", "beta \ufffd"]
    assert list(documents(str(tmp_path / "a.txt"), 0)) == ["alpha"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "give a folder"), ("empty", "no text or code"), ("datasets:a/b", "cannot be")],
)
def test_data_that_is_not_there(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        list(documents(name, 0))
    assert "\n" not in str(caught.value)


def test_a_dataset_of_a_local_folder(tmp_path: Path) -> None:
    rows = [{"text": f"document {n}"} for n in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sorted(documents(f"datasets:{tmp_path}", 0))
    assert found == [row["text"] for row in rows]
    (tmp_path / "train.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(InputError, match="no column 'text'"):
        list(documents(f"datasets:{tmp_path}", 0))


def test_packed_rows_are_the_documents_one_after_another(tiny: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven")
    rows = PackedRows(read_tokens(str(tmp_path), tiny.tokenizer, 80, 0, least=4), 4, 2)
    ids = [*tiny.tokenizer.encode("one two three four five six seven"), tiny.tokenizer.eos_token_id]
    assert rows.row(0, 0).ids == ids[:4]
    assert rows.row(0, 1).ids == ids[4:8]
    assert rows.row(0, 0).answers == [0, 1, 1, 1]
    assert rows.row(rows.count, 0) == rows.row(0, 0)
    with pytest.raises(InputError, match="less than one sequence"):
        read_tokens(str(tmp_path), tiny.tokenizer, 80_000, 0, least=4000)


def test_task_rows_are_episodes_that_no_evaluation_sees(tiny: LoadedModel) -> None:
    from kvbench.registry import tasks

    rows = [TaskRows(tiny.tokenizer, 512, seed).row(0, i) for seed in (0, 1) for i in range(40)]
    assert rows[0] == TaskRows(tiny.tokenizer, 512, 0).row(0, 0)
    texts = [tiny.tokenizer.decode(row.ids) for row in rows]
    assert len(set(texts)) == len(texts)
    assert all(any(row.answers) and not row.answers[0] for row in rows)
    for name in ("recall", "rag", "rerank", "html_to_tsv"):
        for sample in tasks.get(name)().samples(8, seed=0, context=512, tokenizer=tiny.tokenizer):
            middle = len(sample.prompt) // 2
            assert not any(sample.prompt[middle : middle + 200] in text for text in texts)


@settings(max_examples=15, deadline=None)
@given(
    step=st.integers(0, 1000),
    index=st.integers(0, 7),
    words=st.integers(1, 8),
    length=st.integers(300, 1500),
)
def test_passkeys_are_hidden_and_asked_for(
    tiny: LoadedModel, step: int, index: int, words: int, length: int
) -> None:
    text = " ".join(f"word{'abcdefgh'[i % 8]}x the quick" for i in range(900))
    filler = np.asarray(tiny.tokenizer.encode(text))
    rows = PasskeyRows(filler, tiny.tokenizer, length, 10, words, seed=3)
    row = rows.row(step, index)
    assert row == rows.row(step, index)
    assert row.ids != rows.row(step, index + 1).ids
    assert len(row.ids) == len(row.answers) <= max(length, 400)
    answer = tiny.tokenizer.decode(
        [i for i, counted in zip(row.ids, row.answers, strict=True) if counted]
    )
    decoded = tiny.tokenizer.decode(row.ids)
    keys = [key for key in answer.split(".") if key]
    assert 1 <= len(keys) <= 10
    for key in keys:
        assert decoded.count(f"is{key}.") >= 2  # once hidden, once asked for


# Recipes


def test_recipes_are_published_settings_then_the_card_then_the_user() -> None:
    made = make_recipe("prulong", BASIC, {"steps": 300}, {"steps": "7", "window": "9"})
    assert (made.steps, made.window, made.sinks, made.batch) == (7, 9, 128, 16)
    assert made.l1 is None
    for settings_, message in (
        ({"stps": 1}, "did you mean 'steps'"),
        ({"l1": 1}, "no 'l1'"),
        ({"steps": "many"}, "must be int"),
        ({"steps": 0}, "at least 1"),
        ({"target": 1.5}, "between 0 and 1"),
        ({"warm_up": 2}, "share of the steps"),
    ):
        with pytest.raises(InputError, match=message):
            make_recipe("prulong", BASIC, settings_)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    made = recipe("prulong", steps=100)
    rates = [made.rate_at(step) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 90)
