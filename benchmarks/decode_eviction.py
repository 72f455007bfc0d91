"""Time of a decoding step of methods that evict while decoding, against full attention's.

    python benchmarks/decode_eviction.py [--model tiny] [--context 1024] [--rows 16] [--new 64]

The rows have different prompts, and methods their default options. Only decoding is timed, and the
evictions with it. Full attention and the methods take turns, and medians are compared.
"""

import argparse
import statistics

import torch

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.method import Family
from kvbench.models.load import load_model
from kvbench.registry import methods
from kvbench.spec import parse_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    model.model.generation_config.eos_token_id = -1
    length = arguments.context - arguments.new
    prompts = torch.randint(1, 200, (arguments.rows, length)).tolist()
    decoding = [n for n in methods.names() if methods.get(n).family is Family.DECODING]
    budgets = {"full": 1.0, **dict.fromkeys(decoding, arguments.budget)}

    def milliseconds(name: str) -> float:
        spec = parse_method(name, {}, model.card.options)
        rows = [Row(prompt, arguments.new, spec, budgets[name]) for prompt in prompts]
        outcomes = run_rows(model, rows, prefill_chunk=None)
        seconds = sum(outcome.decode_seconds for outcome in outcomes)
        return float(1000 * seconds / (arguments.new - 1))

    times: dict[str, list[float]] = {name: [] for name in budgets}
    for _ in range(arguments.repeats):
        for name, taken in times.items():
            taken.append(milliseconds(name))
    full = statistics.median(times["full"])
    print(f"{'method':16} ms a step  of full attention's ({arguments.rows} rows)")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:16} {middle:9.2f} {middle / full:8.2f}")


if __name__ == "__main__":
    main()
