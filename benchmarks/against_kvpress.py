"""A sweep of kvbench against the same cells in kvpress 0.5.5, on the CPU, in one run.

    python benchmarks/against_kvpress.py [--contexts 1536,2048,4096] [--samples 1] [--new N]

The cells are {snapkv, pyramidkv} x 6 budgets of each sample of `needle`; the model is smollm2-135m
(`make smollm2`). kvpress needs an older transformers, so it has a separate environment:
`build/kvpress`, made at the first use, or that of `--kvpress-python`, with kvpress and gguf.

Both sides have the same weights (one GGUF file, float32), tokenizer, prompts (token for token),
window and kernel of the methods, number of new tokens (no end token stops a cell), PyTorch's SDPA,
and threads. The sides take turns, sample by sample; loading the models is not counted.

Each side runs the cells as its users do: kvbench passes all cells of a sample to `run_rows` in one
call, kvpress's pipeline is called once for each cell.

What differs: kvpress compresses a context and then reads a question whole. Here the context is the
prompt without its last token, because kvbench's methods see the question too, and because kvpress's
pyramidkv, whose layers differ in length, accepts no longer question with SDPA. Therefore its
observation window ends one token earlier, its pyramidkv does not keep the mean of the layers at the
budget, and its budgets are rounded differently. The texts need not be equal; the share of right
answers is shown for both.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from kvbench.engine.row import Row
from kvbench.engine.run import run_rows
from kvbench.models.load import LoadedModel, load_model
from kvbench.models.wheel import WHEELS
from kvbench.registry import tasks
from kvbench.spec import parse_method
from kvbench.sweep.chat import Chat
from kvbench.sweep.plan import Settings, encode_prompt, make_sample
from kvbench.task import Sample

MODEL = "smollm2-135m"
METHODS = ("snapkv", "pyramidkv")
BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
CELLS = [(method, budget) for method in METHODS for budget in BUDGETS]
ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / "build" / "kvpress"
KVPRESS = "kvpress==0.5.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--contexts", default="1536,2048,4096", help="tokens, with commas between")
    parser.add_argument("--samples", type=int, default=1, help="of each context")
    parser.add_argument("--new", type=int, help="tokens each cell generates; else the task's own")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kvpress-python", type=Path, help="an interpreter that has kvpress")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(MODEL, device="cpu", dtype="float32")
    model.model.generation_config.eos_token_id = -1
    gguf = WHEELS[MODEL].installed(MODEL)
    peer = Peer(arguments.kvpress_python or environment(), arguments.threads, gguf)

    warm = prompt_of(model, sample_of(model, 512, 0))
    ours(model, warm, 4)
    peer.ask({"ids": warm, "new": 4, "cells": CELLS})
    print(f"{len(CELLS)} cells a sample, {arguments.threads} threads")
    print("context  new   kvbench s   kvpress s   ratio   right: kvbench  kvpress   equal texts")
    totals = [0.0, 0.0]
    for context in map(int, arguments.contexts.split(",")):
        for index in range(arguments.samples):
            sample = sample_of(model, context, index)
            prompt = prompt_of(model, sample)
            new = arguments.new or sample.max_new_tokens
            seconds, texts = ours(model, prompt, new)
            theirs = peer.ask({"ids": prompt, "new": new, "cells": CELLS})
            peer_seconds = sum(theirs["seconds"])
            totals[0] += seconds
            totals[1] += peer_seconds
            equal = sum(a == b for a, b in zip(texts, theirs["texts"], strict=True))
            print(
                f"{context:7} {new:4} {seconds:11.2f} {peer_seconds:11.2f} "
                f"{peer_seconds / seconds:7.2f} {right(sample, texts):16.2f} "
                f"{right(sample, theirs['texts']):8.2f} {equal:10} of {len(CELLS)}"
            )
    print(f"kvpress / kvbench, all together: {totals[1] / totals[0]:.2f}")
    peer.close()


def sample_of(model: LoadedModel, context: int, index: int) -> Sample:
    """A sample of `needle` in the model's chat template."""
    settings = Settings(context, 0, 1, (context,), BUDGETS, chat_template=True)
    return make_sample(model, tasks.get("needle")(), index, settings)


def prompt_of(model: LoadedModel, sample: Sample) -> list[int]:
    """The token ids of a sample's prompt."""
    return encode_prompt(model.tokenizer, sample, chat=Chat())


def right(sample: Sample, texts: list[str]) -> float:
    """The mean score of the answers."""
    task = tasks.get("needle")()
    return sum(task.score(text, sample) for text in texts) / len(texts)


def ours(model: LoadedModel, prompt: list[int], new: int) -> tuple[float, list[str]]:
    """Seconds and texts of all cells in kvbench."""
    started = time.perf_counter()
    rows = [Row(prompt, new, parse_method(method, {}), budget) for method, budget in CELLS]
    outcomes = run_rows(model, rows, prefill_chunk=None)
    texts = [model.tokenizer.decode(o.tokens, skip_special_tokens=True) for o in outcomes]
    return time.perf_counter() - started, texts


class Peer:
    """kvpress in a separate process, with the model of a GGUF file or a folder."""

    def __init__(self, python: Path, threads: int, model: Path) -> None:
        self.process = subprocess.Popen(
            [python, ROOT / "benchmarks" / "kvpress_worker.py", model, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the process answers; `kvpress_worker.py` says what it can be asked."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the kvpress side stopped; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def environment() -> Path:
    """The interpreter of kvpress's environment, which is made if needed."""
    python = ENVIRONMENT / "bin" / "python"
    ready = ENVIRONMENT / "ready"
    if not ready.exists():
        print(f"making {ENVIRONMENT.relative_to(ROOT)} for {KVPRESS}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        torch_version = torch.__version__.partition("+")[0]
        # PyTorch first, so that both sides have the same version
        for packages in ([f"torch=={torch_version}"], [KVPRESS, "gguf"]):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        ready.touch()
    return python


if __name__ == "__main__":
    main()
