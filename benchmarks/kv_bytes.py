"""Peak KV bytes against what the counted peak of entries predicts, for every family.

    python benchmarks/kv_bytes.py [--model tiny] [--context 4096] [--layers N]

`--layers N` replaces the model by random weights with N layers of 8 narrow KV heads (Llama-3.1-8B
has 32 layers of 8); bytes over prediction do not depend on the size of a head.

The prediction is the highest number of entries held at one instant (`kv_held_peak`), an entry being
2 x head size x bytes of the dtype, and what a method keeps beside the entries: the bounds of pages,
a gathered number for each entry, sums over the queries. Bytes above the prediction are storage
reserved in all layers for later entries while one layer holds a whole chunk, and the copy of one KV
head while an eviction moves its entries, or of one layer's keys while storage for the answer is
added; they matter more with fewer layers. Head scores are random. All rows run in one batch, and
each is measured as if it ran alone.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.method import KVShape
from kvbench.methods.quest import Quest
from kvbench.models.load import LoadedModel, load_model, wrap_model
from kvbench.spec import parse_method

METHODS = (
    "full",
    "recency",
    "duoattention",
    "prulong",
    "snapkv",
    "snapkv-naive",
    "snapkv-patched",
    "pyramidkv",
    "pyramidkv-naive",
    "pyramidkv-patched",
    "knorm",
    "knorm-naive",
    "random",
    "random-naive",
    "prulong+snapkv",
    "snapkv-bounded",
    "ada-snapkv",
    "expected-attention",
    "chunkkv",
    "criticalkv",
    "cur",
    "lagkv",
    "kvzip",
    "quest",
    "h2o",
    "tova",
    "keydiff",
    "r-kv",
)
NEW = 32  # tokens of the answer, so that methods evict while decoding


def random_model(arguments: argparse.Namespace) -> LoadedModel:
    """Random weights with the layers and KV heads of a real model."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2 * arguments.context,
        bos_token_id=None,
        eos_token_id=None,
    )
    return wrap_model(LlamaForCausalLM(config).eval(), None, name="random weights")


def beside(name: str, shape: KVShape, tokens: int, itemsize: int) -> float:
    """Bytes that a method keeps beside the entries when it holds most, in all layers.

    For h2o a float32 for each of the `tokens` entries of a KV head; for quest two keys for each
    page of all but the first layers; for expected-attention a matrix in float64 for each query
    head.
    """
    heads = shape.total_kv_heads
    if name == "h2o":
        return 4 * tokens * heads
    if name == "quest":
        quest = Quest()
        paged = heads - quest.dense * shape.kv_heads
        return -(-tokens // quest.page) * paged * 2 * shape.head_dim * itemsize
    if name == "expected-attention":
        return 8 * (shape.head_dim + 1) ** 2 * shape.query_heads * shape.layers
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(arguments) if arguments.layers else load_model(arguments.model)
    shape = model.shape
    prompt = torch.randint(1, 200, (arguments.context - NEW,)).tolist()
    entry = 2 * shape.head_dim * model.dtype.itemsize

    with tempfile.TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.tsv"
        rows = torch.rand(shape.layers, shape.kv_heads).tolist()
        scores.write_text("\n".join("\t".join(map(str, row)) for row in rows))
        options = {
            f"{split}.{option}": value
            for split in ("duoattention", "prulong")
            for option, value in (("scores", str(scores)), ("sinks", 16), ("window", 128))
        }
        specs = [parse_method(name, options, model.card.options) for name in METHODS]
        cells = [
            Row(prompt, NEW, spec, budget)
            for spec in specs
            for budget in ((1.0,) if spec.name == "full" else (0.1, 0.5))
        ]
        outcomes = run_rows(model, cells, prefill_chunk=arguments.context // 16)
    print(f"{'method':18} budget   peak MiB  of full  bytes / predicted")
    worst = 0.0
    for cell, outcome in zip(cells, outcomes, strict=True):
        # entries of each KV head
        held = outcome.kv_held_peak * (outcome.prompt_tokens + outcome.new_tokens - 1)
        predicted = held * shape.total_kv_heads * entry
        predicted += beside(cell.spec.name, shape, round(held), model.dtype.itemsize)
        worst = max(worst, outcome.kv_bytes_peak / predicted)
        print(
            f"{cell.spec.name:18} {cell.budget:6} {outcome.kv_bytes_peak / 2**20:10.2f} "
            f"{outcome.kv_bytes_peak / outcomes[0].kv_bytes_peak:8.3f} "
            f"{outcome.kv_bytes_peak / predicted:10.3f}"
        )
    print(f"at most {worst:.3f} of the prediction, on {shape.layers} layers")


if __name__ == "__main__":
    main()
