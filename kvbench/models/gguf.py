"""Reads a Llama model from a GGUF file: configuration, dequantised weights and tokenizer.

transformers reads such a file and gets the same weights, but it reads the file three times, needs
another package, and splits spaces before a digit differently from how the model was trained.
"""

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvbench.errors import InputError
from kvbench.models.files import check_weights

CONTROL = 3  # the token type of special tokens

WEIGHTS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path, **options: Any) -> tuple[Any, Any]:
    """The model and the tokenizer of a GGUF file; `options` go to `from_pretrained`.

    InputError if the model is not a Llama or the tokenizer's kind is unknown.
    """
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise InputError(f"'{path}' is a {fields['general.architecture']}, not a llama")
    config = read_config(
        fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors)
    )
    weights = dict(read_weight(tensor, config) for tensor in reader.tensors)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model, found = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `check_weights` names them
        **options,
    )
    check_weights(found, path.name)
    return model, read_tokenizer(path, fields)


def read_config(fields: dict[str, Any], *, tied: bool) -> LlamaConfig:
    """The configuration in a file's fields."""
    heads = fields["llama.attention.head_count"]
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise InputError(f"RoPE scaling of type {fields['llama.rope.scaling.type']} is not read")
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def read_weight(tensor: Any, config: LlamaConfig) -> tuple[str, Tensor]:
    """A tensor's name in transformers, and its values in float32."""
    *block, name, kind = tensor.name.split(".")
    layer = f"model.layers.{block[1]}." if block else ""
    values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    if name in ("attn_q", "attn_k"):
        # The file interleaves the two halves that RoPE rotates; transformers concatenates them.
        heads = config.num_attention_heads if name == "attn_q" else config.num_key_value_heads
        values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return f"{layer}{WEIGHTS[name]}.{kind}", values


def read_tokenizer(path: Path, fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of a file, with its special tokens and chat template."""
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise InputError(f"'{path}' has a tokenizer of an unknown kind: {kind}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # Single digits first, then as GPT-2 splits text.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [token for token, of in zip(tokens, types, strict=True) if of == CONTROL]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
    )
