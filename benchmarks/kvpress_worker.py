"""The kvpress side of two comparisons, run by an interpreter that has kvpress installed.

    python benchmarks/kvpress_worker.py MODEL THREADS

MODEL is a GGUF file or the folder of a model. Each line of JSON on stdin asks about one prompt, and
a line on stdout answers.

`against_kvpress.py` asks for cells, {"ids", "new", "cells": [[method, budget], ...]}, and gets the
seconds and the text of each. Cells run as in kvpress's README: its pipeline with a press, one call
for each cell.

`positions_against_kvpress.py` asks what a method keeps, {"ids", "new", "method", "budget"}, and
gets the positions that each layer and KV head keeps of the prompt, and the tokens generated then:
null if kvpress cannot decode.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kvpress import (  # type: ignore[import-not-found]
    AdaKVPress,
    ChunkKVPress,
    CriticalKVPress,
    CURPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    PyramidKVPress,
    SnapKVPress,
    TOVAPress,
)
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DynamicCache, pipeline
from transformers.utils import logging

# That environment has no kvbench; this module of it needs no other.
sys.path.insert(0, str(Path(__file__).parent.parent))
from kvbench.models.gguf import read_gguf

# By kvbench's name of the method: the press with a compression ratio.
PRESSES: dict[str, Callable[[float], Any]] = {
    "snapkv": SnapKVPress,
    "pyramidkv": PyramidKVPress,
    "knorm": KnormPress,
    "keydiff": KeyDiffPress,
    "tova": TOVAPress,
    "lagkv": LagKVPress,
    "cur": CURPress,
    "expected-attention": ExpectedAttentionPress,
    "ada-snapkv": lambda ratio: AdaKVPress(SnapKVPress(ratio)),
    "chunkkv": lambda ratio: ChunkKVPress(SnapKVPress(ratio)),
    "criticalkv": lambda ratio: CriticalKVPress(SnapKVPress(ratio)),
}


def main() -> None:
    where, threads = Path(sys.argv[1]), int(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps what libraries print out of the JSON
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, tokenizer = load(where)
    model.generation_config.eos_token_id = -1  # every cell generates the same number of tokens
    pipe = tokenizer and pipeline("kv-press-text-generation", model=model, tokenizer=tokenizer)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = cells(pipe, asked) if "cells" in asked else positions(model, asked)
        print(json.dumps(answer), file=answers, flush=True)


def load(where: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer if it is a GGUF file."""
    if where.is_file():
        return read_gguf(where, dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval(), None


def cells(pipe: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Run the cells of a request, one at a time."""
    ids = torch.tensor([asked["ids"]])
    seconds, texts = [], []
    for method, budget in asked["cells"]:
        started = time.perf_counter()
        made = pipe.forward(
            {"context_ids": ids[:, :-1], "questions_ids": [ids[:, -1:]]},
            press=PRESSES[method](1 - budget),
            max_new_tokens=asked["new"],
        )
        seconds.append(time.perf_counter() - started)
        texts.append(made[0])
    return {"seconds": seconds, "texts": texts}


class Gathers(TorchFunctionMode):
    """Notes the indices of each `Tensor.gather`: presses gather what they keep of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.indices: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.gather:
            self.indices.append(args[2])
        return func(*args, **(kwargs or {}))


def positions(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """What a press keeps of a prompt, [layers][KV heads][positions], and what follows greedily."""
    ids, cache, gathers = torch.tensor([asked["ids"]]), DynamicCache(), Gathers()
    with torch.inference_mode():
        with PRESSES[asked["method"]](1 - asked["budget"])(model), gathers:
            logits = model(ids, past_key_values=cache).logits
        tokens: list[int] | None = [int(logits[0, -1].argmax())]
        try:
            while tokens and len(tokens) < asked["new"]:
                at = torch.tensor([[ids.shape[1] + len(tokens) - 1]])
                logits = model(
                    torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=at
                ).logits
                tokens.append(int(logits[0, -1].argmax()))
        except ValueError as error:  # kvpress may find no keys that stand for masked ones
            print(error, file=sys.stderr)
            tokens = None
    # Keys and values of a layer are gathered with the same indices [1, K, kept, D].
    kept = [[sorted(head[:, 0].tolist()) for head in each[0]] for each in gathers.indices[::2]]
    return {"kept": kept or unmasked(model, ids.shape[1]), "tokens": tokens}


def unmasked(model: Any, entries: int) -> list[list[list[int]]]:
    """What a press keeps that masks entries instead of evicting them."""
    layers = []
    for layer in model.model.layers:
        _, heads, masked = layer.self_attn.masked_key_indices
        gone = set(zip(heads.tolist(), masked.tolist(), strict=True))
        kv_heads = range(model.config.num_key_value_heads)
        layers.append([[p for p in range(entries) if (h, p) not in gone] for h in kv_heads])
    return layers


if __name__ == "__main__":
    main()
