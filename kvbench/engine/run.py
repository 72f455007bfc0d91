"""Runs rows: reads their prompts (`prefill`), then decodes all of them together (`decode`).

This is where the engine is entered. `kvbench.engine.prefill` says how rows share work; what is
measured is the same as if each row ran alone. `kvbench.engine.reference` does all of this for one
row, slowly and simply: start there to learn how eviction is measured.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from kvbench.engine.attention import backend_of
from kvbench.engine.cache import Ledger
from kvbench.engine.decode_eviction import evict_due
from kvbench.engine.decoding import DecodeKV
from kvbench.engine.graph import Repeated
from kvbench.engine.prefill import prefill
from kvbench.engine.row import Outcome, Row, RowState, check, outcome, policy_of
from kvbench.models.load import LoadedModel, best_tokens, forward

Repeat = Callable[[Callable[[], None], bool], Repeated]  # of a step, and whether to capture it


def run_rows(
    model: LoadedModel,
    rows: Sequence[Row],
    *,
    prefill_chunk: int | None,
    keep_positions: bool = False,
    repeat: Repeat = Repeated,
) -> list[Outcome]:
    """Prefill and decode all rows, greedily; returns their outcomes in the same order.

    `prefill_chunk` is in tokens; None reads each prompt at once. With `keep_positions`, outcomes
    list the positions that are kept after the prompt. `repeat` makes what calls a decoding step
    again and again. Rows of the same prompt that evict nothing are run once. InputError if a row
    does not fit the model, or if some layers do not reach the registered attention.
    """
    for row in rows:
        check(model, row)
    if model.long_rope is not None:
        model.long_rope.choose(max(len(row.prompt) + row.max_new_tokens for row in rows))
    gpus = [device for device in model.devices if device.type == "cuda"]
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    ledger = Ledger()
    # By prompt, then by equal rows: indices of rows. An answer's length decides what a layer with a
    # limit holds, so rows with other lengths do not share a prefill there.
    limited = any(layer.limit is not None for layer in model.layers)
    groups: dict[object, dict[object, list[int]]] = {}
    for index, row in enumerate(rows):
        full = policy_of(model, row, prefill_chunk).keeps_all
        same = (row.max_new_tokens, row.stop) if full else index
        prompt = tuple(row.prompt), row.context, limited and row.max_new_tokens
        groups.setdefault(prompt, {}).setdefault(same, []).append(index)
    states: list[RowState] = []
    # Kernels and graphs go to the current GPU, which may not be the model's.
    with torch.inference_mode(), torch.cuda.device(model.device) if gpus else nullcontext():
        for group in groups.values():
            states += prefill(model, [rows[i[0]] for i in group.values()], prefill_chunk, ledger)
        if keep_positions:
            for state in states:
                state.kept = state.cache.kept()
        decode(model, states, repeat)
    peak = sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None
    results: dict[int, Outcome] = {}
    waiting = iter(states)
    for group in groups.values():
        shared = sum(len(members) for members in group.values())
        for members in group.values():
            state = next(waiting)
            for index in members:
                results[index] = outcome(model, state, peak, ledger, shared, len(members))
    return [results[index] for index in range(len(rows))]


def decode(model: LoadedModel, states: Sequence[RowState], repeat: Repeat) -> None:
    """Decode until every row has ended; rows leave the batch as they end."""
    batch = [state for state in states if not state.ended(model)]
    if not batch:
        return
    started = time.perf_counter()
    for state in batch:
        state.reserve_answer()
        state.start_decoding()
    kv = DecodeKV(
        [state.cache for state in batch],
        [len(state.row.prompt) for state in batch],
        model.layers,
        backend_of(model.attention),
        max(state.policy.queries_needed for state in batch),
    )
    ids = torch.tensor([state.tokens[-1] for state in batch], device=model.device)

    def step() -> None:
        fed = ids.clamp(min=0)  # rows that have ended may keep their places
        ids.copy_(best_tokens(forward(model, fed[:, None], kv.positions[:, None], kv)))
        kv.advance()

    take_step = repeat(step, kv.capturable)
    running = list(range(len(batch)))  # places in the batch
    while running:
        take_step()
        tokens = ids.tolist()
        now = time.perf_counter()
        for place in running:
            state = batch[place]
            state.tokens.append(tokens[place])
            state.decode_seconds += (now - started) / len(running)
        over = {place for place in running if batch[place].ended(model)}
        for place in over:
            batch[place].count_decoded()
        running = [place for place in running if place not in over]
        evict_due(kv, batch, running, model.layers)
        started = time.perf_counter()
        if not over:
            continue
        if kv.capturable and 2 * len(running) > len(batch):
            kv.retire(over)
            continue
        batch = [batch[place] for place in running]
        ids = ids[torch.tensor(running, dtype=torch.long, device=model.device)]
        kv.keep(running)
        take_step.changed()
        running = list(range(len(batch)))
