"""Tokens a second of batched decoding against one row's, in one run.

    python benchmarks/decode_batch.py [--model tiny] [--context 1024] [--rows 16] [--new 64]

Full attention; the rows have different prompts. Only decoding is timed. The batch and the single
row take turns, and medians are compared.
"""

import argparse
import statistics

import torch

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.models.load import load_model
from kvbench.spec import parse_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    model.model.generation_config.eos_token_id = -1
    spec = parse_method("full", {})
    length = arguments.context - arguments.new
    prompts = torch.randint(1, 200, (arguments.rows, length)).tolist()
    rows = [Row(prompt, arguments.new, spec, 1.0) for prompt in prompts]

    def tokens_per_second(chosen: list[Row]) -> float:
        outcomes = run_rows(model, chosen, prefill_chunk=None)
        fed = sum(outcome.new_tokens - 1 for outcome in outcomes)
        return fed / sum(outcome.decode_seconds for outcome in outcomes)

    one, many = [], []
    for _ in range(arguments.repeats):
        one.append(tokens_per_second(rows[:1]))
        many.append(tokens_per_second(rows))
    a, b = statistics.median(one), statistics.median(many)
    print(f"1 row      {a:9.0f} tokens/s")
    print(f"{arguments.rows} rows {b:13.0f} tokens/s")
    print(f"ratio      {b / a:9.2f}")


if __name__ == "__main__":
    main()
