"""The shape of Llama-3.1-8B with random weights on a GPU: time and memory at long contexts.

    python benchmarks/gpu_shapes.py [--contexts 8192,32768,131072] [--chunk 32768] [--new 64]

For full, snapkv-patched and prulong at 0.3: prefill and decoding against the model's own flash (or
SDPA) attention with transformers' cache in the same run, and peak memory beside the weights against
what the counted peak of entries predicts. Random weights keep nothing sensible, which changes
neither time nor memory; the head scores are random too.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvbench.engine import Row, run_rows
from kvbench.flash import find_kernel
from kvbench.model import LoadedModel, wrap_model
from kvbench.spec import parse_method
from kvbench.sweep import gib

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072 + 4096,
    "rope_theta": 500000.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--chunk", type=int, default=32768)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_shapes needs a GPU: this PyTorch sees none", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda")
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": arguments.layers})
    config._attn_implementation = "sdpa"
    with device:
        torch.set_default_dtype(torch.bfloat16)
        plain = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    plain.generation_config.eos_token_id = None
    kernel, kernel_name = find_kernel()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, attention: {kernel_name}")
    print(
        f"{'context':>8} {'method':16} prefill s  own  ratio  ms/token  own  ratio  GiB / predicted"
    )
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.tsv"
        table = torch.rand(arguments.layers, SHAPE["num_key_value_heads"]).tolist()
        scores.write_text("\n".join("\t".join(map(str, row)) for row in table))
        for context in map(int, arguments.contexts.split(",")):
            prompt = torch.randint(1, 1000, (context - arguments.new,)).tolist()
            plain.set_attn_implementation("sdpa")
            own = plain_times(plain, prompt, arguments.new)
            name = "sdpa" if kernel is None else "flash"
            ours = wrap_model(plain, None, name="llama-8b-shape", attention=name)
            for method in ("full", "snapkv-patched", "prulong"):
                print(f"{context:8} " + measured(ours, method, scores, prompt, arguments, own))


def plain_times(model: LlamaForCausalLM, prompt: list[int], new: int) -> tuple[float, float]:
    """Seconds of the prefill and of a decoded token with the model's own attention and cache."""
    ids = torch.tensor([prompt], device="cuda")
    times = (0.0, 0.0)
    for _ in range(2):  # the first is a warm-up
        with torch.inference_mode():
            cache = DynamicCache()
            torch.cuda.synchronize()
            started = time.perf_counter()
            out = model(ids, past_key_values=cache, logits_to_keep=1)
            torch.cuda.synchronize()
            read = time.perf_counter()
            for _ in range(new - 1):
                out = model(out.logits[:, -1].argmax(-1)[None], past_key_values=cache)
            torch.cuda.synchronize()
            times = read - started, (time.perf_counter() - read) / (new - 1)
        del cache, out
        torch.cuda.empty_cache()
    return times


def measured(
    model: LoadedModel,
    method: str,
    scores: Path,
    prompt: list[int],
    arguments: argparse.Namespace,
    own: tuple[float, float],
) -> str:
    """A line of the table."""
    options = {"prulong.scores": str(scores)}
    spec = parse_method(method, options if method == "prulong" else {})
    row = Row(prompt, arguments.new, spec, 1.0 if method == "full" else 0.3)
    try:
        for _ in range(2):
            torch.cuda.empty_cache()
            weights = torch.cuda.memory_allocated()
            outcome = run_rows(model, [row], prefill_chunk=arguments.chunk)[0]
    except torch.OutOfMemoryError:
        return f"{method:16} out of memory"
    shape = model.shape
    fed = outcome.prompt_tokens + outcome.new_tokens - 1
    entries = outcome.kv_peak * fed * shape.layers * shape.kv_heads
    predicted = entries * 2 * shape.head_dim * model.dtype.itemsize
    taken = (outcome.device_bytes_peak or 0) - weights
    token = outcome.decode_seconds / (outcome.new_tokens - 1)
    prefill = outcome.prefill_seconds
    return (
        f"{method:16} {prefill:9.2f} {own[0]:5.2f} {prefill / own[0]:6.2f}"
        f" {1000 * token:9.2f} {1000 * own[1]:5.2f} {token / own[1]:6.2f}  {gib(taken)} all, "
        f"{gib(outcome.kv_bytes_peak)} KV / {gib(predicted)}"
    )


if __name__ == "__main__":
    main()
