"""Everything that only a GPU shows, in at most eight minutes on one H100: a verdict for each step.

    make gpu-check                          # or: python benchmarks/gpu_check.py --out FOLDER
    python benchmarks/gpu_check.py --device cpu --out FOLDER   # rehearses what a CPU can do

Needs no download. Steps that passed are not repeated: a check that was cut short goes on where it
stopped. The output of each step is in FOLDER/STEP.txt, the verdicts are in FOLDER/verdicts.json.
The exit code is 1 if a step failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvbench.files import write_atomically
from kvbench.records import read_records

MINUTES = 8
HERE = Path(__file__).parent
PYTHON = sys.executable
# One method of each family.
FAMILIES = ("recency", "snapkv", "snapkv-patched", "random-heads", "h2o", "quest")
LONG = {"cuda": 32768, "cpu": 512}  # tokens of the prompts of `families`
WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
NARROW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Step:
    """A command, and what it may take."""

    name: str
    command: Sequence[str]
    seconds: int  # at most
    device: str = "cuda"  # "any": a CPU can do it too; "none: ...": not to be done, and why
    cells: int | None = None  # that its run folder must hold, none failed


def steps(out: Path, device: str) -> list[Step]:
    """The steps, the most telling first."""
    run = [PYTHON, "-m", "kvbench", "run", "--device", device, "--samples", "1"]
    model = out / "model"
    few = ["--method", "snapkv,snapkv-patched,prulong", "--task", "recall,rag,rerank"]
    long = [*run, "--model", str(model), "--context", str(LONG[device]), "--task", "recall"]
    long += ["--method", ",".join(FAMILIES), "--budgets", "0.3", "--dtype", "bfloat16"]
    shapes = [PYTHON, str(HERE / "gpu_shapes.py"), "--new", "32"]
    tests = [PYTHON, "-m", "pytest", "-q", str(HERE.parent / "tests/test_gpu.py")]
    if find_spec("xdist"):  # most of a test is waiting for the compiler
        tests += ["-n", "4"]
    return [
        Step("tests", tests, 150),
        Step("sweep", [*run, *few, "--budgets", "0.3", "--out", str(out / "sweep")], 60, "any", 12),
        Step("families", [*long, "--out", str(out / "families")], 90, "any", len(FAMILIES) + 1),
        Step("flash-attn", [*long, "--attention", "flash", "--out", str(out / "flash-attn")], 60)
        if find_spec("flash_attn")
        else Step("flash-attn", [], 0, "none: flash-attn is not installed"),
        Step("two-gpus", [*long, "--gpus-per-worker", "2", "--out", str(out / "two-gpus")], 60)
        if torch.cuda.device_count() > 1
        else Step("two-gpus", [], 0, "none: there are not two GPUs"),
        Step("shapes-8k", [*shapes, "--contexts", "8192"], 60),
        Step("shapes-128k", [*shapes, "--contexts", "131072", "--layers", "8"], 90),
    ]


def make_model(folder: Path, size: dict[str, int], positions: int) -> None:
    """A model of random weights with the embedded model's tokenizer."""
    if (folder / "config.json").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(HERE.parent / "kvbench" / "models" / "tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        **size,
        vocab_size=len(tokenizer),
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def verdict(step: Step, out: Path, seconds: float) -> tuple[str, float]:
    """Run a step within `seconds`; the verdict, and how long it took."""
    started = time.monotonic()
    with (out / f"{step.name}.txt").open("wb") as output:
        process = subprocess.Popen(
            step.command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"stopped after {seconds:.0f} s", time.monotonic() - started
    took = time.monotonic() - started
    if code:
        return f"failed with exit code {code}", took
    if step.cells is not None:
        records = read_records(out / step.name)
        failed = sum(record.error is not None for record in records)
        if failed or len(records) != step.cells:
            return f"{len(records)} of {step.cells} cells, {failed} failed", took
    return "passed", took


def last_line(path: Path) -> str:
    """The last line that a step printed."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:100]


def main() -> int:
    """Run the steps that have not passed; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/runs/gpu-check"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check needs a GPU: this PyTorch sees none (--device cpu rehearses)")
        return 2
    end = time.monotonic() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "verdicts.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    name = torch.cuda.get_device_name() if given.device == "cuda" else "a CPU (rehearsal)"
    print(f"{name}, torch {torch.__version__}", flush=True)
    size = WIDE if given.device == "cuda" else NARROW
    make_model(given.out / "model", size, LONG[given.device])
    for step in steps(given.out, given.device):
        left = end - time.monotonic()
        if step.device.startswith("none"):
            known[step.name] = step.device
        elif given.device == "cpu" and step.device != "any":
            known[step.name] = "none: needs a GPU"
        elif known.get(step.name) == "passed":
            known[step.name] = "passed"
        elif left < 5:
            known[step.name] = "no time left; give the command again"
        else:
            known[step.name], took = verdict(step, given.out, min(step.seconds, left))
            text = last_line(given.out / f"{step.name}.txt")
            print(f"{step.name:12} {known[step.name]:28} {took:5.0f} s  {text}", flush=True)
            write_atomically(file, json.dumps(known, indent=2) + "\n")
            continue
        print(f"{step.name:12} {known[step.name]}", flush=True)
    return int(any(not text.startswith(("passed", "none")) for text in known.values()))


if __name__ == "__main__":
    raise SystemExit(main())
