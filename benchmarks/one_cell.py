"""One full-attention cell against plain `generate`, on the same prompts, in one run.

    python benchmarks/one_cell.py [--model tiny] [--context 1024] [--new 32] [--repeats 9]

Both are greedy and give the same tokens. They take turns, and medians are compared.
"""

import argparse
import statistics
import time

import torch

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.models.load import load_model, read_model
from kvbench.spec import parse_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    ours = load_model(arguments.model)
    plain, _ = read_model(arguments.model, dtype=ours.dtype, attn_implementation="sdpa")
    plain.to(ours.device)
    plain.generation_config.eos_token_id = None
    ours.model.generation_config.eos_token_id = -1
    ids = torch.randint(1, 200, (1, arguments.context - arguments.new), device=ours.device)
    row = Row(ids[0].tolist(), arguments.new, parse_method("full", {}), 1.0)

    def run_plain() -> list[int]:
        out = plain.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=arguments.new,
            do_sample=False,
        )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens

    def run_ours() -> list[int]:
        return run_rows(ours, [row], prefill_chunk=None)[0].tokens

    assert run_plain() == run_ours()
    times: dict[str, list[float]] = {"generate": [], "kvbench": []}
    for _ in range(arguments.repeats):
        for name, function in (("generate", run_plain), ("kvbench", run_ours)):
            if ours.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:9} {1000 * median:9.1f} ms, {min(times[name]) * 1000:.1f} at best")
    print(f"ratio     {medians['kvbench'] / medians['generate']:9.3f}")


if __name__ == "__main__":
    main()
