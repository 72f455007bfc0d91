"""The shape of Llama-3.1-8B with random weights on a GPU: time and memory at long contexts.

    python benchmarks/gpu_shapes.py [--contexts 8192,32768,131072] [--chunk 32768] [--new 64]

For full, snapkv-patched and prulong at 0.3. Prefill and decoding are compared with the model's own
flash (or SDPA) attention and transformers' cache in the same run, and with a floor: the arithmetic
at the speed of a large matrix product, the bytes at the speed of a large copy, both measured here.
Peak bytes of keys and values as counted are compared with what the peak of entries predicts. The
last column is everything that was allocated besides the weights, mostly a chunk's activations.
Random weights and head scores keep nothing sensible, which changes neither time nor memory. The
second of two runs counts; beyond 32,768 tokens the first one is of a short prompt.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvbench.engine.kernels.flash_attn import flash_attn_partial
from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.models.load import LoadedModel, wrap_model
from kvbench.spec import parse_method
from kvbench.sweep.runner import gib

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
WARMED = 32768  # tokens; longer prompts run once, after a short one
SHORT = 2048


@dataclass(frozen=True)
class Times:
    """Of one prompt: seconds of the prefill and of a decoded token; peak bytes without weights."""

    prefill: float
    token: float
    peak: int


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
    config = LlamaConfig(**{**SHAPE, "num_hidden_layers": arguments.layers})
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        plain = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    plain.generation_config.eos_token_id = None
    flash = flash_attn_partial() is not None
    rates = speed_of_memory(), speed_of_products()
    kernel = "flash-attn" if flash else "PyTorch's"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, attention: {kernel}")
    print(f"memory {rates[0] / 1e12:.2f} TB/s, bfloat16 products {rates[1] / 1e12:.0f} TFLOP/s")
    print(
        f"{'context':>8} {'method':15} prefill s  /own  /floor  ms a token  /own  /floor"
        "   KV bytes (predicted)   all (own all)"
    )
    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.tsv"
        table = torch.rand(arguments.layers, config.num_key_value_heads).tolist()
        scores.write_text("\n".join("\t".join(map(str, row)) for row in table))
        for context in map(int, arguments.contexts.split(",")):
            prompt = torch.randint(1, 1000, (context - arguments.new,)).tolist()
            plain.set_attn_implementation("sdpa")
            own = plain_times(plain, prompt, arguments.new)
            ours = wrap_model(
                plain, None, name="llama-8b-shape", attention="flash" if flash else "sdpa"
            )
            for method in ("full", "snapkv-patched", "prulong"):
                line = measured(ours, method, scores, prompt, arguments, own, rates)
                print(f"{context:8} {line}", flush=True)


def speed_of_memory() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(2**30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def speed_of_products() -> float:
    """Operations a second of a large product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b)


def seconds(function: Callable[[], object]) -> float:
    """The median of some runs."""
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def warm_up(prompt: list[int]) -> list[int]:
    """What is run first, so that kernels are compiled: the prompt, if it is not long."""
    return prompt if len(prompt) <= WARMED else prompt[:SHORT]


def plain_times(model: LlamaForCausalLM, prompt: list[int], new: int) -> Times:
    """Times with the model's own attention and cache."""
    for tokens in (warm_up(prompt), prompt):
        ids = torch.tensor([tokens], device="cuda")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
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
            token = (time.perf_counter() - read) / (new - 1)
        peak = torch.cuda.max_memory_allocated() - weights
        del cache, out
    return Times(read - started, token, peak)


def measured(
    model: LoadedModel,
    method: str,
    scores: Path,
    prompt: list[int],
    arguments: argparse.Namespace,
    own: Times,
    rates: tuple[float, float],
) -> str:
    """A line of the table."""
    options = {"prulong.scores": str(scores)}
    spec = parse_method(method, options if method == "prulong" else {})
    try:
        for tokens in (warm_up(prompt), prompt):
            row = Row(tokens, arguments.new, spec, 1.0 if method == "full" else 0.3)
            torch.cuda.empty_cache()
            weights = torch.cuda.memory_allocated()
            outcome = run_rows(model, [row], prefill_chunk=arguments.chunk)[0]
    except torch.OutOfMemoryError:
        return f"{method:15} out of memory"
    shape, read = model.shape, len(prompt)
    entry = 2 * shape.head_dim * model.dtype.itemsize
    of_all = (read + outcome.new_tokens - 1) * shape.layers * shape.kv_heads * entry
    peak = outcome.kv_held_peak * of_all
    prefill, decoded = outcome.prefill_seconds, outcome.new_tokens - 1
    token = outcome.decode_seconds / decoded
    held = outcome.timeline[-1][1]  # entries at the end, about what each token reads
    body = weights - model.model.get_input_embeddings().weight.nbytes  # of which a row is read
    least_token = (body + entry * held) / rates[0]
    head = model.model.get_output_embeddings().weight.numel()
    operations = 2 * read * (body / model.dtype.itemsize - head)
    attended = outcome.resident_rows - decoded * held
    operations += 4 * attended * shape.head_dim * shape.group
    least_prefill = operations / rates[1]
    taken = (outcome.device_bytes_peak or 0) - weights
    return (
        f"{method:15} {prefill:9.2f} {prefill / own.prefill:5.2f} {prefill / least_prefill:7.2f}"
        f" {1000 * token:11.2f} {token / own.token:5.2f} {token / least_token:7.2f}"
        f"   {gib(outcome.kv_bytes_peak):>9} ({outcome.kv_bytes_peak / peak:.3f})"
        f"   {gib(taken):>9} ({gib(own.peak)})"
    )


if __name__ == "__main__":
    main()
