"""The embedded model before training: a small Llama that starts with parts of induction heads."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.learning.recipe import TinyRecipe

# How many tokens back each matching KV head of layer 1 compares at the start (0: the token itself).
OFFSETS = ((0, 1, 2), (0, 2, 3), (1, 2, 3), (0, 3, 4))


def tiny_model(recipe: TinyRecipe, vocabulary: int, end: int, pad: int) -> LlamaForCausalLM:
    """The untrained model for `vocabulary` tokens; `end` and `pad` are the ids of special tokens.

    Equal arguments give equal weights.
    """
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.query_heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        attention_bias=True,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 0.05)
        prepare_induction(model, recipe)
    return model


def prepare_induction(model: LlamaForCausalLM, recipe: TinyRecipe) -> None:
    """Set layers 0 and 1 so that the model can already do rough induction.

    Layer 0: query head h attends h + 1 tokens back, because its queries and keys are constant and
    RoPE makes their product highest at that distance. It writes a sketch of the token found there
    to its own subspace of the hidden states.

    Layer 1: queries hold the sketches of the tokens at `OFFSETS` back, keys the sketches one token
    further back. Where they match, the token that followed is found, and its value is copied to the
    output. Only slow RoPE frequencies are used, which hardly turn over a context.
    """
    hidden, dim, half = recipe.hidden, recipe.head_dim, recipe.head_dim // 2
    heads, kv_heads = recipe.query_heads, recipe.kv_heads
    group = heads // kv_heads
    frequencies = recipe.rope_theta ** (-torch.arange(half) / half)
    amplitude = torch.zeros(half)
    amplitude[:5] = torch.tensor([7.0, 5.5, 4.5, 4.5, 3.0])
    slow = [i for i in range(half) if frequencies[i] < 2e-3]
    places = torch.tensor([*slow, *(half + i for i in slow)])

    def subspaces() -> torch.Tensor:
        """Random orthogonal subspaces of the hidden states, [hidden / dim, dim, hidden]."""
        return torch.linalg.qr(torch.randn(hidden, hidden))[0].view(-1, dim, hidden)

    first = model.model.layers[0].self_attn
    sketches = subspaces()
    traces = torch.cat([subspaces(), subspaces()])
    queries = first.q_proj.bias.view(heads, 2, half)
    first.k_proj.bias.view(kv_heads, 2, half)[:, 0] = amplitude
    first.v_proj.weight.view(kv_heads, dim, hidden)[:] = sketches[0]
    written = first.o_proj.weight.view(hidden, heads, dim)
    for head in range(heads):
        # The heads of a query group share a key, so the query sets the distance.
        queries[head, 0] = amplitude * torch.cos(frequencies * (head + 1))
        queries[head, 1] = -amplitude * torch.sin(frequencies * (head + 1))
        written[:, head] = 0.06 * traces[head].T

    second = model.model.layers[1].self_attn
    look = second.q_proj.weight.view(heads, dim, hidden)
    show = second.k_proj.weight.view(kv_heads, dim, hidden)
    for kv_head, offsets in enumerate(OFFSETS[:kv_heads]):
        for offset in offsets:
            narrow = torch.linalg.qr(torch.randn(dim, dim))[0][: len(places)]
            back = sketches[0] if offset == 0 else 1.6 * traces[offset - 1]
            look[kv_head * group : (kv_head + 1) * group, places] += 1.5 * narrow @ back
            show[kv_head, places] += 1.5 * narrow @ traces[offset]
        copied = sketches[1 + kv_head]
        second.v_proj.weight.view(kv_heads, dim, hidden)[kv_head] = copied
        out = second.o_proj.weight.view(hidden, kv_heads, group, dim)
        out[:, kv_head] = 0.1 * copied.T[:, None]
