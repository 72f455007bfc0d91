"""How PruLong's masks follow the target sparsity: two constraints, three models, three lengths.

    python benchmarks/mask_dynamics.py [MODEL ...] [--steps 100,300,1000]

prints a line for each training. Rows are short, because only the course of the masks is looked at.
`missed` is the sparsity at the end less the target, in KV heads, and `worst` the largest such
difference in the second half of the training. `spread` is the standard deviation of log_alpha at
the end, `between` the share of heads whose mask is neither mostly 0 nor mostly 1.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from kvbench.learning.loop import learn
from kvbench.learning.masks import zero_probability
from kvbench.learning.prulong import PruLong
from kvbench.learning.recipe import make_recipe
from kvbench.learning.rows import make_rows
from kvbench.models.load import LoadedModel, load_model, wrap_model

RANDOM = "random-128-heads"
TARGETS = (0.3, 0.5, 0.7, 0.8)
LENGTH = 192
SETTINGS = {"model": "m", "model_fingerprint": "", "seed": 0, "length": LENGTH, "batch": 1}
STREAM = {"sinks": 4, "window": 32, "data": "stdlib"}


def random_model(tiny: LoadedModel) -> LoadedModel:
    """A model of random weights with 128 KV heads and the tokenizer of `tiny`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.2,
    )
    return wrap_model(LlamaForCausalLM(config).eval(), tiny.tokenizer, name=RANDOM)


def train(model: LoadedModel, **changes: Any) -> str:
    """Train masks and return how they followed their target, in words."""
    how = make_recipe("prulong", SETTINGS, STREAM, changes)
    objective = PruLong(model.shape, how, model.device)
    rows = make_rows(how, model.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        log = learn(
            model.model,
            objective,
            rows,
            how,
            Path(folder),
            Accelerator(cpu=True),
            lambda line: None,
        )
    heads = objective.log_alpha.numel()
    gaps = [line["sparsity"] - line["target"] for line in log[len(log) // 2 :]]
    end = objective.state(how.steps)
    zero = zero_probability(objective.log_alpha.detach())
    between = ((zero > 0.1) & (zero < 0.9)).double().mean().item()
    return (
        f"missed {heads * (end['sparsity'] - end['target']):+6.2f}  "
        f"worst {heads * max(gaps, key=abs):+7.2f}  "
        f"spread {objective.log_alpha.std().item():5.2f}  between {between:4.0%}"
    )


def main() -> None:
    """Train all combinations and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["tiny", RANDOM, "smollm2-135m"])
    parser.add_argument("--steps", default="100,300,1000")
    chosen = parser.parse_args()
    for name in chosen.models:
        dtype = "bfloat16" if name == "smollm2-135m" else "float32"
        base = "tiny" if name == RANDOM else name
        model = load_model(base, device="cpu", dtype=dtype)
        model = random_model(model) if name == RANDOM else model
        model.model.requires_grad_(False)
        heads = model.shape.layers * model.shape.kv_heads
        print(f"\n{name}, {heads} KV heads, {dtype}")
        for steps in map(int, chosen.steps.split(",")):
            for constraint, rate in (("multipliers", 1.0), ("exact", 60 / steps)):
                kind = {"steps": steps, "constraint": constraint, "rate": rate}
                found = train(model, target=0.7, focus=0.1, **kind)
                print(f"target 0.7  {steps:5d} steps  {constraint:11}  {found}", flush=True)
        for target in TARGETS:
            found = train(model, target=target, focus=0.1, steps=100, constraint="exact", rate=0.6)
            print(f"target {target}    100 steps  exact        {found}", flush=True)


if __name__ == "__main__":
    main()
