"""Reading a GGUF file that was written with the format's own library."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.errors import InputError
from kvbench.models.gguf import WEIGHTS, read_gguf

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "Ġx", "ĠĠ", "12"]
MERGES = ["Ġ x", "Ġ Ġ", "1 2"]


def some_model(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def write(
    path: Path,
    model: Any,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    scaling: str = "none",
) -> None:
    """Write the model as a GGUF file, with each head's rows of q and k in the format's order."""
    config, file = model.config, GGUFWriter(path, architecture)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_freq_base(5000.0)
    file.add_string("llama.rope.scaling.type", scaling)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(pre)
    file.add_token_list(TOKENS)
    file.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    file.add_token_merges(MERGES)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    names = {theirs: ours for ours, theirs in WEIGHTS.items()}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        whole, _, kind = name.rpartition(".")
        layer = ""
        if whole.startswith("model.layers."):
            number, _, whole = whole.removeprefix("model.layers.").partition(".")
            layer = f"blk.{number}."
        if whole.endswith(("q_proj", "k_proj")):
            # for every r: row r of the first half of a head, then row r of the second half
            heads = [head.chunk(2) for head in weight.split(config.head_dim)]
            rows = [row for a, b in heads for pair in zip(a, b, strict=True) for row in pair]
            weight = torch.stack(rows)
        file.add_tensor(f"{layer}{names[whole]}.{kind}", weight.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.mark.parametrize("tied", [False, True])
def test_the_model_that_was_written_is_read(tmp_path: Path, tied: bool) -> None:
    model = some_model(tied=tied)
    write(tmp_path / "model.gguf", model)
    got, tokenizer = read_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    expected = model.state_dict()
    assert got.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in got.state_dict().items())
    ids = torch.arange(40)[None]
    assert torch.allclose(got(ids).logits, model(ids).logits, atol=1e-6)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
    assert got.generation_config.eos_token_id == 2
    assert tokenizer.eos_token == "<|im_end|>"


def test_the_tokenizer_splits_digits_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", some_model())
    tokenizer = read_gguf(tmp_path / "model.gguf")[1]
    assert tokenizer.tokenize("x  12 x<|im_end|>") == ["x", "ĠĠ", "1", "2", "Ġx", "<|im_end|>"]
    text = " é\n\t0 <|im_start|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    turn = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(turn, tokenize=False) == "x<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "qwen2"}, "not a llama"),
        ({"pre": "qwen2"}, "unknown kind"),
        ({"scaling": "yarn"}, "RoPE scaling of type yarn"),
    ],
)
def test_what_is_not_known_here_is_refused(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    write(tmp_path / "model.gguf", some_model(), **change)
    with pytest.raises(InputError, match=message):
        read_gguf(tmp_path / "model.gguf")
