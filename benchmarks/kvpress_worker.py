"""The kvpress side of against_kvpress.py, run by an interpreter that has kvpress installed.

    python benchmarks/kvpress_worker.py GGUF THREADS

A line of JSON on stdin asks for cells of one prompt, {"ids", "new", "cells": [[method, budget],
...]}; the answer is a line on stdout with the seconds and the text of each cell. Cells run as in
kvpress's README: its pipeline with a press, one call for each cell.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kvpress import PyramidKVPress, SnapKVPress  # type: ignore[import-not-found]
from transformers import pipeline
from transformers.utils import logging

# That environment has no kvbench; this module of it needs no other.
sys.path.insert(0, str(Path(__file__).parent.parent))
from kvbench.models.gguf import read_gguf

PRESSES = {"snapkv": SnapKVPress, "pyramidkv": PyramidKVPress}


def main() -> None:
    gguf, threads = Path(sys.argv[1]), int(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps what libraries print out of the JSON
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = read_gguf(gguf, dtype=torch.float32)
    model.generation_config.eos_token_id = -1  # every cell generates the same number of tokens
    pipe = pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    for line in sys.stdin:
        print(json.dumps(answer(pipe, json.loads(line))), file=answers, flush=True)


def answer(pipe: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Run the cells of a request, one at a time."""
    ids = torch.tensor([asked["ids"]])
    seconds, texts = [], []
    for method, budget in asked["cells"]:
        started = time.perf_counter()
        made = pipe.forward(
            {"context_ids": ids[:, :-1], "questions_ids": [ids[:, -1:]]},
            press=PRESSES[method](compression_ratio=1 - budget),
            max_new_tokens=asked["new"],
        )
        seconds.append(time.perf_counter() - started)
        texts.append(made[0])
    return {"seconds": seconds, "texts": texts}


if __name__ == "__main__":
    main()
