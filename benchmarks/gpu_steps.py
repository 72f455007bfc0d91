"""Decoding on a GPU: steps captured in a CUDA graph against steps that are launched one by one.

    python benchmarks/gpu_steps.py [--context 1024] [--new 64] [--rows 1,16]

The embedded model, and the shapes of SmolLM2-135M and Llama-3.2-1B with random weights, in
bfloat16: milliseconds a step, the capture included. The last column is the share of a step that it
costs to read its tokens, compared with replaying the graph without waiting for it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.engine.graph import Repeated
from kvbench.engine.row import Row
from kvbench.engine.run import Repeat, run_rows
from kvbench.models.load import LoadedModel, load_model, wrap_model
from kvbench.spec import parse_method

SHAPES = {
    "smollm2-135m": (49152, 576, 1536, 30, 9, 3),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8),
}
one_by_one = partial(Repeated, first=10**9)  # captures nothing
REPLAYED = 30  # steps; the second half reads its tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rows", default="1,16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_steps needs a GPU: this PyTorch sees none", file=sys.stderr)
        raise SystemExit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16")
    print(f"{'model':14} rows  one by one  captured  ratio  reading tokens")
    spec = parse_method("full", {})
    for name in ("tiny", *SHAPES):
        model = made(name)
        for count in map(int, arguments.rows.split(",")):
            length = arguments.context - arguments.new
            prompts = torch.randint(1, 200, (count, length)).tolist()
            rows = [Row(prompt, arguments.new, spec, 1.0) for prompt in prompts]
            plain, captured = step(model, rows, one_by_one), step(model, rows, Repeated)
            waiting = share_of_reading(model, rows)
            print(
                f"{name:14} {count:4} {1000 * plain:11.2f} {1000 * captured:9.2f} "
                f"{plain / captured:6.2f} {waiting:11.0%}",
                flush=True,
            )


def made(name: str) -> LoadedModel:
    """The embedded model, or random weights in one of the shapes."""
    if name == "tiny":
        model = load_model("tiny", device="cuda", dtype="bfloat16")
        model.model.generation_config.eos_token_id = -1
        return model
    model = LlamaForCausalLM(config_of(name)).eval().to("cuda", torch.bfloat16)
    return wrap_model(model, None, name=name)


def config_of(name: str) -> LlamaConfig:
    """The configuration of one of the shapes."""
    vocabulary, hidden, wide, layers, heads, kv_heads = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=None,
    )


def step(model: LoadedModel, rows: list[Row], repeat: Repeat) -> float:
    """Seconds of a step, the best of three runs."""
    runs = [run_rows(model, rows, prefill_chunk=None, repeat=repeat) for _ in range(3)]
    seconds = min(sum(outcome.decode_seconds for outcome in outcomes) for outcomes in runs)
    return seconds / (rows[0].max_new_tokens - 1)


def share_of_reading(model: LoadedModel, rows: list[Row]) -> float:
    """The share of replaying a step and reading its tokens that the reading costs."""
    found = []

    class Timed(Repeated):
        def __call__(self) -> None:
            super().__call__()
            if self.calls != self.first + 2 or self.graph is None:
                return
            tokens = torch.zeros(len(rows), dtype=torch.long, device="cuda")
            seconds = []
            reads: list[Callable[[], object]] = [lambda: None, tokens.tolist]
            for read in reads:
                torch.cuda.synchronize()
                started = time.perf_counter()
                for _ in range(REPLAYED // 2):
                    self.graph.replay()
                    read()
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            found.append(1 - seconds[0] / seconds[1])
            raise Enough  # the replayed steps have used up the storage for the answer

    with suppress(Enough):
        run_rows(model, rows, prefill_chunk=None, repeat=Timed)
    return found[0]


class Enough(Exception):
    """The measurement is done."""


if __name__ == "__main__":
    main()
