"""The engine in its simplest form: one row, read and decoded token by token as the rules say.

`run_reference` measures what `kvbench.engine.run.run_rows` measures, without sharing, kernels,
storage or caching of scores, with attention in float64. Read it to learn how eviction is measured;
tests compare the engine with it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvbench.engine.row import Row
from kvbench.method import Entries, KVShape, LayerView, draw_seed
from kvbench.models.attention import AttentionCall
from kvbench.models.load import LoadedModel, forward
from kvbench.spec import Chunking


@dataclass(frozen=True)
class Reference:
    """What a row gives; all fields as in `kvbench.engine.row.Outcome`."""

    tokens: list[int]
    kept: list[list[list[int]]]
    resident_rows: int
    patch_rows: int
    kv_peak: float


def run_reference(model: LoadedModel, row: Row, prefill_chunk: int | None) -> Reference:
    """Read the prompt of a row in chunks of `prefill_chunk` tokens, then decode greedily."""
    prompt = len(row.prompt)
    kv = ReferenceKV(row, model.shape)

    def feed(ids: list[int], start: int) -> int:
        positions = torch.arange(start, start + len(ids), device=model.device)
        given = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            return int(forward(model, given, positions[None], kv).argmax(-1))

    token = patch_rows = 0
    for start in range(0, prompt, prefill_chunk or prompt):
        stop = min(prompt, start + (prefill_chunk or prompt))
        kv.start, kv.new, kv.last = start, stop - start, stop == prompt
        patch = row.prompt[-kv.window :] if kv.patches and not kv.last else []
        token = feed(row.prompt[start:stop] + patch, start)
        patch_rows += len(patch)
    kept = [[sorted(head.positions[0].tolist()) for head in layer] for layer in kv.held]
    tokens = [token]
    kv.new, kv.decoding = 1, True
    while len(tokens) < row.max_new_tokens and tokens[-1] not in model.end_tokens:
        kv.start = prompt + len(tokens) - 1
        tokens.append(feed([tokens[-1]], kv.start))
    full = model.shape.total_kv_heads * (prompt + len(tokens) - 1)
    answer = tokens[:-1] if tokens[-1] in model.end_tokens else tokens
    return Reference(answer, kept, kv.resident_rows, patch_rows, kv.peak / full)


class ReferenceKV:
    """A `KVAttention` with a list of entries for each layer and KV head: attend, count, evict."""

    start = 0  # position of the chunk's first token
    new = 0  # tokens of the chunk, without patched ones
    last = False  # whether it is the prompt's last chunk
    decoding = False

    def __init__(self, row: Row, shape: KVShape) -> None:
        self.row, self.shape = row, shape
        method, budget = row.spec.method, row.budget
        windows = method.windows(shape, budget, len(row.prompt)) if budget < 1 else None
        self.windows = windows or [[None] * shape.kv_heads] * shape.layers
        self.scorer = row.spec.scorer if budget < 1 else None
        self.chunked = row.spec.chunking is not Chunking.NONE
        self.window = row.spec.observation_window
        self.patches = self.scorer is not None and row.spec.chunking is Chunking.PATCHED
        self.held: list[list[Entries]] = [[] for _ in range(shape.layers)]  # each head's [1, E, ..]
        self.queries: list[list[Tensor]] = [[] for _ in range(shape.layers)]  # each chunk's
        self.entries = self.peak = self.resident_rows = 0

    def attend(self, call: AttentionCall) -> Tensor:
        """B = 1: attend, then evict."""
        layer, tokens, heads = call.layer, call.key.shape[2], range(self.shape.kv_heads)
        positions = torch.arange(self.start, self.start + tokens, device=call.key.device)
        own = [Entries(call.key[:, h], call.value[:, h], positions[None]) for h in heads]
        past = self.held[layer]
        seen = [joined(past[h], own[h]) if past else own[h] for h in heads]
        self.resident_rows += sum(
            entries.keys.shape[1] - tokens + i for entries in seen for i in range(1, self.new + 1)
        )
        self.entries += len(seen) * tokens
        self.peak = max(self.peak, self.entries)
        out = torch.stack([attention(call, seen[h // self.shape.group], h, positions)
                           for h in range(self.shape.query_heads)])[None]
        self.queries[layer].append(call.query[0])
        end = self.start + self.new
        for head, window in enumerate(self.windows[layer]):
            at = seen[head].positions[0]
            stay = at < end  # patched entries never stay
            if window is not None:
                stay &= (at < window.sinks) | (at >= end - window.size)
            ...
        return out
