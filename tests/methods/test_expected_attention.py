"""Expected attention, compared with a slow implementation of the paper in float64."""

import pytest
import torch
from helpers.architectures import random_model
from helpers.engine import tokens
from helpers.models import loaded_model
from helpers.oracles import expected_attention
from torch import Tensor

from kvbench.engine.reference import run_reference
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.errors import InputError
from kvbench.models.attention import AttentionCall, Probe
from kvbench.models.load import forward, wrap_model
from kvbench.spec import method_names, parse_method

PROMPT = 96


class Recorder(Probe):
    """Full attention that remembers its calls."""

    def attend(self, call: AttentionCall) -> Tensor:
        super().attend(call)
        return torch.nn.functional.scaled_dot_product_attention(
            call.query,
            call.key,
            call.value,
            is_causal=True,
            scale=call.rules.scaling,
            enable_gqa=True,
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("chunk", [None, 25])
@pytest.mark.parametrize("budget", [0.1, 0.5])
def test_it_keeps_what_the_paper_says(architecture: str, chunk: int | None, budget: float) -> None:
    model, prompt, recorder = loaded_model(architecture), tokens(PROMPT, 5), Recorder()
    row = Row(prompt, 4, parse_method("expected-attention", {}), budget)
    found = run_rows(model, [row], prefill_chunk=chunk, keep_positions=True)[0].kept
    assert found is not None
    positions = torch.arange(PROMPT)[None]
    with torch.inference_mode():
        forward(model, torch.tensor([prompt]), positions, recorder)
        rotary = model.model.model.rotary_emb
        cos, sin = rotary(torch.zeros(1), torch.arange(PROMPT, PROMPT + 512)[None])
        for call in recorder.calls:
            module, size = call.module, call.query.shape[3]
            # Its queries before RoPE: the model's own cos and sin, turned the other way.
            own_cos, own_sin = rotary(torch.zeros(1), positions)
            half = torch.cat(
                [-call.query[0][..., size // 2 :], call.query[0][..., : size // 2]], -1
            )
            queries = call.query[0] * own_cos[0] - half * own_sin[0]
            expected = expected_attention(
                queries,
                call.key[0],
                call.value[0],
                cos[0],
                sin[0],
                module.scaling,
                round(budget * PROMPT),
            )
            assert found[call.layer] == expected


def test_what_it_gathers_is_counted_and_does_not_grow_with_the_prompt() -> None:
    model, names = loaded_model(), ("expected-attention", "knorm")
    for length in (40, 400):
        rows = [Row(tokens(length), 2, parse_method(name, {}), 0.5) for name in names]
        mine, theirs = (run_rows(model, [row], prefill_chunk=20)[0] for row in rows)
        layers, query_heads, size = 3, 4, 8
        gathered = layers * query_heads * (size + 1) ** 2 * 8  # in float64
        assert mine.kv_bytes_peak - theirs.kv_bytes_peak == gathered


def test_a_prompt_no_longer_than_the_sinks() -> None:
    model = loaded_model()
    for length in (1, 3, 4, 5):
        row = Row(tokens(length), 3, parse_method("expected-attention", {}), 0.5)
        outcome = run_rows(model, [row], prefill_chunk=2, keep_positions=True)[0]
        assert outcome.kept == run_reference(model, row, 2).kept
        assert outcome.failure is None


def test_all_queries_cannot_be_patched() -> None:
    assert "expected-attention-naive" in method_names()
    assert "expected-attention-patched" not in method_names()
    with pytest.raises(InputError, match="observes no last queries"):
        parse_method("expected-attention-patched", {})


def test_a_model_whose_rotation_is_not_known_is_refused_in_one_line() -> None:
    model = wrap_model(random_model("hunyuan_v1_dense", {}), None, name="hunyuan")
    row = Row(tokens(20), 2, parse_method("expected-attention", {}), 0.5)
    with pytest.raises(InputError, match="does not know the model's rotation"):
        run_rows(model, [row], prefill_chunk=None)
