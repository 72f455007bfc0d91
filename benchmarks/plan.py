"""What `kvbench plan` predicts against what an H100 took: prefill, decoding, bytes.

    python benchmarks/plan.py > results/benchmarks/plan.txt

Needs no GPU: the measurements are the committed results/benchmarks/gpu_shapes.txt, to which the
model's four numbers were fitted, and gpu_steps.txt, which was left out of the fit.
"""

import re
from pathlib import Path

import torch
from gpu_shapes import SHAPE
from gpu_steps import config_of
from transformers import LlamaConfig

from kvbench.models.load import LoadedModel
from kvbench.models.shapes import read_shapes, shapes_of
from kvbench.sweep import forecast as model_of_cost
from kvbench.sweep.command import Choices
from kvbench.sweep.forecast import Workload, read_gpu

RESULTS = Path(__file__).parents[1] / "results" / "benchmarks"
NEW, CHUNK = 64, 32768  # tokens of an answer and of a prefill chunk in both files
ROW = re.compile(
    r" *(?P<context>\d+) (?P<method>\S+) +(?P<prefill>[\d.]+) +\S+ +\S+ +(?P<token>[\d.]+) +\S+"
    r" +\S+ +(?P<kv>[\d.]+) (?P<unit>[MG])iB"
)
STEP = re.compile(r"(?P<name>\S+) +(?P<rows>\d+) +[\d.]+ +(?P<captured>[\d.]+) ")
GPU = read_gpu("h100")


def main() -> None:
    constants = ("PRODUCTS", "ATTENTION", "BANDWIDTH", "LAYER_SECONDS")
    print(", ".join(f"{name} {getattr(model_of_cost, name):g}" for name in constants))
    print("\nthe shape of Llama-3.1-8B (gpu_shapes.txt): predicted, measured, predicted/measured")
    print(f"{'context':>8} {'method':15} {'prefill s':^21} {'ms a token':^21} {'KV GiB':^21}")
    shape = shapes_of(LlamaConfig(**SHAPE), "llama-8b-shape", torch.bfloat16)
    for found in filter(None, map(ROW.match, lines("gpu_shapes.txt"))):
        method = found["method"]
        budget = 1.0 if method == "full" else 0.3
        predicted = costs(shape, method, budget, int(found["context"]))
        gib = float(found["kv"]) / (1024 if found["unit"] == "M" else 1)
        measured = float(found["prefill"]), float(found["token"]), gib
        pairs = zip(predicted, measured, strict=True)
        text = " ".join(f"{ours:7.2f} {theirs:7.2f} {ours / theirs:5.2f}" for ours, theirs in pairs)
        print(f"{found['context']:>8} {method:15} {text}")
    print("\nother shapes, decoding (gpu_steps.txt, captured; not in the fit): ms a step")
    for found in filter(None, map(STEP.match, lines("gpu_steps.txt"))):
        name, rows = found["name"], int(found["rows"])
        bare = (
            read_shapes(name, None, "bfloat16")
            if name == "tiny"
            else shapes_of(config_of(name), name, torch.bfloat16)
        )
        ours, theirs = costs(bare, "full", 1.0, 1024, rows)[1], float(found["captured"])
        print(f"{name:14} {rows:3} rows {ours:7.2f} {theirs:7.2f} {ours / theirs:5.2f}")


def lines(file: str) -> list[str]:
    return (RESULTS / file).read_text().splitlines()


def costs(
    model: LoadedModel, method: str, budget: float, context: int, rows: int = 1
) -> tuple[float, float, float]:
    """Seconds of the prefill, milliseconds of a step of `rows` rows, GiB of keys and values."""
    choices = Choices(method=(method,), budgets=(budget,), prefill_chunk=(CHUNK,))
    specs = model_of_cost.specs_of(choices, model)[-1:]
    load = Workload("", "", 1, context - NEW, NEW)
    (cell,), _ = model_of_cost.cells_of(choices, model, specs, load)
    roofline = model_of_cost.roofline_of(model, GPU)
    parts = model_of_cost.passes(model, cell.policy)
    prefill = sum(roofline.forward([part], 1).seconds for part in parts)
    step = model_of_cost.decoding(model, cell.policy)
    token = roofline.forward([step] * rows, rows).seconds
    return prefill, 1000 * token, model_of_cost.kv_peak(model, cell.policy) / 2**30


if __name__ == "__main__":
    main()
