"""A sweep against the same cells one by one, and what more budgets, samples and context cost.

    python benchmarks/sweep.py [--model tiny] [--context 1024] [--new 16] [--repeats 3]

Cells are {snapkv, pyramidkv} x budgets of one sample and of four, with answers of fixed length.
What is compared takes turns within one run, and medians are compared. In float32 the tokens are
equal too; the output says how many rows differ.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kvbench.engine.row import Outcome, Row
from kvbench.engine.run import run_rows
from kvbench.models.load import LoadedModel, load_model
from kvbench.spec import parse_method

BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CHUNKED = ("recency", "snapkv-naive", "snapkv-patched", "pyramidkv-naive", "pyramidkv-patched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    model.model.generation_config.eos_token_id = -1
    context, new = arguments.context, arguments.new

    def rows(
        methods: tuple[str, ...], budgets: tuple[float, ...], samples: int, length: int
    ) -> list[Row]:
        made = []
        for sample in range(samples):
            torch.manual_seed(sample)
            prompt = torch.randint(1, 200, (length - new,)).tolist()
            for name in methods:
                spec = parse_method(name, {}, model.card.options)
                made += [Row(prompt, new, spec, budget, sample) for budget in budgets]
        return made

    post_fill = ("snapkv", "pyramidkv")
    one, four = (rows(("snapkv",), (0.3,), samples, context) for samples in (1, 4))
    sweep = rows(post_fill, BUDGETS, 1, context)
    chunked = rows(CHUNKED, BUDGETS, 1, context)
    runs: dict[str, Callable[[], list[Outcome]]] = {
        "one cell": lambda: together(model, one, context),
        "12 post-fill cells": lambda: together(model, sweep, context),
        "  with the baseline": lambda: together(
            model, [*sweep, Row(sweep[0].prompt, new, parse_method("full", {}), 1.0)], context
        ),
        "  one by one": lambda: alone(model, sweep, context),
        "  3 budgets": lambda: together(model, rows(post_fill, BUDGETS[::2], 1, context), context),
        "  4 samples": lambda: together(model, rows(post_fill, BUDGETS, 4, context), context),
        "one cell of 4 samples": lambda: together(model, four, context),
        "  half the context": lambda: together(
            model, rows(post_fill, BUDGETS, 1, context // 2), context // 2
        ),
        "30 chunked cells": lambda: together(model, chunked, context),
        "  of them, one by one": lambda: alone(model, chunked, context),
    }
    differ = [
        sum(
            a.tokens != b.tokens
            for a, b in zip(
                together(model, some, context), alone(model, some, context), strict=True
            )
        )
        for some in (sweep, chunked)
    ]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, function in runs.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:24} {1000 * seconds:9.0f} ms {seconds / medians['one cell']:8.2f} x one cell")
    print(
        f"12 cells / one cell: {medians['12 post-fill cells'] / medians['one cell']:.2f} for one "
        f"sample, {medians['  4 samples'] / medians['one cell of 4 samples']:.2f} for four"
    )
    print(
        f"one by one / together: {medians['  one by one'] / medians['12 post-fill cells']:.2f} for "
        f"post-fill, {medians['  of them, one by one'] / medians['30 chunked cells']:.2f} for "
        f"chunked cells; {differ[0]} of {len(sweep)} and {differ[1]} of {len(chunked)} rows gave "
        f"other tokens together than alone ({str(model.dtype).removeprefix('torch.')})"
    )


def together(model: LoadedModel, rows: list[Row], context: int) -> list[Outcome]:
    """Run rows in one group."""
    return run_rows(model, rows, prefill_chunk=max(1, context // 4))


def alone(model: LoadedModel, rows: list[Row], context: int) -> list[Outcome]:
    """Run rows one after the other."""
    return [together(model, [row], context)[0] for row in rows]


if __name__ == "__main__":
    main()
