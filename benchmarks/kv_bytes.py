"""Peak KV bytes against what the counted peak of entries predicts, for every family.

    python benchmarks/kv_bytes.py [--model tiny] [--context 4096]

An entry takes 2 x head size x bytes of the dtype. What is above 1.00 is room kept for what is still
to come, and the storage of one KV head while an eviction moves its entries.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from kvbench.engine import Row, run_rows
from kvbench.model import load_model
from kvbench.spec import parse_method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=4096)
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    shape = model.shape
    prompt = torch.randint(1, 200, (arguments.context - 8,)).tolist()
    entry = 2 * shape.head_dim * model.dtype.itemsize

    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.tsv"
        rows = torch.rand(shape.layers, shape.kv_heads).tolist()
        scores.write_text("\n".join("\t".join(map(str, row)) for row in rows))
        options = {
            "prulong.scores": str(scores),
            "prulong.sinks": 16,
            "prulong.window": 128,
        }
        print(f"{'method':18} budget   peak MiB  of full  bytes / predicted")
        full_bytes = 0
        for name in ("full", "recency", "prulong", "snapkv", "snapkv-naive", "snapkv-patched"):
            for budget in (1.0,) if name == "full" else (0.1, 0.5):
                spec = parse_method(name, options, model.card.options)
                outcome = run_rows(
                    model,
                    [Row(prompt, 8, spec, budget)],
                    prefill_chunk=arguments.context // 16,
                )[0]
                fed = outcome.prompt_tokens + outcome.new_tokens - 1
                predicted = outcome.kv_peak * fed * shape.layers * shape.kv_heads * entry
                full_bytes = full_bytes or outcome.kv_bytes_peak
                print(
                    f"{name:18} {budget:6} {outcome.kv_bytes_peak / 2**20:10.2f} "
                    f"{outcome.kv_bytes_peak / full_bytes:8.3f} "
                    f"{outcome.kv_bytes_peak / predicted:10.3f}"
                )


if __name__ == "__main__":
    main()
