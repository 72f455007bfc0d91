"""Time and bytes of a decoding step of quest, which reads some pages, against full attention's.

    python benchmarks/dynamic_sparsity.py [--model tiny] [--context 4096] [--budget 0.1] [--new 64]

Bytes are those of the keys, values and page bounds that a decoded token reads in all layers. Only
decoding is timed. Both take turns, and medians are compared. `--layers N` replaces the model by
random weights, as in `kv_bytes.py`; the first two layers of quest read everything.
"""

import argparse
import statistics

import torch
from kv_bytes import random_model

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.models.load import load_model
from kvbench.spec import parse_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    model = random_model(arguments) if arguments.layers else load_model(arguments.model)
    model.model.generation_config.eos_token_id = -1
    length = arguments.context - arguments.new
    budgets = {"full": 1.0, "quest": arguments.budget}

    def step(name: str, prompts: list[list[int]]) -> tuple[float, float]:
        """Milliseconds of a step, and MiB that a token reads."""
        spec = parse_method(name, {}, model.card.options)
        rows = [Row(prompt, arguments.new, spec, budgets[name]) for prompt in prompts]
        outcomes = run_rows(model, rows, prefill_chunk=None)
        seconds = sum(outcome.decode_seconds for outcome in outcomes)
        return 1000 * seconds / (arguments.new - 1), (outcomes[0].kv_bytes_read or 0) / 2**20

    print(f"{'rows':>4} {'method':6} ms a step  of full  MiB a token  of full")
    for count in arguments.rows:
        prompts = torch.randint(1, 200, (count, length)).tolist()
        turns = [{name: step(name, prompts) for name in budgets} for _ in range(arguments.repeats)]
        times = {name: statistics.median(turn[name][0] for turn in turns) for name in budgets}
        for name, middle in times.items():
            read, whole = turns[0][name][1], turns[0]["full"][1]
            print(
                f"{count:4} {name:6} {middle:9.2f} {middle / times['full']:8.2f} {read:12.2f} "
                f"{read / whole:8.2f}"
            )


if __name__ == "__main__":
    main()
